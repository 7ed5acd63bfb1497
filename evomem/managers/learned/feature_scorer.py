"""Manager: a small evolvable scorer over a declared list of observations."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from evomem.bounds import TOKENS, UNITS
from evomem.errors import ConfigError
from evomem.managers.base import MemoryManager, register
from evomem.managers.features import FeatureOptions, features, required
from evomem.managers.selection import Ends
from evomem.managers.vector import zeros
from evomem.memory import LayerView


def interpolate(knots: Tensor, depth: float) -> Tensor:
    """Return the value at ``depth`` in [0, 1] of a piecewise linear function.

    knots : (knots, ...), its values at equally spaced depths from 0 to 1.
    """
    count = knots.shape[0]
    if count == 1:
        return knots[0]
    position = min(max(depth, 0.0), 1.0) * (count - 1)
    low = min(int(position), count - 2)
    share = position - low
    return knots[low] * (1 - share) + knots[low + 1] * share


@register("feature_scorer")
class FeatureScorer(MemoryManager):
    """Scores slots by a weighted sum of standardised features whose weights change with depth.

    score = Σ_f w_f(d) x_f, with w piecewise linear in the layer's relative depth d through ``knots`` points: one knot
    is the same weights everywhere, two are a slope (the first trial's w_f + d·u_f in other coordinates), as many as
    layers are weights of their own. With ``hidden`` > 0 a small network over the same features is added:
    Σ_h a_h(d) tanh(b_h + Σ_f W_hf x_f). With ``allocation`` > 0 the layers share the budget unequally
    (`DepthShares`).

    With ``layers`` and ``heads`` every KV head of every layer has weights of its own, added to the common ones: heads
    read for different purposes, and what is worth keeping differs between them. On a model with another number of
    layers these are interpolated in depth; with another number of heads, every head gets their mean.
    """

    class Options(FeatureOptions):
        """Options of `FeatureScorer`."""

        knots: int = Field(2, ge=1, le=UNITS, description="points of depth at which the weights are given")
        hidden: int = Field(0, ge=0, le=UNITS, description="units of a nonlinear part; 0: linear")
        allocation: Annotated[int, Field(ge=0, le=UNITS)] | dict[str, Any] | None = Field(
            0,
            description="points of depth at which the layers' shares of the budget are learned (0: equal shares), or "
            "an allocation, e.g. across_heads(layers=depth_shares(points=8))",
        )
        sinks: int = Field(4, ge=0, le=TOKENS, description="first tokens that are always kept")
        recent: int = Field(8, ge=0, le=TOKENS, description="newest tokens that are always kept")

    options: Options
    head_parameters: ClassVar[frozenset[str]] = frozenset({"own"})
    parameter_options: ClassVar[frozenset[str]] = frozenset({"features", "knots"})
    STARTS: ClassVar[dict[str, str]] = {
        "keydiff": "keydiff", "knorm": "-key_norm", "h2o": "attention", "observed_attention": "attention_per_query",
        "snapkv": "window:32", "streaming_llm": "-age", "lru": "-recency", "lfu": "frequency", "fifo": "-age",
    }  # fmt: skip
    """Heuristics that a search may start from: the one feature, with its sign, that each is made of.

    ``snapkv`` is only near: it averages its window's attention over 5 neighbours, the feature takes their maximum. Of
    slots that were read as often ``lfu`` keeps the one that was read last, the scorer the one that was written first.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        count, o = len(self.options.features), self.options
        self.weights = zeros(o.knots, count)
        if o.hidden:
            self.inner = zeros(o.hidden, count)
            self.bias = zeros(o.hidden)
            self.outer = zeros(o.knots, o.hidden)
        if o.layers:
            self.own = zeros(o.layers, o.heads, count)
        if (shares := self.allocation.take_shares()) is not None:
            self.log_shares = shares

    @property
    def observes(self) -> frozenset[str]:
        """What the declared features need."""
        return required(self.options.features)

    def make_ends(self) -> Ends:
        """The first and the newest tokens."""
        return Ends(self.options.sinks, self.options.recent)

    def prepare(self, view: LayerView) -> None:
        """Compute the features."""
        self._features(view)

    def _features(self, view: LayerView) -> Tensor:
        names = self.options.features
        return view.once(("features", *names), lambda: features(view, names))

    def score(self, view: LayerView) -> Tensor:
        """Return (batch, kv_heads, slots) fp32 scores."""
        x = self._features(view)
        depth = view.depth + 0.5 if view.layers > 1 else 0.0
        weights = interpolate(self.weights.float(), depth)[None]
        if self.options.layers:
            own = interpolate(self.own.float(), depth)
            weights = weights + (own if own.shape[0] == x.shape[1] else own.mean(0, keepdim=True))
        score = torch.matmul(x, weights[..., None])[..., 0]
        if self.options.hidden:
            units = torch.tanh(torch.matmul(x, self.inner.float().transpose(0, 1)) + self.bias.float())
            score = score + torch.matmul(units, interpolate(self.outer.float(), depth))
        return score

    def shares(self) -> Tensor | None:
        """Return the learned log-shares, which are parameters of the scorer itself."""
        return self.log_shares.float()[None] if "log_shares" in self._parameters else None

    @classmethod
    def start_from(cls, heuristic: str, **options: Any) -> Self:
        """Return a scorer that ranks as ``heuristic`` does (up to the protected ends).

        Raises
        ------
        ConfigError : no single feature ranks as it does.
        """
        if heuristic not in cls.STARTS:
            raise ConfigError(f"feature_scorer cannot start from {heuristic!r}; it can from {', '.join(cls.STARTS)}")
        manager = cls(**options)
        feature = cls.STARTS[heuristic]
        sign, name = (-1.0, feature[1:]) if feature.startswith("-") else (1.0, feature)
        if name not in manager.options.features:
            raise ConfigError(f"to start from {heuristic!r} the features must contain {name!r}")
        with torch.no_grad():
            manager.weights[:, manager.options.features.index(name)] = sign
        return manager
