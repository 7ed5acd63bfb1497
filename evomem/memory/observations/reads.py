"""Memory: how often, and how lately, a slot was read: the observations of LFU and LRU, of every kind of memory.

Attention is what a query reads by. In a memory that is read by exact keys a query pays 1 to the slot that it reads, and
0 to all others; in a KV cache it shares 1 out over what it attends to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from evomem.memory.observations.base import Moment, Observation, Sizes, State, Window, register_observation
from evomem.memory.observations.recorder import Recorder
from evomem.memory.observations.windows import USED


class SlotNumber(Observation):
    """An observation that keeps one number a slot, under its own name.

    Class attributes
    ----------------
    begins : the number of a slot that nobody has looked at yet.
    dtype : its type.
    """

    begins: ClassVar[float] = 0.0
    dtype: ClassVar[torch.dtype] = torch.float32

    def append(self, recorder: Recorder, shape: tuple[int, int, int], like: Tensor) -> None:
        """Begin new slots."""
        recorder.extend(self.spec, torch.full(shape, self.begins, device=like.device, dtype=self.dtype))

    def state(self, tensors: Mapping[str, Tensor], sizes: Sizes) -> dict[str, State]:
        """One number a slot."""
        return {f"slotwise.{self.spec}": ((sizes.batch, sizes.kv_heads, sizes.slots), self.dtype)}

    def _held(self, recorder: Recorder, moment: Moment) -> Tensor:
        """Return the numbers of the slots that were read; tokens ahead have room already."""
        return recorder.slotwise[self.spec][:, :, : moment.slots.shape[2]]

    def _replace(self, recorder: Recorder, reached: Tensor) -> None:
        """Put numbers in the place of those of the first slots."""
        old = recorder.slotwise[self.spec]
        rest = old[:, :, reached.shape[2] :]
        recorder.slotwise[self.spec] = torch.cat((reached, rest), 2) if rest.shape[2] else reached


@register_observation("frequency")
class Frequency(SlotNumber):
    """Reads that the slot has received since it was written: the sum of the attention paid to it; LFU's count."""

    every_query: ClassVar[bool] = True
    needs_past: ClassVar[bool] = True

    def attended(self, recorder: Recorder, attention: Tensor, first: int, starts: tuple[int, ...]) -> None:
        """Add the block's reads."""
        before = recorder.slotwise[self.spec][:, :, : attention.shape[3]]
        self._replace(recorder, before + attention.sum(2))

    def recorded(self, recorder: Recorder, moment: Moment, window: Callable[[int], Window]) -> dict[str, Tensor]:
        """Return (batch, kv_heads, slots) fp32."""
        return {self.spec: self._held(recorder, moment)}


@register_observation("frequency_decayed")
class FrequencyDecayed(SlotNumber):
    """The same, a read of n tokens ago counting 2^(-n/H), with H the half-life: of W-TinyLFU's and LRFU's family."""

    takes: ClassVar[str] = "H"
    every_query: ClassVar[bool] = True
    needs_past: ClassVar[bool] = True
    looks_back: ClassVar[bool] = True

    def attended(self, recorder: Recorder, attention: Tensor, first: int, starts: tuple[int, ...]) -> None:
        """Let what was counted fade by the block's tokens, and add the block's reads, each faded to its end."""
        queries = attention.shape[2]
        ago = torch.arange(queries - 1, -1, -1, device=attention.device, dtype=torch.float32)
        before = recorder.slotwise[self.spec][:, :, : attention.shape[3]]
        new = torch.einsum("bhqs,q->bhs", attention, torch.exp2(-ago / self.argument))
        self._replace(recorder, before * 2.0 ** (-queries / self.argument) + new)

    def recorded(self, recorder: Recorder, moment: Moment, window: Callable[[int], Window]) -> dict[str, Tensor]:
        """Return (batch, kv_heads, slots) fp32."""
        return {self.spec: self._held(recorder, moment)}


@register_observation("recency")
class Recency(SlotNumber):
    """Tokens since the slot was last read, or written if nobody has read it; 0: by the newest token. LRU's order.

    A query reads the slots that it pays at least `USED` of its attention.
    """

    begins: ClassVar[float] = -1
    dtype: ClassVar[torch.dtype] = torch.int64
    every_query: ClassVar[bool] = True
    needs_past: ClassVar[bool] = True
    looks_back: ClassVar[bool] = True

    def attended(self, recorder: Recorder, attention: Tensor, first: int, starts: tuple[int, ...]) -> None:
        """Note the last token of the block that read each slot."""
        index = torch.arange(first, first + attention.shape[2], device=attention.device)
        last = torch.where(attention >= USED, index[:, None], -1).amax(2)
        before = recorder.slotwise[self.spec][:, :, : attention.shape[3]]
        self._replace(recorder, torch.maximum(before, last))

    def recorded(self, recorder: Recorder, moment: Moment, window: Callable[[int], Window]) -> dict[str, Tensor]:
        """Return (batch, kv_heads, slots) int64."""
        return {self.spec: moment.seen - 1 - torch.maximum(self._held(recorder, moment), moment.slots)}

    def example(self, sizes: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
        """Return random whole numbers."""
        shape = [sizes[name] for name in ("batch", "kv_heads", "slots")]
        return {self.spec: torch.randint(0, 100, shape, generator=generator)}
