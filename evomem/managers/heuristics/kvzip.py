"""Manager: what the model attends to while it repeats the context."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from evomem.bounds import TOKENS
from evomem.managers.allocation import AcrossLayers, Allocation, Uniform
from evomem.managers.base import MemoryManager, register
from evomem.managers.options import ManagerOptions
from evomem.managers.selection import Ends
from evomem.memory.view import LayerView


class KVzipOptions(ManagerOptions):
    """Options of `KVzip`."""

    sinks: int = Field(default=4, ge=0, le=TOKENS, description="tokens kept at the beginning")


@register("kvzip")
class KVzip(MemoryManager):
    """Keeps what the model attends to while it repeats the context (KVzip, Kim et al., arXiv 2505.23416).

    The score is the largest attention that a query head of the group pays to the slot while the context is read a
    second time, after itself. One ranking over the heads of all layers shares the budget out (`AcrossLayers`); with an
    ``allocation`` of another kind only the scores are KVzip's: ``kvzip(allocation=uniform)``.

    The second reading takes about as many tokens as the first, at twice the distance, before anything is decided.
    Evaluations do it by themselves (``compress_once`` only); elsewhere ``cache.repeat(ids)`` does it, see
    `evomem.memory.kv.repeating.repeat`.
    """

    Options = KVzipOptions
    options: KVzipOptions

    @property
    def observes(self) -> frozenset[str]:
        """The largest attention while the context is repeated."""
        return frozenset({"repeated_attention"})

    def make_ends(self) -> Ends:
        """The sinks."""
        return Ends(sinks=self.options.sinks)

    def built_in_allocation(self) -> Allocation:
        """Return one ranking over all heads of the model, unless another allocation is given."""
        return Uniform() if self.options.allocation else AcrossLayers()

    def score(self, view: LayerView) -> Tensor:
        """Return the largest attention: (batch, kv_heads, slots) fp32."""
        return view.recorded["repeated_attention"].float()
