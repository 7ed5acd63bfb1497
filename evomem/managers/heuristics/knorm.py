"""Manager: tokens whose keys are short."""

from __future__ import annotations

import torch
from torch import Tensor

from evomem.managers.base import MemoryManager, register
from evomem.memory.view import LayerView


@register("knorm")
class KNorm(MemoryManager):
    """Keeps the tokens whose keys have the smallest L2 norm (Devoto et al., arXiv 2406.11430)."""

    def score(self, view: LayerView) -> Tensor:
        """Return -‖k_i‖₂: (batch, kv_heads, slots) fp32."""
        length: Tensor = torch.linalg.vector_norm(view.keys.float(), dim=-1)
        return -length
