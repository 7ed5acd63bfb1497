"""Manager: how many slots a memory gets by how many different keys are read from it."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from evomem.bounds import NEIGHBOURS
from evomem.managers.allocation.base import AllocationOptions, LayerAllocation, recorded_for, register_allocation
from evomem.managers.allocation.slots import LARGEST
from evomem.managers.selection import Ends
from evomem.memory.view import LayerView

MIDDLE = 0.5
"""Distinct-key rate at which the slope has no effect."""


class ByDistinctRateOptions(AllocationOptions):
    """Options of `ByDistinctRate`."""

    total: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(ge=1, le=LARGEST)]] = Field(
        default=(0.25, 4.0),
        description="fewest and most slots, as shares of the budget, between which the input decides",
    )
    window: int = Field(
        default=32, ge=1, le=NEIGHBOURS, description="reads before a read, among which its key is new or not"
    )


@register_allocation("by_distinct_rate")
class ByDistinctRate(LayerAllocation):
    """Gives an explicit memory N(x) slots a head by the rate H of keys that were not read lately.

    N = N_min + (N_max - N_min) σ(a (H - ½) + b), rounded, with H the observation ``distinct_rate:W``, the mean of a
    layer's heads; N_min and N_max are shares of the budget. ``coefficients`` are a and b, both 0 at first, and b counts
    from where N is the budget: then every input has the budget. A memory decides with what it has read so far, so N
    follows a stream that changes. Protected ends and one slot more are given where the budget has room for them.

    The total is the budget in the mean of no input, but lies between the bounds in each. Nothing is drawn of a and b,
    so a policy gradient cannot learn them.
    """

    Options = ByDistinctRateOptions
    options: ByDistinctRateOptions
    by_input = True
    parameter_options = frozenset({"window"})

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.coefficients = nn.Parameter(torch.zeros(2, dtype=torch.float32))

    @property
    def observes(self) -> frozenset[str]:
        """The distinct-key rate."""
        return frozenset({f"distinct_rate:{self.options.window}"})

    def layer_limit(self, view: LayerView, mean: Tensor, ends: Ends, shares: Tensor | None = None) -> Tensor:
        """Return N(x): (batch, 1, 1) int64."""
        rate = recorded_for(self, view, f"distinct_rate:{self.options.window}").double().mean(-1)
        slope, shift = torch.nan_to_num(self.coefficients.double()).clamp(-1e6, 1e6).unbind(-1)
        least, most = (bound * mean.double() for bound in self.options.total)
        share = torch.sigmoid(slope * (rate - MIDDLE) + shift + self._begins)[:, None, None]
        wanted = torch.round(least + (most - least) * share).long()
        # Whole slots within the bounds: rounding alone may leave them. The budget itself lies between them.
        within = wanted.clamp(torch.ceil(least - 1e-6).long(), torch.floor(most + 1e-6).long()).clamp(min=1)
        return torch.maximum(within, mean.clamp(max=ends.floor))

    @property
    def _begins(self) -> float:
        """Log-odds at which N is the budget; ±20, which is all or nothing, where a bound is the budget."""
        low, high = self.options.total
        if low == high:
            return 0.0
        share = (1 - low) / (high - low)
        return 20.0 if share == 1 else -20.0 if share == 0 else math.log(share / (1 - share))
