"""Memory: how far what is written is from what was there: an update of a slot, or a token that weights learn.

In a memory whose slots are rewritten (feedback memory) the old is what a slot held, and the new what a block would have
it hold. In one whose weights learn tokens (neural memory) the old is what the memory says of a token's key, and the new
the token's value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from evomem.memory.observations.base import Moment, Window, register_observation
from evomem.memory.observations.reads import SlotNumber
from evomem.memory.observations.recorder import Recorder

UPDATES = "updates of what its slots hold"
"""What a memory must have whose slots are rewritten; see `Observation.needs`."""
CHANGES = f"{UPDATES}, or an answer to each token before it is learnt"
"""What a memory must have for `change` and `agreement`."""


class UpdateNumber(SlotNumber):
    """One number a slot, of the old and the new: what it held, and what its latest update would have it hold."""

    needs: ClassVar[frozenset[str]] = frozenset({CHANGES})
    needs_past: ClassVar[bool] = True

    def measured(self, old: Tensor, new: Tensor) -> Tensor:
        """Return (batch, kv_heads, slots) of what slots held and would hold, (batch, kv_heads, slots, size) fp32."""
        raise NotImplementedError

    def updated(self, recorder: Recorder, old: Tensor, new: Tensor) -> None:
        """Note an update of all slots."""
        self._replace(recorder, self.measured(old.float(), new.float()))

    def recorded(self, recorder: Recorder, moment: Moment, window: Callable[[int], Window]) -> dict[str, Tensor]:
        """Return (batch, kv_heads, slots) fp32; 0 before the first update."""
        return {self.spec: self._held(recorder, moment)}


@register_observation("change")
class Change(UpdateNumber):
    """How large the slot's latest update is beside what it held: |ΔF| / |F|; 0 for a slot of zeros."""

    def measured(self, old: Tensor, new: Tensor) -> Tensor:
        """Return the relative size of the update."""
        size: Tensor = (new - old).norm(dim=-1) / old.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
        return size


@register_observation("agreement")
class Agreement(UpdateNumber):
    """Cosine of what the slot held with what its latest update would have it hold: 1 where it says nothing new."""

    def measured(self, old: Tensor, new: Tensor) -> Tensor:
        """Return the cosine."""
        return F.cosine_similarity(old, new, dim=-1)


@register_observation("updates")
class Updates(SlotNumber):
    """Updates that the slot was offered so far."""

    needs: ClassVar[frozenset[str]] = frozenset({UPDATES})
    needs_past: ClassVar[bool] = True

    def updated(self, recorder: Recorder, old: Tensor, new: Tensor) -> None:
        """Count an update of all slots."""
        self._replace(recorder, recorder.slotwise[self.spec] + 1)

    def recorded(self, recorder: Recorder, moment: Moment, window: Callable[[int], Window]) -> dict[str, Tensor]:
        """Return (batch, kv_heads, slots) fp32."""
        return {self.spec: self._held(recorder, moment)}
