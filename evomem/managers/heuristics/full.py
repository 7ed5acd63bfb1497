"""Manager: everything stays, the reference that all others are measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from evomem.managers.allocation import Allocation, Everything
from evomem.managers.base import MemoryManager, register
from evomem.memory.view import LayerView


@register("full")
class Full(MemoryManager):
    """Keeps every token; a budget, if given, is ignored."""

    def built_in_allocation(self) -> Allocation:
        """Return the allocation that keeps all."""
        return Everything()

    def score(self, view: LayerView) -> Tensor:
        """Return zeros (batch, kv_heads, slots): no token is better than another."""
        return torch.zeros_like(view.slots, dtype=torch.float32)
