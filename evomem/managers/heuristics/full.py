"""Manager: everything stays, the reference that all others are measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from evomem.managers.base import MemoryManager, register
from evomem.managers.selection import KeepAll, Selection
from evomem.memory.view import LayerView


@register("full")
class Full(MemoryManager):
    """Keeps every token; a budget, if given, is ignored."""

    def make_selection(self) -> Selection:
        """Return the selection that keeps all."""
        return KeepAll()

    def score(self, view: LayerView) -> Tensor:
        """Return zeros (batch, kv_heads, slots): no token is better than another."""
        return torch.zeros_like(view.slots, dtype=torch.float32)
