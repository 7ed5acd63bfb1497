"""Manager: what the model's mean query will attend to, without a look at any query of the text."""

from __future__ import annotations

from torch import Tensor

from evomem.managers.base import MemoryManager, register
from evomem.memory.view import LayerView


@register("tri_attention")
class TriAttention(MemoryManager):
    """Keeps what the model's mean query will attend to from many distances (TriAttention, arXiv 2604.04921).

    Scores are the observation `evomem.memory.observations.tri_attention`, for which the mean queries of the model are
    measured once, in seconds, on random tokens; the paper takes texts. Nothing depends on the queries of the text, so
    that keys may be judged as soon as they are read.
    """

    @property
    def observes(self) -> frozenset[str]:
        """The score itself."""
        return frozenset({"tri_attention"})

    def score(self, view: LayerView) -> Tensor:
        """Return the score: (batch, kv_heads, slots) fp32."""
        return view.recorded["tri_attention"].float()
