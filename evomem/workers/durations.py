"""Workers: how long pieces of work take, as far as a schedule has seen."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

WINDOW = 4096
"""Durations from which the median is taken: more than twice the stragglers that ten thousand workers end with."""


class Durations:
    """The durations of finished pieces in seconds: the last ones, sorted, and the longest of all.

    Attributes
    ----------
    longest : None: nothing has finished yet.
    """

    def __init__(self) -> None:
        self.longest: float | None = None
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._recent)

    def add(self, seconds: float) -> None:
        """Take note of a duration."""
        self.longest = max(seconds, self.longest or 0.0)
        self._recent.append(seconds)
        insort(self._sorted, seconds)
        if len(self._recent) > WINDOW:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]

    @property
    def median(self) -> float | None:
        """The (lower) median of the last `WINDOW` durations; None: there are none."""
        return self._sorted[(len(self._sorted) - 1) // 2] if self._sorted else None
