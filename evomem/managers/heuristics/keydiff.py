"""Manager: tokens whose keys differ from the average."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from evomem.managers.base import MemoryManager, register
from evomem.memory.view import LayerView


@register("keydiff")
class KeyDiff(MemoryManager):
    """Keeps the tokens whose keys are least like the average key (KeyDiff, Park et al., arXiv 2504.15364)."""

    def score(self, view: LayerView) -> Tensor:
        """Return -cos(k_i, mean_j k_j/‖k_j‖) over the slots of the head: (batch, kv_heads, slots) fp32."""
        directions = functional.normalize(view.keys.float(), dim=-1)
        valid = view.valid[..., None]
        # The length of the anchor does not change the cosine, so the sum serves as the mean.
        anchor = functional.normalize(torch.where(valid, directions, 0.0).sum(-2, keepdim=True), dim=-1)
        return -(directions * anchor).sum(-1)
