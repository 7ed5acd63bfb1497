"""Manager: which tokens a neural memory stores, by how much of a surprise they are, and with which gates it learns.

Source: Behrouz et al. 2024, Titans (arXiv 2501.00663), whose memory learns every token by how much it was a surprise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from evomem.bounds import UNITS
from evomem.managers.around import RewritingRule
from evomem.managers.base import register
from evomem.managers.decision import Judgement, Rule
from evomem.managers.learned.gate import GateManager, GateOptions
from evomem.managers.vector import zeros
from evomem.memory import Decision, LayerView

HEADS = ("forget", "momentum", "rate", "threshold")
"""What the weights give, in their order: offsets of the log-odds of alpha and eta and of log theta, the threshold."""
RATIO = "surprise_ratio"
"""Observation by which tokens are stored; every memory but a neural one refuses the manager for it."""
LARGEST_THRESHOLD = 4.0
"""A threshold is at most that many times the mean surprise."""


class SurpriseGateOptions(GateOptions):
    """Options of `SurpriseGate`."""

    features: tuple[str, ...] = Field(
        (),
        max_length=1024,
        description="what the gates and the threshold look at in every token, as it is measured; none: one number each",
    )
    knots: int = Field(1, ge=1, le=UNITS, description="points of depth at which the weights are given")
    slope: float | None = Field(
        None, gt=0, le=1000, description="tokens below the threshold are learnt in part, less by that share for every "
        "unit of surprise that they lack; none: not at all",
    )  # fmt: skip


@dataclass(frozen=True)
class TokenJudgement(Judgement):
    """A `Judgement` that also moves gates: (batch, kv_heads, slots, 3), see `Decision.gates`."""

    gates: Tensor | None = None


@dataclass(frozen=True)
class TokenRule(RewritingRule):
    """A `Rule` whose decisions move the gates of tokens."""

    def written(self, decision: Decision, judgement: Judgement, view: LayerView) -> Decision:
        """Return a decision that says how gates move."""
        return replace(decision, gates=getattr(judgement, "gates", None))


@register("surprise_gate")
class SurpriseGate(GateManager):
    """Stores the tokens that surprise a neural memory enough, and moves the gates with which it learns them.

    With x = [1, features] of a token and s its surprise over the running mean,

        stored where s >= τ,   τ = w_τ(d) · x, in [0, 4]
        logit α + w_α(d) · x,  logit η + w_η(d) · x,  log θ + w_θ(d) · x

    and every w piecewise linear in the layer's relative depth d through ``knots`` points. Weights of 0 leave the model
    as it is. Without features these are four numbers. The features ``forget_gate``, ``momentum_gate`` and ``rate_gate``
    are the model's own log-odds, so that weights on them are scales of these. With ``slope`` b a token below the
    threshold is learnt with the part max(0, 1 - b (τ - s)) of its rate.

    Every token of a segment may be stored, so a budget is refused.
    """

    Options = SurpriseGateOptions
    options: SurpriseGateOptions
    parameter_options = frozenset({"features", "knots"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.weights = zeros(self.options.knots, len(HEADS), 1 + len(self.options.features))

    @property
    def observes(self) -> frozenset[str]:
        """What the features need, and the surprise."""
        return super().observes | {RATIO}

    @property
    def rule(self) -> Rule:
        """The rule that also moves gates."""
        return TokenRule(None, self.ends, self.allocation)

    def outputs(self, view: LayerView) -> Tensor:
        """Return what the weights give of every token, in the order of `HEADS`: (batch, kv_heads, slots, 4) fp32."""
        return torch.matmul(self.inputs(view), self.weights_here(view).transpose(0, 1))

    def score(self, view: LayerView) -> Tensor:
        """Return by how much the surprise is above the threshold, (batch, kv_heads, slots) fp32."""
        return view.recorded[RATIO].float() - self.outputs(view)[..., 3].clamp(0.0, LARGEST_THRESHOLD)

    def admit(self, view: LayerView) -> Tensor | None:
        """Return at least 0 for the tokens that are stored, in part or whole."""
        excess, slope = self.score(view), self.options.slope
        return excess if slope is None else 1 + slope * excess

    def decay(self, view: LayerView) -> Tensor | None:
        """Return the logarithm of the part of the rate with which a token is learnt; None without ``slope``."""
        slope = self.options.slope
        if slope is None:
            return None
        return (1 + slope * self.score(view)).clamp(torch.finfo(torch.float32).tiny, 1.0).log()

    @property
    def forgets(self) -> bool:
        """Whether there is a slope."""
        return self.options.slope is not None

    def judge(self, view: LayerView) -> Judgement:
        """Return which tokens are stored, and how their gates move."""
        plain = super().judge(view)
        gates = self.outputs(view)[..., :3]
        return TokenJudgement(plain.scores, plain.stored, plain.decay, plain.shares, gates)
