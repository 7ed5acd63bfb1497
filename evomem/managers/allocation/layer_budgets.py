"""Manager: an allocation over the layers by one searched budget each, as EvolKV searches them."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from evomem.bounds import UNITS
from evomem.managers.allocation.arithmetic import interpolated, say_other_shape, slots_at_most, water_fill
from evomem.managers.allocation.base import AllocationOptions, LayerAllocation, register_allocation
from evomem.managers.selection import Ends
from evomem.memory.view import LayerView


class LayerBudgetsOptions(AllocationOptions):
    """Options of `LayerBudgets`."""

    layers: int = Field(ge=1, le=UNITS, description="layers that have a budget of their own")
    complete: bool = Field(
        default=True,
        description="scale the layers' budgets to the manager's; false: as they are, so that the total is another one "
        "(while EvolKV searches)",
    )


@register_allocation("layer_budgets")
class LayerBudgets(LayerAllocation):
    """Gives layer l the budget k_l, completed to the manager's (EvolKV, Yu and Chai, arXiv 2509.08315).

    k_l = c x_l with c the mean budget and x_l one learned number a layer, 1 at first. The completion is the paper's
    b_l = ⌈k_l + (k_l / A) (c L - A)⌉ with A = Σ_l k_l, which is c L k_l / A. Rounded up, L layers would hold up to L
    slots a head more than the budget; here they are rounded by the running sum, so that each is within one slot of the
    formula and the total is exact, also where protected ends or the tokens read bind (`water_fill`).

    With ``complete=false`` layer l gets k_l itself, at least what the ends need: what is measured while EvolKV
    searches, when its objective (`evomem.evaluation.objectives.evolkv`) answers for the total. Then the budget is a
    target and no total is promised.

    A model with another number of layers gets x interpolated linearly in depth, which a warning says.
    """

    Options = LayerBudgetsOptions
    options: LayerBudgetsOptions
    by_depth = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.factors = nn.Parameter(torch.ones(self.options.layers, dtype=torch.float32))

    def layer_limit(self, view: LayerView, mean: Tensor, ends: Ends, shares: Tensor | None = None) -> Tensor:
        """Return the layer's budget: (batch, 1, 1) int64."""
        return self.layer_limits(view, mean, ends, shares)[view.layer]

    def layer_limits(self, view: LayerView, mean: Tensor, ends: Ends, shares: Tensor | None = None) -> Tensor:
        """Return every layer's budget: (layers, batch, 1, 1) int64."""
        factors = torch.nan_to_num(self.factors.float()).clamp(0, 1e6)
        if len(factors) != view.layers:
            say_other_shape(self.name, f"{len(factors)} layers", str(view.layers))
        wide = interpolated(factors, view.layers) if len(factors) != view.layers else factors
        weights = wide.double()[:, None, None, None]
        if not self.options.complete:
            return torch.maximum(torch.round(mean * weights).long(), mean.clamp(max=ends.floor))
        weights = weights.clamp(min=1e-6)
        until = weights.cumsum(0) / weights.sum(0) * view.layers
        rounded = torch.round(mean * until).long()
        parts = torch.diff(rounded, dim=0, prepend=torch.zeros_like(rounded[:1]))
        return water_fill(parts, weights, mean, ends.floor, slots_at_most(view))
