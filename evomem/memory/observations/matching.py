"""Memory: how well a slot matches what is read now, and how badly what it holds was predicted when it was written."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from evomem.memory.observations.base import Moment, Observation, Window, register_observation
from evomem.memory.observations.reads import SlotNumber
from evomem.memory.observations.recorder import Recorder

PREDICTIONS = "predictions of what is written"
"""What a memory must have for `surprise`; see `Observation.needs`."""


@register_observation("relevance")
class Relevance(Observation):
    """Mean cosine between the slot's key and the row's last W queries: the match with what is read now.

    Where not every token reads (a stream of requests), a query of zeros stands for one that does not, and is left out.
    In a KV cache keys and queries are those of the attention, turned to their positions, and the mean is also over the
    query heads of the group.
    """

    takes: ClassVar[str] = "W"
    looks_back: ClassVar[bool] = True

    @property
    def newest_queries(self) -> int:
        """W."""
        return self.argument

    def recorded(self, recorder: Recorder, moment: Moment, window: Callable[[int], Window]) -> dict[str, Tensor]:
        """Return (batch, kv_heads, slots) fp32 in [-1, 1]."""
        query = recorder.rowwise["queries"][:, :, -self.argument :]
        batch, heads, queries, size = query.shape
        index = torch.arange(moment.seen - queries, moment.seen, device=query.device)
        kv_heads = moment.keys.shape[1]
        grouped = query.float().view(batch, kv_heads, heads // kv_heads, queries, size)
        asks = (index >= moment.start[:, None])[:, None] & (grouped.abs().amax((2, 4)) > 0)
        total = (F.normalize(grouped, dim=-1).mean(2) * asks[..., None]).sum(2)
        mean = total / asks.sum(-1, keepdim=True).clamp(min=1)
        return {self.spec: (F.normalize(moment.keys.float(), dim=-1) @ mean[..., None])[..., 0]}


@register_observation("surprise")
class Surprise(SlotNumber):
    """Prediction error of what the slot holds when it was written: |v - v̂| / |v|, v̂ read from the memory before it.

    1 where the memory had nothing to say, 0 where it knew (Titans, arXiv 2501.00663, calls the error surprise). A KV
    cache predicts no values, so there it does not apply.
    """

    needs: ClassVar[frozenset[str]] = frozenset({PREDICTIONS})
    needs_past: ClassVar[bool] = True

    def predicted(self, recorder: Recorder, error: Tensor) -> None:
        """Note the errors of the newest slots."""
        old = recorder.slotwise[self.spec]
        before = old[:, :, : old.shape[2] - error.shape[2]]
        recorder.slotwise[self.spec] = torch.cat((before, error.float()), 2)

    def recorded(self, recorder: Recorder, moment: Moment, window: Callable[[int], Window]) -> dict[str, Tensor]:
        """Return (batch, kv_heads, slots) fp32 >= 0."""
        return {self.spec: self._held(recorder, moment)}
