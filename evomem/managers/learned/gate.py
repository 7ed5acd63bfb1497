"""Manager: what gates have in common: linear in features of a slot, weights by depth, and nothing leaves."""

from __future__ import annotations

import torch
from pydantic import Field, field_validator
from torch import Tensor

from evomem.bounds import UNITS
from evomem.managers.allocation import Allocation, Everything
from evomem.managers.base import MemoryManager
from evomem.managers.features import columns, different, required
from evomem.managers.learned.feature_scorer import interpolate
from evomem.managers.options import ManagerOptions
from evomem.memory import LayerView


class GateOptions(ManagerOptions):
    """Options of `GateManager`."""

    features: tuple[str, ...] = Field(
        (), max_length=1024, description="what the gate looks at in every slot, as measured; none: a constant gate"
    )
    knots: int = Field(2, ge=1, le=UNITS, description="points of depth at which the weights are given")

    @field_validator("features")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return different(names)


class GateManager(MemoryManager):
    """A manager of which every output is w(d) · [1, features] of a slot; all slots stay, so a budget is refused.

    w is piecewise linear in the layer's relative depth d through ``knots`` points: as many as layers are weights of
    their own. A subclass sets ``weights``, (knots, ..., 1 + features).
    """

    options: GateOptions
    weights: Tensor

    @property
    def observes(self) -> frozenset[str]:
        """What the features need."""
        return required(self.options.features)

    def built_in_allocation(self) -> Allocation:
        """Return the allocation that keeps all."""
        return Everything()

    def prepare(self, view: LayerView) -> None:
        """Compute the features."""
        self.inputs(view)

    def inputs(self, view: LayerView) -> Tensor:
        """Return (batch, kv_heads, slots, 1 + features) fp32, a 1 first."""
        names = self.options.features

        def compute() -> Tensor:
            ones = torch.ones_like(view.slots, dtype=torch.float32)
            return torch.stack([ones, *columns(view, names)], -1)

        return view.once(("gate", *names), compute)

    def weights_here(self, view: LayerView) -> Tensor:
        """Return the weights at the layer's depth, (..., 1 + features) fp32."""
        return interpolate(self.weights.float(), view.depth + 0.5 if view.layers > 1 else 0.0)
