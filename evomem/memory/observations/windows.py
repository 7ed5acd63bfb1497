"""Memory: the attention that the newest queries pay to the slots held now; only the queries are kept for it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from evomem.memory.observations.base import PER_SLOT, Axes, Moment, Observation, Window, register_observation
from evomem.memory.observations.recorder import Recorder

SOFTMAX_READS = "reads that are one softmax over all slots"
"""What a memory must have for the attention of its last queries to be worked out again at a decision."""
FADING = 0.9
"""Weight of a query against the next one in the last of the window's statistics."""
USED = 1 / 64
"""Share of a query's attention from which on a slot counts as used by it; well above an even share."""


class WindowObservation(Observation):
    """An observation of every row's last W queries; fewer while fewer were read."""

    takes: ClassVar[str] = "W"
    looks_back: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({SOFTMAX_READS})

    @property
    def newest_queries(self) -> int:
        """W."""
        return self.argument

    @abstractmethod
    def of(self, window: Window) -> Tensor:
        """Return what is recorded, from the window's attention."""

    def recorded(self, recorder: Recorder, moment: Moment, window: Callable[[int], Window]) -> dict[str, Tensor]:
        """Return `of` the window of its width."""
        return {self.spec: self.of(window(self.argument))}


@register_observation("window_attention")
class WindowAttention(WindowObservation):
    """Mean attention of the row's last W queries (SnapKV, arXiv 2404.14469)."""

    def of(self, window: Window) -> Tensor:
        """Return (batch, kv_heads, slots)."""
        return window.mean.sum(2) / window.real.sum(1).clamp(min=1)[:, None, None]


@register_observation("window_statistics")
class WindowStatistics(WindowObservation):
    """Maximum, minimum, sum, and fading sum of the last W queries' attention, the n-th from the end counting 0.9^n."""

    def axes(self) -> dict[str, Axes]:
        """Four numbers a slot."""
        return {self.spec: (*PER_SLOT, 4)}

    def of(self, window: Window) -> Tensor:
        """Return (batch, kv_heads, slots, 4)."""
        return window_statistics(window.mean, window.real)


@register_observation("window_peak")
class WindowPeak(WindowObservation):
    """Sum over the last W queries of the largest attention in the group of heads (KVP, arXiv 2602.10238)."""

    def of(self, window: Window) -> Tensor:
        """Return (batch, kv_heads, slots)."""
        return window.largest.sum(2)


@register_observation("window_next_use")
class WindowNextUse(WindowObservation):
    """Index of the first of the last W queries that pays the slot at least 1/64; W if none does."""

    def of(self, window: Window) -> Tensor:
        """Return (batch, kv_heads, slots) fp32."""
        return next_use(window.largest, window.real, window.width)


def window_statistics(attention: Tensor, real: Tensor) -> Tensor:
    """Return maximum, minimum, sum and fading sum over the queries: (batch, kv_heads, slots, 4).

    attention : (batch, kv_heads, queries, slots), zero for padded queries. real : (batch, queries) bool.
    """
    fading = FADING ** torch.arange(attention.shape[2] - 1, -1, -1, device=attention.device, dtype=attention.dtype)
    smallest = torch.where(real[:, None, :, None], attention, torch.inf).amin(2)
    smallest = torch.where(torch.isfinite(smallest), smallest, 0.0)  # no real query yet
    parts = (attention.amax(2), smallest, attention.sum(2), torch.einsum("bhqs,q->bhs", attention, fading))
    return torch.stack(parts, dim=-1)


def next_use(largest: Tensor, real: Tensor, width: int) -> Tensor:
    """Return which real query is the first to use each slot: (batch, kv_heads, slots) fp32, ``width`` where none does.

    largest : (batch, kv_heads, queries, slots), the largest attention in the group. real : (batch, queries) bool; only
    real queries count, so that padding does not shift the result.
    """
    index = (real.cumsum(1) - 1).to(largest.dtype)[:, None, :, None]
    return torch.where((largest >= USED) & real[:, None, :, None], index, float(width)).amin(2)
