"""Manager: a learned gate a token, whose retention decays with every token that follows."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional

from evomem.bounds import TOKENS
from evomem.errors import ConfigError
from evomem.managers.base import register
from evomem.managers.features import parse
from evomem.managers.learned.feature_scorer import FeatureScorer, interpolate
from evomem.managers.vector import normal
from evomem.memory.view import LayerView

OF_THE_TOKEN = ("key_norm", "value_norm", "key_step", "value_step", "position", "sink")
"""Features that a token has as soon as it is read, and that nothing after it changes."""


@register("retention_gate")
class RetentionGate(FeatureScorer):
    """Keeps the tokens whose learned retention has decayed least (TRIM-KV, arXiv 2512.03324).

    Every token gets one gate β = σ(g) when it is read; n tokens later its retention is β^n, and the largest stay. The
    score is its logarithm, n log β. Here g is what a `FeatureScorer` makes of features that the token has by itself,
    plus a bias that varies with depth and, with ``layers`` and ``heads``, by head; in the paper a small network of the
    layer's hidden state, trained with the model's output as target. Features are standardised over the slots that are
    held at the decision, as everywhere in evomem.

    Gates are trained by exact gradients on contexts or traces (objective ``expected_cost``), or evolved. As built, all
    tokens have the same gate, and the newest stay.
    """

    class Options(FeatureScorer.Options):
        """Options of `RetentionGate`."""

        features: tuple[str, ...] = Field(
            OF_THE_TOKEN, max_length=1024, description=f"what a gate looks at, of {', '.join(OF_THE_TOKEN)}"
        )
        sinks: int = Field(0, ge=0, le=TOKENS, description="first tokens that are always kept")
        recent: int = Field(0, ge=0, le=TOKENS, description="newest tokens that are always kept")

        @field_validator("features")
        @classmethod
        def _of_the_token(cls, names: tuple[str, ...]) -> tuple[str, ...]:
            wrong = [name for name in names if parse(name)[2] not in OF_THE_TOKEN]
            if wrong:
                raise ValueError(
                    f"{wrong[0]!r} is not known when a token is read, or changes later; a gate looks at "
                    f"{', '.join(OF_THE_TOKEN)}, and feature_scorer at anything"
                )
            return names

    options: Options
    head_parameters: ClassVar[frozenset[str]] = frozenset({"own", "own_rate"})
    STARTS: ClassVar[dict[str, str]] = {}
    LOG_ODDS: ClassVar[float] = 4.6
    """Log-odds of a gate as built: retention falls by one per cent a token."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.rate = nn.Parameter(torch.full((self.options.knots, 1), self.LOG_ODDS, dtype=torch.float32))
        if self.options.hidden:  # zeros on both sides of the nonlinearity would have no gradient
            units, count = self.inner.shape
            self.inner = nn.Parameter(normal(torch.Generator("cpu").manual_seed(0), units, count) / math.sqrt(count))
        if self.options.layers:
            self.own_rate = nn.Parameter(torch.zeros(self.options.layers, self.options.heads, 1, dtype=torch.float32))

    def log_odds(self, view: LayerView) -> Tensor:
        """Return g, the log-odds of every token's gate: (batch, kv_heads, slots) fp32."""
        depth = view.depth + 0.5 if view.layers > 1 else 0.0
        odds = super().score(view) + interpolate(self.rate.float(), depth)
        if self.options.layers:
            own = interpolate(self.own_rate.float(), depth)
            odds = odds + (own if own.shape[0] == odds.shape[1] else own.mean(0, keepdim=True))
        return odds

    def score(self, view: LayerView) -> Tensor:
        """Return the log-retention n log σ(g): (batch, kv_heads, slots) fp32, 0 for the newest token."""
        return view.age.float() * functional.logsigmoid(self.log_odds(view))

    @classmethod
    def start_from(cls, heuristic: str, **options: Any) -> Self:
        """Refuse: only the newest tokens are what gates can begin with, and that is how they are built.

        Raises
        ------
        ConfigError : always.
        """
        raise ConfigError(
            f"retention_gate cannot start from {heuristic!r}: as built it keeps the newest tokens; leave start out"
        )
