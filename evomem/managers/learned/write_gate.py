"""Manager: a gate on what is written into slots that a memory rewrites: how much of an update, by what it changes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from pydantic import Field
from torch import Tensor

from evomem.managers.around import RewritingRule
from evomem.managers.base import register
from evomem.managers.decision import Judgement, Rule
from evomem.managers.learned.gate import GateManager, GateOptions
from evomem.managers.vector import zeros
from evomem.memory import Decision, LayerView

OFFERED = "updates"
"""Observation of the memories whose slots have an update to be gated; every other one refuses the manager."""


class WriteGateOptions(GateOptions):
    """Options of `WriteGate`."""

    features: tuple[str, ...] = Field(
        ("change", "agreement", "updates"),
        max_length=1024,
        description="what the gate looks at in every slot, as it is measured; none: a constant gate",
    )
    bias: float = Field(0.0, ge=-100, le=100, description="log-odds of writing that the searched ones are added to")


@dataclass(frozen=True)
class GateRule(RewritingRule):
    """A `Rule` whose scores are log-odds of writing: F + σ(score) (F_new - F) is what a slot holds from now on."""

    def written(self, decision: Decision, judgement: Judgement, view: LayerView) -> Decision:
        """Return a decision with a part of each update written; a view has the old as keys and the new as values."""
        old = view.keys
        gate = torch.sigmoid(judgement.scores)[..., None].to(old.dtype)
        return replace(decision, keys=old, values=old + gate * (view.values - old))


@register("write_gate")
class WriteGate(GateManager):
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
        return super().observes | {OFFERED}

    @property
    def rule(self) -> Rule:
        """The rule that also says what slots hold."""
        return GateRule(self.options.budget, self.ends, self.allocation)

    def score(self, view: LayerView) -> Tensor:
        """Return log-odds of writing, (batch, kv_heads, slots) fp32."""
        return torch.matmul(self.inputs(view), self.weights_here(view)) + self.options.bias
