"""Workers: the unit of work, some candidates on one sample, and the pool that does it."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from evomem.errors import ConfigError
from evomem.evaluation.measurement import LOGLIK, Evaluation, Measurement
from evomem.evaluation.store import Readings
from evomem.tasks.base import Sample


@dataclass(frozen=True)
class RolloutVectors:
    """What rollouts of one policy need besides its own vector; see `evomem.drivers.base.Population`.

    Attributes
    ----------
    behaviour, reference : (dim,) other policies; None: there is none.
    learns : (learned,) int64, the coordinates that gradients are wanted of; None: all.
    """

    behaviour: NDArray[np.float64] | None = None
    reference: NDArray[np.float64] | None = None
    learns: NDArray[np.int64] | None = None


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
    measurement : what is measured of them.
    rollouts : the other policies and coordinates of a measurement of rollouts; the candidates are then one policy.
    """

    key: str
    phase: str
    generation: int | None
    task: str
    sample: Sample
    vectors: NDArray[np.float64] | None
    seeds: NDArray[np.int64]
    budget: int | float | None = None
    measurement: Measurement = LOGLIK
    rollouts: RolloutVectors | None = None

    @property
    def candidates(self) -> int:
        """How many evaluations the unit gives."""
        return len(self.seeds)

    @property
    def digest(self) -> str:
        """Short hash of the candidates: a journal line counts only for the candidates that it was made with."""
        return digest(self.vectors, self.seeds)


def digest(vectors: NDArray[np.float64] | None, seeds: NDArray[np.int64]) -> str:
    """Return the short hash of candidates: vectors (candidates, dim), or None for the full cache, and their seeds."""
    content = seeds.tobytes() + (b"" if vectors is None else vectors.tobytes())
    return hashlib.sha256(content).hexdigest()[:16]


@dataclass(frozen=True)
class Outcome:
    """What came of a unit: evaluations, one per candidate in order, or the error of one attempt.

    Attributes
    ----------
    unit : what was evaluated.
    evaluations : one a candidate; empty with an error. A quarantined candidate's have no values.
    seconds : wall time of the attempt.
    error : what it raised.
    again : with an error: whether the pool tries once more by itself.
    quarantined : candidates that killed their worker whenever they were tried, as text for the user.
    digests : of these candidates: `evomem.workers.quarantine.candidate_digest`.
    """

    unit: Unit
    evaluations: list[Evaluation]
    seconds: float
    error: Exception | None = None
    again: bool = False
    quarantined: tuple[str, ...] = ()
    digests: tuple[str, ...] = ()


class WorkerPool(Protocol):
    """Evaluates units, in any order, and never raises for a unit: its error is in the outcome."""

    def evaluate(self, units: Sequence[Unit]) -> Iterator[Outcome]:
        """Yield an outcome per failed attempt, and in the end one per unit that is no more tried ``again``."""
        ...

    def close(self) -> None:
        """Release what the pool holds."""
        ...


Evaluate = Callable[[Unit], list[Evaluation]]
"""Evaluates a unit in the process that it is called in."""


@dataclass(frozen=True)
class Recipe:
    """How a process elsewhere makes its `Evaluate`.

    Attributes
    ----------
    parts : large and read-only (the weights): nested dicts, lists and tuples of numpy arrays and small values; shared
        once per machine.
    build : called in the worker with the parts and the store for contexts; pickled by cloudpickle.
    threads : processor threads of a worker's arithmetic.
    """

    parts: Mapping[str, Any]
    build: Callable[[Mapping[str, Any], Readings], Evaluate]
    threads: int = 1


_COUNT = "give a whole number, 0 for this process, or 'auto' for all cores"


@dataclass(frozen=True)
class WorkerOptions:
    """Where evaluations happen. Nothing here moves a result: it may change between a run and its resumption.

    Attributes
    ----------
    count : worker processes; 0: this process; None: as many as there is room for.
    address : of a running Ray cluster ("auto", "HOST:PORT"); None: Ray is started on this machine, for this run.
    cpus : processor cores that a worker asks of Ray; None: as many as it has threads.
    gpus : GPUs that a worker asks of Ray; None: one each if the cluster has GPUs.
    timeout : seconds after which a worker that has not answered is taken for hanging; None: judged by the others.
    insecure : a cluster that asks for no token, where whoever reaches it can run code, is joined with a warning instead
        of refused.

    Raises
    ------
    ConfigError : a number is out of range, or none.
    """

    count: int | None = 0
    address: str | None = None
    cpus: float | None = None
    gpus: float | None = None
    timeout: float | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers that no pool can be made of."""
        if self.count is not None and (type(self.count) is not int or self.count < 0):
            raise ConfigError(f"workers: {self.count!r}: {_COUNT}")
        for name, smallest in (("cpus", "more than 0"), ("gpus", "at least 0"), ("timeout", "more than 0")):
            value = getattr(self, name)
            if value is None:
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not (value > 0 or (value == 0 and name == "gpus")) or math.isinf(value):
                raise ConfigError(f"workers: {name} {value!r}: give a number, {smallest}")

    @classmethod
    def of(cls, workers: int | str | WorkerOptions | None) -> WorkerOptions:
        """Return options by what a user writes: a number of processes, ``auto`` or None for all cores, or options.

        Raises
        ------
        ConfigError : it is none of these.
        """
        if isinstance(workers, WorkerOptions):
            return workers
        if isinstance(workers, str):
            if workers != "auto":
                raise ConfigError(f"workers: {workers!r}: {_COUNT}")
            return cls(count=None)
        return cls(count=workers)


def cores() -> int:
    """Return how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
