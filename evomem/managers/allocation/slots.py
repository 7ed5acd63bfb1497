"""Manager: how many slots every head of a model gets, by what the input shows and what the model's heads do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from evomem.bounds import NEIGHBOURS
from evomem.errors import ConfigError
from evomem.managers.allocation.base import (
    AllocationOptions,
    ModelAllocation,
    build_allocation,
    recorded_for,
    register_allocation,
)
from evomem.managers.allocation.by_weight import limits_by_weight
from evomem.managers.allocation.per_head_shares import PerHeadShares
from evomem.managers.allocation.probe_shares import OFFSET
from evomem.managers.allocation.probed import ProbedAllocation
from evomem.managers.allocation.probes import PROBES, SINKS, WINDOW
from evomem.managers.selection import Ends, tokens_read
from evomem.memory.view import LayerView
from evomem.modes import outside_inference_mode

INPUT_FEATURES = ("attention_entropy", "attention_variance", "recent_mass", "sink_mass", "key_spread")
"""Of a head on this input: how widely the last queries attend, how much that shifts, what they pay to the newest
`WINDOW` and the first `SINKS` tokens, and how far its keys point apart."""
STATIC_FEATURES = (*(f"probe_{name}" for name in PROBES), "depth", "depth_squared")
"""Of a head of this model: its probes, the first four as log(probe + .001), and where in the model its layer lies."""
SHARE_FEATURES = (*INPUT_FEATURES, *STATIC_FEATURES, "induction_by_scarcity")
"""φ, in the order of `Slots.weights`. The last is the log of induction times log(tokens read / (8 x mean slots))."""
TOTAL_FEATURES = ("attention_entropy", "distinct_keys", "distinct_values", "log_length", "one")
"""ψ, in the order of `Slots.total_weights`: means over all heads, and log(tokens read / 512).

`distinct_keys` of a head is log((1 + n) / 16), n the tokens whose keys point more than `DISTINCT` standard deviations
further from the mean key than the mean token's does. So a number that is to grow as n does has the weight 1."""
DISTINCT = 2.0
"""Standard deviations from which on a token is distinct. With 3, models with few distinct tokens count none."""

LARGEST = 64.0
"""The largest total that an input may have, as a share of the budget."""


class SlotsOptions(AllocationOptions):
    """Options of `Slots`."""

    window: int = Field(default=32, ge=1, le=NEIGHBOURS, description="last queries whose attention is looked at")
    total: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(ge=1, le=LARGEST)]] | None = Field(
        default=None,
        description="least and largest total, as shares of the budget, between which the input decides, e.g. [0.5, 2]; "
        "none: the total is the budget",
    )
    per_head: dict[str, Any] | None = Field(
        default=None, description="log-shares of every head beside it: per_head_shares(...)"
    )

    @field_validator("per_head", mode="before")
    @classmethod
    def _describe(cls, spec: Any) -> dict[str, Any] | None:
        """Turn any spec into the full description."""
        if spec is None:
            return None
        if not isinstance(spec, str | Mapping):
            raise ValueError('give per_head_shares, e.g. "per_head_shares(layers=30, heads=3)"')
        return build_allocation(spec).describe()


