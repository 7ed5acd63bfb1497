"""Memory: the gates of tokens that a neural memory learns, and how much of a surprise each is beside those before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from evomem.memory.observations.base import (
    PER_SLOT,
    Axes,
    Moment,
    Observation,
    Sizes,
    State,
    Window,
    register_observation,
)
from evomem.memory.observations.reads import SlotNumber
from evomem.memory.observations.recorder import Recorder

GATES = "gates"
"""Name of the observation, and what a memory must have for it; see `Observation.needs`."""
HORIZON = 64
"""Tokens over which the mean of the surprise runs; before, it is the mean of all tokens."""


@register_observation(GATES)
class TokenGates(Observation):
    """Log-odds of the token's forgetting α, its momentum η and its rate θ over the largest one, as the model has them.

    Behrouz et al. 2024, Titans (arXiv 2501.00663), eq. 9-14.
    """

    needs: ClassVar[frozenset[str]] = frozenset({GATES})
    needs_past: ClassVar[bool] = True

    def axes(self) -> dict[str, Axes]:
        """(batch, kv_heads, slots, 3)."""
        return {self.spec: (*PER_SLOT, 3)}

    def append(self, recorder: Recorder, shape: tuple[int, int, int], like: Tensor) -> None:
        """Begin new slots."""
        recorder.extend(self.spec, torch.zeros(*shape, 3, device=like.device, dtype=torch.float32))

    def gated(self, recorder: Recorder, logits: Tensor, ratio: Tensor) -> None:
        """Note the gates of the newest slots."""
        old = recorder.slotwise[self.spec]
        before = old[:, :, : old.shape[2] - logits.shape[2]]
        recorder.slotwise[self.spec] = torch.cat((before, logits.float()), 2)

    def recorded(self, recorder: Recorder, moment: Moment, window: Callable[[int], Window]) -> dict[str, Tensor]:
        """Return (batch, kv_heads, slots, 3) fp32."""
        return {self.spec: recorder.slotwise[self.spec][:, :, : moment.slots.shape[2]]}

    def state(self, tensors: Mapping[str, Tensor], sizes: Sizes) -> dict[str, State]:
        """Three numbers a slot."""
        return {f"slotwise.{self.spec}": ((sizes.batch, sizes.kv_heads, sizes.slots, 3), torch.float32)}


@register_observation("surprise_ratio")
class SurpriseRatio(SlotNumber):
    """How much of a surprise the token is beside those before: ‖M(k) - v‖ over its running mean, the token included.

    M has the weights that the token's segment began with. 1 is a token like the others; the first one always is.
    """

    needs: ClassVar[frozenset[str]] = frozenset({GATES})
    needs_past: ClassVar[bool] = True

    def gated(self, recorder: Recorder, logits: Tensor, ratio: Tensor) -> None:
        """Note the ratios of the newest slots."""
        old = recorder.slotwise[self.spec]
        before = old[:, :, : old.shape[2] - ratio.shape[2]]
        recorder.slotwise[self.spec] = torch.cat((before, ratio.float()), 2)

    def recorded(self, recorder: Recorder, moment: Moment, window: Callable[[int], Window]) -> dict[str, Tensor]:
        """Return (batch, kv_heads, slots) fp32 >= 0."""
        return {self.spec: self._held(recorder, moment)}
