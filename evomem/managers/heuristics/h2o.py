"""Manager: heavy hitters of the attention so far."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from evomem.managers.base import MemoryManager, register
from evomem.managers.options import ManagerOptions
from evomem.managers.selection import Ends
from evomem.memory.view import LayerView


class H2OOptions(ManagerOptions):
    """Options of `H2O`."""

    recent: float = Field(default=0.5, ge=0, le=1, description="share of the budget that goes to the newest tokens")


@register("h2o")
class H2O(MemoryManager):
    """Keeps the tokens with the most attention so far and the newest (H2O, Zhang et al., arXiv 2306.14048).

    ⌊recent n⌋ of n slots hold the newest tokens, the others the heavy hitters. The sum goes over all queries since the
    token was read (the cache carries it on over evictions) and is the mean over the query heads of the KV head.
    """

    Options = H2OOptions
    options: H2OOptions

    @property
    def observes(self) -> frozenset[str]:
        """The attention summed over all queries."""
        return frozenset({"attention_sum"})

    def make_ends(self) -> Ends:
        """The newest tokens, as share of the slots."""
        return Ends(recent=self.options.recent)

    def score(self, view: LayerView) -> Tensor:
        """Return S_i = Σ_t a[t, i]: (batch, kv_heads, slots) fp32."""
        return view.recorded["attention_sum"].float()
