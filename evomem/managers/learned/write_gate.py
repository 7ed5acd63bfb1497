"""Manager: a gate on what is written into slots that a memory rewrites: how much of an update, by what it changes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from pydantic import Field, field_validator
from torch import Tensor

from evomem.bounds import UNITS
from evomem.managers.allocation import Allocation, Everything
from evomem.managers.around import RewritingRule
from evomem.managers.base import MemoryManager, register
from evomem.managers.decision import Judgement, Rule
from evomem.managers.features import columns, different, required
from evomem.managers.learned.feature_scorer import interpolate
from evomem.managers.options import ManagerOptions
from evomem.managers.vector import zeros
from evomem.memory import Decision, LayerView

OFFERED = "updates"
"""Observation of the memories whose slots have an update to be gated; every other one refuses the manager."""


class WriteGateOptions(ManagerOptions):
    """Options of `WriteGate`."""

    features: tuple[str, ...] = Field(
        ("change", "agreement", "updates"),
        max_length=1024,
        description="what the gate looks at in every slot, as it is measured; none: a constant gate",
    )
    knots: int = Field(2, ge=1, le=UNITS, description="points of depth at which the weights are given")
    bias: float = Field(0.0, ge=-100, le=100, description="log-odds of writing that the searched ones are added to")

    @field_validator("features")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return different(names)


@dataclass(frozen=True)
class GateRule(RewritingRule):
    """A `Rule` whose scores are log-odds of writing: F + σ(score) (F_new - F) is what a slot holds from now on."""

    def written(self, decision: Decision, judgement: Judgement, view: LayerView) -> Decision:
        """Return a decision with a part of each update written; a view has the old as keys and the new as values."""
        old = view.keys
        gate = torch.sigmoid(judgement.scores)[..., None].to(old.dtype)
        return replace(decision, keys=old, values=old + gate * (view.values - old))


@register("write_gate")
class WriteGate(MemoryManager):
    """Writes a part g of every update, in memories whose slots are rewritten (feedback memory), and keeps all slots.

    g = σ(w(d) · [1, features]), one number a slot, with w piecewise linear in the layer's relative depth d through
    ``knots`` points: as many as layers are weights of their own. g = 1 writes an update whole, as the model does by
    itself; g = 0 leaves the slot as it is. All slots stay, so a budget is refused.
    """

    Options = WriteGateOptions
    options: WriteGateOptions
    parameter_options = frozenset({"features", "knots", "bias"})

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.weights = zeros(self.options.knots, 1 + len(self.options.features))

    @property
    def observes(self) -> frozenset[str]:
        """What the features need, and that the memory has updates."""
        return required(self.options.features) | {OFFERED}

    @property
    def rule(self) -> Rule:
        """The rule that also says what slots hold."""
        return GateRule(self.options.budget, self.ends, self.allocation)

    def built_in_allocation(self) -> Allocation:
        """Return the allocation that keeps all."""
        return Everything()

    def prepare(self, view: LayerView) -> None:
        """Compute the features."""
        self._features(view)

    def _features(self, view: LayerView) -> Tensor:
        """Return (batch, kv_heads, slots, 1 + features) fp32, a 1 first."""
        names = self.options.features

        def compute() -> Tensor:
            ones = torch.ones_like(view.slots, dtype=torch.float32)
            return torch.stack([ones, *columns(view, names)], -1)

        return view.once(("write gate", *names), compute)

    def score(self, view: LayerView) -> Tensor:
        """Return log-odds of writing, (batch, kv_heads, slots) fp32."""
        depth = view.depth + 0.5 if view.layers > 1 else 0.0
        weights = interpolate(self.weights.float(), depth)
        return torch.matmul(self._features(view), weights) + self.options.bias
