"""Workers: the pool that evaluates in this process, one unit after the other."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from evomem.evaluation.measurement import Evaluation
from evomem.workers.quarantine import quarantined_in, unmeasured
from evomem.workers.ray.worker import alone
from evomem.workers.units import Evaluate, Outcome, Unit


class LocalPool:
    """Evaluates in process.

    Parameters
    ----------
    evaluate : what to do with a unit.
    attempts : how often a unit that raises is tried.
    quarantined : candidates that are not to be evaluated (`evomem.workers.quarantine.candidate_digest`): they would end
        this process.
    """

    def __init__(self, evaluate: Evaluate, attempts: int = 1, quarantined: Iterable[str] = ()) -> None:
        self._evaluate = evaluate
        self._attempts = attempts
        self._quarantined = frozenset(quarantined)

    def evaluate(self, units: Sequence[Unit]) -> Iterator[Outcome]:
        """Yield outcomes in order; units that raised are tried again after the others."""
        waiting = deque((unit, 1) for unit in units)
        while waiting:
            unit, attempt = waiting.popleft()
            begin = time.perf_counter()
            try:
                evaluations, error = self._careful(unit), None
            except Exception as caught:
                evaluations, error = [], caught
            again = error is not None and attempt < self._attempts
            if again:
                waiting.append((unit, attempt + 1))
            yield Outcome(unit, evaluations, time.perf_counter() - begin, error, again)

    def _careful(self, unit: Unit) -> list[Evaluation]:
        """Evaluate a unit; if one of its candidates is quarantined, each of the others alone, as `RayPool` does it."""
        left_out = quarantined_in(unit, self._quarantined)
        if not left_out:
            return self._evaluate(unit)
        places = range(unit.candidates)
        return [unmeasured(unit) if p in left_out else self._evaluate(alone(unit, p))[p] for p in places]

    def close(self) -> None:
        """Nothing to release."""
