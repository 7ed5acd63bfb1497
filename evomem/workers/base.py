"""Evaluation: the unit of work, some candidates on one sample, and the pool that does it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from evomem.evaluation.types import Evaluation
from evomem.tasks.base import Sample


@dataclass(frozen=True)
class Unit:
    """Some candidates on one sample: a pure function of its fields, wherever and whenever it is evaluated.

    Attributes
    ----------
    key : unique within a run, the same when the run is repeated: phase, generation, task, sample, budget, chunk.
    phase : what the evaluation is for: ``train``, ``reference``, ``select``, ``check``, ``sealed``.
    generation : counted from 0; None outside the search proper.
    task : name of the task in the evaluator's table.
    sample : the sample.
    vectors : (candidates, dim) float64; None: the full cache, as a reference.
    seeds : (candidates,) int64 sampling seeds.
    budget : overrides the manager's; None leaves it.
    arguments : further arguments of the evaluator, such as ``{"exact": True}``.
    """

    key: str
    phase: str
    generation: int | None
    task: str
    sample: Sample
    vectors: NDArray[np.float64] | None
    seeds: NDArray[np.int64]
    budget: int | float | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def candidates(self) -> int:
        """How many evaluations the unit gives."""
        return len(self.seeds)

    @property
    def digest(self) -> str:
        """Short hash of the candidates: a journal line counts only for the candidates that it was made with."""
        content = self.seeds.tobytes() + (b"" if self.vectors is None else self.vectors.tobytes())
        return hashlib.sha256(content).hexdigest()[:16]


@dataclass(frozen=True)
class Outcome:
    """What came of a unit: evaluations, one per candidate in order, or the error."""

    unit: Unit
    evaluations: list[Evaluation]
    seconds: float
    error: Exception | None = None


class WorkerPool(Protocol):
    """Evaluates units, in any order, and never raises for a unit: its error is in the outcome."""

    def evaluate(self, units: Sequence[Unit]) -> Iterator[Outcome]:
        """Yield an outcome per unit as it is finished."""
        ...

    def close(self) -> None:
        """Release what the pool holds."""
        ...
