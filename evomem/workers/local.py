"""Evaluation: the pool that evaluates in this process, one unit after the other."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence

from evomem.workers.base import Evaluate, Outcome, Unit


class LocalPool:
    """Evaluates in process.

    Parameters
    ----------
    evaluate : what to do with a unit.
    attempts : how often a unit that raises is tried.
    """

    def __init__(self, evaluate: Evaluate, attempts: int = 1) -> None:
        self._evaluate = evaluate
        self._attempts = attempts

    def evaluate(self, units: Sequence[Unit]) -> Iterator[Outcome]:
        """Yield outcomes in order; units that raised are tried again after the others."""
        waiting = deque((unit, 1) for unit in units)
        while waiting:
            unit, attempt = waiting.popleft()
            begin = time.perf_counter()
            try:
                evaluations, error = self._evaluate(unit), None
            except Exception as caught:
                evaluations, error = [], caught
            again = error is not None and attempt < self._attempts
            if again:
                waiting.append((unit, attempt + 1))
            yield Outcome(unit, evaluations, time.perf_counter() - begin, error, again)

    def close(self) -> None:
        """Nothing to release."""
