"""Memory: the largest attention that a context gets while it is repeated (KVzip, arXiv 2505.23416)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from evomem.errors import CacheError
from evomem.memory.observations.base import Moment, Sizes, State, Window, register_observation
from evomem.memory.observations.reads import SlotNumber
from evomem.memory.observations.recorder import Recorder

REPEATED = "repeated_attention"
SECOND_READING = "contexts that are read a second time before anything is decided"
"""What a memory must have for it."""
_DONE = "repeated"


@register_observation(REPEATED)
class RepeatedAttention(SlotNumber):
    """Largest attention that any query head of the group pays to the slot while the model reads the context again.

    Nothing is recorded while a text is read: `evomem.memory.kv.repeating.repeat` lets the model read it a second time,
    after itself, and keeps here what came out. So a decision is possible only then.
    """

    needs: ClassVar[frozenset[str]] = frozenset({SECOND_READING})
    needs_past: ClassVar[bool] = True
    looks_back: ClassVar[bool] = True

    def append(self, recorder: Recorder, shape: tuple[int, int, int], like: Tensor) -> None:
        """Begin new slots; what was repeated before they came is out of date."""
        super().append(recorder, shape, like)
        recorder.rowwise.pop(_DONE, None)

    def recorded(self, recorder: Recorder, moment: Moment, window: Callable[[int], Window]) -> dict[str, Tensor]:
        """Return (batch, kv_heads, slots) fp32.

        Raises
        ------
        CacheError : the context was not repeated, or read on since.
        """
        if _DONE not in recorder.rowwise:
            raise CacheError(
                f"{REPEATED} is known only when the context has been read a second time, and a decision fell due "
                "before; read inside `with cache.reading():` and end the block with cache.repeat(ids), without a "
                "decision every so many tokens (kvzip works under compress_once only), or take another manager"
            )
        return {self.spec: self._held(recorder, moment)}

    def state(self, tensors: Mapping[str, Tensor], sizes: Sizes) -> dict[str, State]:
        """One number a slot and, once the context was repeated, a mark a row."""
        mark = f"rowwise.{_DONE}"
        marked: dict[str, State] = {mark: ((sizes.batch,), torch.float32)} if mark in tensors else {}
        return super().state(tensors, sizes) | marked


def keep_repeated(recorder: Recorder, largest: Tensor) -> None:
    """Keep what came out of a second reading: largest (batch, kv_heads, slots) fp32."""
    recorder.slotwise[REPEATED] = largest
    recorder.rowwise[_DONE] = largest.new_ones(len(largest))
