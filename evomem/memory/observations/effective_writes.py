"""Memory: how many writes a memory has stored, weak ones counted as little as they weigh: how much it has to hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from evomem.memory.observations.base import (
    Axes,
    Moment,
    Observation,
    Sizes,
    State,
    Window,
    register_observation,
)

if TYPE_CHECKING:
    from evomem.memory.observations.recorder import Recorder

STRENGTHS = "writes of different strength"
"""What a memory has whose model stores some tokens more than others; the keys of all others are equally long."""


@register_observation("effective_writes")
class EffectiveWrites(Observation):
    """Effective number of the writes so far, those that have left since included: (Σ s)² / Σ s².

    s is the squared length of a write, which a gate makes long or short. n writes of one length, beside any number of
    length 0, are n: so writes that the model stores nothing of do not move it. It is the inverse Simpson index, a
    diversity of order 2 (Hill 1973), and the exponential of Rényi's entropy of that order. What is stated twice counts
    twice.
    """

    needs: ClassVar[frozenset[str]] = frozenset({STRENGTHS})
    needs_past: ClassVar[bool] = True
    looks_back: ClassVar[bool] = True

    def axes(self) -> dict[str, Axes]:
        """One number a head."""
        return {self.spec: ("batch", "kv_heads")}

    def append(self, recorder: Recorder, shape: tuple[int, int, int], like: Tensor) -> None:
        """Add the new writes: ``like`` (batch, kv_heads, new slots, width), 0 for padding."""
        strengths = like.float().square().sum(-1)
        sums = torch.stack((strengths.sum(-1), strengths.square().sum(-1)), -1)
        before = recorder.rowwise.get(f"{self.spec}.sums")
        recorder.rowwise[f"{self.spec}.sums"] = sums if before is None else before + sums

    def recorded(self, recorder: Recorder, moment: Moment, window: Callable[[int], Window]) -> dict[str, Tensor]:
        """Return (batch, kv_heads) fp32; 0 while nothing is stored."""
        total, squares = recorder.rowwise[f"{self.spec}.sums"].unbind(-1)
        return {self.spec: torch.where(squares > 0, total.square() / squares.clamp(min=1e-30), 0.0)}

    def state(self, tensors: Mapping[str, Tensor], sizes: Sizes) -> dict[str, State]:
        """Two sums a head."""
        return {f"rowwise.{self.spec}.sums": ((sizes.batch, sizes.kv_heads, 2), torch.float32)}