@register_allocation("slots")
class Slots(ProbedAllocation, ModelAllocation):
    """Gives every head of every layer slots by few numbers over what the input shows and what the model's heads do.

    Head h of layer l gets a share proportional to exp(w · φ[l, h](x)) of all slots: `SHARE_FEATURES` of the input x
    (attention of the last queries, keys), of the head (`evomem.managers.allocation.probes`), and of its depth. The
    total is the budget, exactly; with ``total`` it is N(x) = clip(budget exp(v · ψ(x)), least, largest), by
    `TOTAL_FEATURES`, in whole slots per head within those bounds. Every head first gets what the protected ends need
    and one slot more; no head gets more than it holds, and what it cannot use goes to the others by their shares.

    w and v are 14 and 5 numbers that belong to no model. At first w is ½ for the log of induction and else 0, which is
    `ProbeShares`, and v is 0. ``per_head`` adds log-shares of the heads of one model.
    """

    Options = SlotsOptions
    parameter_options = frozenset({"window"})
    options: SlotsOptions
    per_head: PerHeadShares | None

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        start = [0.5 if name == "probe_induction" else 0.0 for name in SHARE_FEATURES]
        self.weights = nn.Parameter(torch.tensor(start, dtype=torch.float32))
        if self.options.total is not None:
            self.total_weights = nn.Parameter(torch.zeros(len(TOTAL_FEATURES), dtype=torch.float32))
        per_head = None if self.options.per_head is None else build_allocation(self.options.per_head)
        if per_head is not None and not isinstance(per_head, PerHeadShares):
            raise ConfigError(
                f"allocation 'slots': per_head: {per_head.name!r} gives no log-shares of heads; use per_head_shares"
            )
        self.per_head = per_head

    @property
    def observes(self) -> frozenset[str]:
        """Attention of the last queries, its entropy and its variance, slot by slot."""
        return frozenset(f"window_{what}:{self.options.window}" for what in ("attention", "entropy", "variance"))

    def limits(
        self,
        views: Sequence[LayerView],
        means: Sequence[Tensor],
        scores: Sequence[Tensor],
        ends: Ends,
        shares: Tensor | None = None,
    ) -> list[Tensor]:
        """Return the slots of every head, as a list of (batch, kv_heads, 1) int64, each on its view's device."""
        mean = self.mean_slots(views, means[0])
        weights = torch.softmax(self.log_shares(views, means[0]), 0)
        return limits_by_weight(weights, views, mean, scores, mean.clamp(max=ends.floor))

    def log_shares(self, views: Sequence[LayerView], mean: Tensor) -> Tensor:
        """Return w · φ of every head, plus its own log-share: (heads of all layers, batch) float64, layer by layer.

        mean : (batch, 1, 1) int64, slots per head that the budget gives.
        """
        device, counts = views[0].slots.device, [view.slots.shape[1] for view in views]
        inputs, heads = self._of_input(views), self._of_head(counts, device)
        weights = torch.nan_to_num(self.weights.double().to(device))
        w_input, w_head, w_scarcity = torch.split(weights, [len(INPUT_FEATURES), len(STATIC_FEATURES), 1])
        read = tokens_read(views[0]).double()
        scarcity = torch.log(read / (8 * mean.to(device).double()))[..., 0, 0]  # (batch,)
        logs = (inputs[..., : len(INPUT_FEATURES)] * w_input).sum(-1).transpose(0, 1)
        logs = logs + (heads * w_head).sum(-1)[:, None] + w_scarcity * heads[:, :1] * scarcity
        if self.per_head is not None:
            logs = logs + self.per_head.log_shares_of(counts, device).double()[:, None]
        return torch.nan_to_num(logs)

    def mean_slots(self, views: Sequence[LayerView], mean: Tensor) -> Tensor:
        """Return the slots per head, over all layers, that an input gets: (batch, 1, 1) int64, on the views' device.

        mean : as in `log_shares`; that is what is returned where the total does not depend on the input.
        """
        device = views[0].slots.device
        mean = mean.to(device)
        if self.options.total is None:
            return mean
        inputs = self._of_input(views).mean(1)
        length = torch.log(tokens_read(views[0]).double() / 512)[..., 0, 0]
        features = torch.stack((inputs[:, 0], inputs[:, 5], inputs[:, 6], length, torch.ones_like(length)), -1)
        weights = torch.nan_to_num(self.total_weights.double().to(device))
        # Opposite infinities cancel to NaN, which says nothing about the input, and so leaves the budget as it is.
        logs = torch.nan_to_num((features * weights).sum(-1)).clamp(-20, 20)[:, None, None]
        least, most = (bound * mean.double() for bound in self.options.total)
        wanted = torch.round((mean * torch.exp(logs)).clamp(least, most)).long()
        # Whole slots within the bounds: rounding alone may leave them. The budget itself lies between them.
        return wanted.clamp(torch.ceil(least - 1e-6).long(), torch.floor(most + 1e-6).long()).clamp(min=1)

    def _of_head(self, counts: Sequence[int], device: torch.device) -> Tensor:
        """Return `STATIC_FEATURES`: (heads of all layers, features) float64."""
        probes = self.head_values(counts, device).double()
        return torch.cat((torch.log(probes[:, :4] + OFFSET), probes[:, 4:], _depths(tuple(counts), device)), 1)

    def _of_input(self, views: Sequence[LayerView]) -> Tensor:
        """Return `INPUT_FEATURES`, distinct keys and values: (batch, heads of all layers, features) float64."""
        window, parts = self.options.window, []
        for view in views:
            seen = [
                recorded_for(self, view, f"window_{what}:{window}") for what in ("attention", "entropy", "variance")
            ]
            compute = partial(_input_features, view, *seen)
            parts.append(view.once(("slots", window), compute).to(views[0].slots.device))
        return torch.cat(parts, 1)


