"""Manager: mean attention that a token received."""

from __future__ import annotations

from torch import Tensor

from evomem.managers.base import MemoryManager, register
from evomem.memory.view import LayerView


@register("observed_attention")
class ObservedAttention(MemoryManager):
    """Keeps the tokens with the most attention per query that could see them (H2O's sum over its opportunities)."""

    @property
    def observes(self) -> frozenset[str]:
        """The attention summed over all queries."""
        return frozenset({"attention_sum"})

    def score(self, view: LayerView) -> Tensor:
        """Return Σ_t a[t, i] / (L - i): (batch, kv_heads, slots) fp32; the token's own query counts as one."""
        return view.recorded["attention_sum"].float() / (view.age + 1)
