"""Manager: how many slots a memory gets by how many tokens its model has stored something of."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from evomem.managers.allocation.base import AllocationOptions, LayerAllocation, recorded_for, register_allocation
from evomem.managers.allocation.slots import LARGEST
from evomem.managers.selection import Ends
from evomem.memory.view import LayerView


class ByEffectiveWritesOptions(AllocationOptions):
    """Options of `ByEffectiveWrites`."""

    total: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(ge=1, le=LARGEST)]] = Field(
        default=(0.25, 4.0),
        description="fewest and most slots, as shares of the budget, between which the input decides",
    )


@register_allocation("by_effective_writes")
class ByEffectiveWrites(LayerAllocation):
    """Gives a memory whose model stores some tokens more than others N(x) slots a head by how many it has stored.

    N = clip(a E + (1 + b) B, N_min, N_max), rounded, with E the observation ``effective_writes``, the mean of a layer's
    heads, and B the budget, of which N_min and N_max are shares. ``coefficients`` are a and b, both 0 at first: then
    every input has the budget. a = 1 and b = -1 give as many slots as writes were stored. A memory decides with what it
    has read so far, so N follows a text that goes on. Protected ends and one slot more are given where the budget has
    room for them.

    Nothing is drawn of a and b, so a policy gradient cannot learn them.
    """

    Options = ByEffectiveWritesOptions
    options: ByEffectiveWritesOptions
    by_input = True

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.coefficients = nn.Parameter(torch.zeros(2, dtype=torch.float32))

    @property
    def observes(self) -> frozenset[str]:
        """The effective number of writes."""
        return frozenset({"effective_writes"})

    def layer_limit(self, view: LayerView, mean: Tensor, ends: Ends, shares: Tensor | None = None) -> Tensor:
        """Return N(x): (batch, 1, 1) int64."""
        writes = recorded_for(self, view, "effective_writes").double().mean(-1)[:, None, None]
        slope, shift = torch.nan_to_num(self.coefficients.double()).clamp(-1e6, 1e6).unbind(-1)
        wanted = torch.round(slope * writes + (1 + shift) * mean.double())
        # Whole slots within the bounds: rounding alone may leave them. The budget itself lies between them.
        least, most = (bound * mean.double() for bound in self.options.total)
        within = wanted.clamp(torch.ceil(least - 1e-6), torch.floor(most + 1e-6)).long().clamp(min=1)
        return torch.maximum(within, mean.clamp(max=ends.floor))
