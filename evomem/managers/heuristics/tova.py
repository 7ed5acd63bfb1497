"""Manager: what the newest query attends to, one set for all heads."""

from __future__ import annotations

import torch
from torch import Tensor

from evomem.managers.base import MemoryManager, register
from evomem.memory.view import LayerView


@register("tova")
class TOVA(MemoryManager):
    """Keeps what the newest query attends to, the same tokens in all heads (TOVA, Oren et al., arXiv 2401.06104).

    As in the paper nothing is protected. A head that no longer holds a token gives it no attention; so the sets are
    the same as long as the heads hold the same tokens, which TOVA alone never changes.
    """

    @property
    def observes(self) -> frozenset[str]:
        """The attention of the newest query."""
        return frozenset({"window_attention:1"})

    def score(self, view: LayerView) -> Tensor:
        """Return the mean over all heads of a[h, L, i], found by token: (batch, kv_heads, slots) fp32."""
        attention = torch.where(view.valid, view.recorded["window_attention:1"].float(), 0.0)
        # Slots of different heads may hold different tokens, so the mean is taken in a table over token indices.
        token = view.slots.clamp(min=0).flatten(-2)
        heads = view.slots.shape[-2]
        table = attention.new_zeros(token.shape[0], view.seen)
        table = table.scatter_add(-1, token, attention.flatten(-2)) / heads
        return table.gather(-1, token).reshape(attention.shape)
