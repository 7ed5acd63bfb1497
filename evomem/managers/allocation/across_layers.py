"""Manager: an allocation by one ranking over the heads of all layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from evomem.managers.allocation.base import AllocationOptions, ModelAllocation, register_allocation
from evomem.managers.allocation.over_heads import heads_by_ranking
from evomem.managers.selection import Ends
from evomem.memory.view import LayerView


class AcrossLayersOptions(AllocationOptions):
    """Options of `AcrossLayers`."""

    safeguard: float = Field(default=0.0, ge=0, le=1, description="share of the budget that every head is sure of")


@register_allocation("across_layers")
class AcrossLayers(ModelAllocation):
    """Shares the slots of all layers among all heads by one ranking (KVzip, arXiv 2505.23416, "non-uniform").

    Scores must mean the same in every layer, as attention does. What the scorer protects comes before all others, in
    every head alike; with a ``safeguard`` every head keeps its ⌊safeguard n⌋ best for certain. Equal scores rank by
    position, then by layer and head.
    """

    Options = AcrossLayersOptions
    options: AcrossLayersOptions

    def limits(
        self,
        views: Sequence[LayerView],
        means: Sequence[Tensor],
        scores: Sequence[Tensor],
        ends: Ends,
        shares: Tensor | None = None,
    ) -> list[Tensor]:
        """Return the slots of every head, as a list of (batch, kv_heads, 1) int64."""
        device, counts = views[0].slots.device, [view.slots.shape[1] for view in views]
        longest = max(view.slots.shape[2] for view in views)
        marked, slots = [], []
        for view, mean, score in zip(views, means, scores, strict=True):
            of_layer = ends.mark(score, view, score != -torch.inf, mean)
            room = (longest - view.slots.shape[2], 0)  # empty slots come first
            marked.append(functional.pad(of_layer, room, value=-torch.inf).to(device))
            slots.append(functional.pad(view.slots, room, value=-1).to(device).expand(marked[-1].shape))
        joined = torch.cat(marked, 1)
        total = means[0].to(device) * sum(counts)
        limits = heads_by_ranking(joined, torch.cat(slots, 1), joined != -torch.inf, total, self.options.safeguard)
        return [part.to(view.slots.device) for part, view in zip(torch.split(limits, counts, 1), views, strict=True)]

    def ends_within(self, limits: Tensor, mean: Tensor) -> Tensor:
        """Return the mean: every head protects the same tokens, however few slots it gets beyond them."""
        return mean
