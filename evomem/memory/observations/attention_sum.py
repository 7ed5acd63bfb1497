"""Memory: the attention that a slot has been paid by all queries so far (H2O, arXiv 2306.14048)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from evomem.memory.observations.base import Moment, Observation, Sizes, State, Window, register_observation
from evomem.memory.observations.recorder import Recorder, writable


@register_observation("attention_sum")
class AttentionSum(Observation):
    """Attention paid to the slot by all queries so far, a mean over the query heads of its group."""

    every_query: ClassVar[bool] = True
    needs_past: ClassVar[bool] = True

    def append(self, recorder: Recorder, shape: tuple[int, int, int], like: Tensor) -> None:
        """Begin new slots at zero."""
        recorder.extend("attention_sum", torch.zeros(shape, device=like.device, dtype=torch.float32))

    def attended(self, recorder: Recorder, attention: Tensor, first: int, starts: tuple[int, ...]) -> None:
        """Add the block's attention."""
        total = writable(recorder.slotwise["attention_sum"])
        total[:, :, : attention.shape[3]] += attention.sum(2)
        recorder.slotwise["attention_sum"] = total

    def recorded(self, recorder: Recorder, moment: Moment, window: Callable[[int], Window]) -> dict[str, Tensor]:
        """Return the sums of the slots that were read; tokens ahead have room already."""
        return {self.spec: recorder.slotwise["attention_sum"][:, :, : moment.slots.shape[2]]}

    def state(self, tensors: Mapping[str, Tensor], sizes: Sizes) -> dict[str, State]:
        """One number a slot."""
        return {"slotwise.attention_sum": ((sizes.batch, sizes.kv_heads, sizes.slots), torch.float32)}