@cache
def _depths(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Return relative depth in [-1/2, 1/2] and its square: (heads of all layers, 2) float64. Made once."""
    places = [layer / (len(counts) - 1) - 0.5 if len(counts) > 1 else 0.0 for layer in range(len(counts))]
    rows = [[place, place**2] for place, count in zip(places, counts, strict=True) for _ in range(count)]
    with outside_inference_mode():
        return torch.tensor(rows, dtype=torch.float64, device=device)


def _input_features(view: LayerView, attention: Tensor, entropy: Tensor, variance: Tensor) -> Tensor:
    """Return `INPUT_FEATURES`, distinct keys and distinct values: (batch, kv_heads, features) float64."""
    valid = view.valid
    attention, entropy, variance = (torch.where(valid, x.double(), 0.0) for x in (attention, entropy, variance))
    count = valid.sum(-1).double()
    newest, first = view.age < WINDOW, view.position < SINKS
    keys, values = (
        torch.where(valid[..., None], F.normalize(x.float(), dim=-1), 0.0).double() for x in (view.keys, view.values)
    )
    mean_key = keys.sum(-2) / count.clamp(min=1)[..., None]
    return torch.stack(
        (
            entropy.sum(-1) / torch.log(count.clamp(min=2)),
            variance.sum(-1).clamp(min=0).sqrt(),
            torch.where(newest, attention, 0.0).sum(-1),
            torch.where(first, attention, 0.0).sum(-1),
            1 - mean_key.norm(dim=-1),
            _distinct(keys, valid),
            _distinct(values, valid),
        ),
        -1,
    )


def _distinct(directions: Tensor, valid: Tensor) -> Tensor:
    """Return log((1 + distinct tokens) / 16) of every head, as `TOTAL_FEATURES` has it: (batch, kv_heads) float64.

    directions : (batch, kv_heads, slots, dim) float64, of length 1, and 0 where a slot is not ``valid``.
    """
    count = valid.sum(-1, keepdim=True).clamp(min=1)
    mean = F.normalize(directions.sum(-2, keepdim=True), dim=-1)
    apart = torch.where(valid, 1 - (directions * mean).sum(-1), 0.0)
    centred = torch.where(valid, apart - apart.sum(-1, keepdim=True) / count, 0.0)
    spread = (centred.square().sum(-1, keepdim=True) / count).sqrt()
    # Directions that are all the same differ by rounding alone; none of them is distinct. Nor is one that is exactly
    # so far away, as a token is that fills a fifth of a text of two: rounding depends on the row's padding.
    distinct = valid & (centred > DISTINCT * (1 + 1e-9) * spread.clamp(min=1e-6))
    return torch.log((1 + distinct.sum(-1).double()) / 16)
