"""Manager: the allocation of CAKE: layers whose attention is spread out and keeps changing get more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from evomem.bounds import NEIGHBOURS
from evomem.managers.allocation.base import AllocationOptions, ModelAllocation, recorded_for, register_allocation
from evomem.managers.allocation.by_weight import ends_at, even_heads
from evomem.managers.selection import Ends
from evomem.memory.view import LayerView


class CakeOptions(AllocationOptions):
    """Options of `Cake`."""

    window: int = Field(default=32, ge=1, le=NEIGHBOURS, description="last queries whose attention is looked at")
    tau1: float = Field(default=1.0, ge=0.1, le=100, description="temperature of the entropy: its power is 1 / tau1")
    tau2: float = Field(default=1.0, ge=0.1, le=100, description="temperature of the variance: its power is 1 / tau2")


@register_allocation("cake")
class Cake(ModelAllocation):
    """Gives layers slots by the entropy and the variance of their attention (CAKE, Qin et al., arXiv 2503.12491).

    The preference of layer l is P_l = H_l^(1/tau1) V_l^(1/tau2) (eq. 6). With a the attention that the last ``window``
    queries pay to the slots before the window, H_l is the sum of -a log a over queries and slots (how widely attention
    is spread) and V_l the sum over slots of a's variance from query to query (how much it shifts), both means over
    heads here: the same up to a constant factor. Layer l gets what protected ends take at the mean, for CAKE's own
    ranking its window, and of the rest the share P_l / ΣP (eq. 7). All heads of a layer get the same.

    Different from the paper: it tunes tau1 and tau2 per model and budget, and here they are 1 unless given; what a
    layer cannot hold goes to the others by their preferences, not in equal parts; layers are compared when all of them
    have read, and not evicted in a cascade while they read, which ends at the same budgets. In `streaming` the
    attention is that over the slots that are held.
    """

    Options = CakeOptions
    options: CakeOptions

    @property
    def observes(self) -> frozenset[str]:
        """Entropy and variance of the window's attention, slot by slot."""
        return frozenset({f"window_entropy:{self.options.window}", f"window_variance:{self.options.window}"})

    def preferences(self, views: Sequence[LayerView]) -> Tensor:
        """Return P of every layer: (layers, batch) float64, on the first view's device."""
        window, device = self.options.window, views[0].slots.device
        parts = []
        for view in views:
            before = view.valid & (view.age >= window)
            entropy, variance = (
                torch.where(before, recorded_for(self, view, f"window_{name}:{window}"), 0.0)
                .double()
                .clamp(min=0)
                .sum(-1)
                .mean(1)
                for name in ("entropy", "variance")
            )
            parts.append((entropy ** (1 / self.options.tau1) * variance ** (1 / self.options.tau2)).to(device))
        return torch.stack(parts)

    def limits(
        self,
        views: Sequence[LayerView],
        means: Sequence[Tensor],
        scores: Sequence[Tensor],
        ends: Ends,
        shares: Tensor | None = None,
    ) -> list[Tensor]:
        """Return the slots of every head, the same for all heads of a layer: (batch, kv_heads, 1) int64 each."""
        return even_heads(self.preferences(views), views, means[0], scores, ends_at(ends, means[0]))

    def ends_within(self, limits: Tensor, mean: Tensor) -> Tensor:
        """Return the mean: every layer protects the same tokens, however few slots it gets beyond them."""
        return mean
