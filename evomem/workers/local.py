"""Evaluation: the pool that evaluates in this process, one unit after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from evomem.evaluation.types import Evaluation
from evomem.workers.base import Outcome, Unit


class LocalPool:
    """Evaluates in process.

    Parameters
    ----------
    evaluate : what to do with a unit.
    """

    def __init__(self, evaluate: Callable[[Unit], list[Evaluation]]) -> None:
        self._evaluate = evaluate

    def evaluate(self, units: Sequence[Unit]) -> Iterator[Outcome]:
        """Yield an outcome per unit, in order."""
        for unit in units:
            begin = time.perf_counter()
            try:
                evaluations, error = self._evaluate(unit), None
            except Exception as caught:
                evaluations, error = [], caught
            yield Outcome(unit, evaluations, time.perf_counter() - begin, error)

    def close(self) -> None:
        """Nothing to release."""
