"""Tracking: the tracker protocol, four methods fed from the journal; a tracker that fails never stops a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

logger = logging.getLogger("evomem")


@dataclass(frozen=True)
class GenerationRecord:
    """One finished generation: a ``generation`` line of the journal.

    Attributes
    ----------
    generation : counted from 0.
    stage : name of the stage.
    fitness : (candidates,) larger is better, NaN = failed.
    best, mean, spread : largest, mean and standard deviation of those that did not fail.
    noise : standard error of a candidate's fitness relative to the others'; NaN with one sample.
    failed : candidates without a finite fitness.
    sigma : step size of the driver after the generation, NaN if it has none.
    evaluations, tokens, seconds : spent by the run so far, finished units only.
    diagnostics : further numbers by name: of the driver's step, of a look at the oracle, and the mean at each budget.
    """

    generation: int
    stage: str
    fitness: tuple[float, ...]
    best: float
    mean: float
    spread: float
    noise: float
    failed: int
    sigma: float
    evaluations: int
    tokens: int
    seconds: float
    diagnostics: Mapping[str, float] = field(default_factory=dict)


class Tracker(Protocol):
    """Somebody who is told how a run goes."""

    def start(self, config: Mapping[str, Any], generations: int, done: Sequence[GenerationRecord]) -> None:
        """Begin: the resolved configuration, how many generations are planned, and those that a resumed run has."""
        ...

    def log(self, generation: GenerationRecord) -> None:
        """Take in a finished generation."""
        ...

    def artifact(self, name: str, path: Path) -> None:
        """Take in a file or folder that the run has made."""
        ...

    def finish(self, summary: Mapping[str, Any]) -> None:
        """End: ``status`` (finished, interrupted, failed) and, if finished, the result's numbers."""
        ...


class Trackers:
    """Several trackers as one; each failure is reported once, and its tracker is told nothing more.

    Parameters
    ----------
    trackers : in the order in which they are told.
    report : called with a message about a tracker that failed.
    """

    def __init__(self, trackers: Sequence[Tracker], report: Callable[[str], None]) -> None:
        self._trackers = list(trackers)
        self._report = report

    def start(self, config: Mapping[str, Any], generations: int, done: Sequence[GenerationRecord]) -> None:
        """Tell all."""
        self._tell(lambda tracker: tracker.start(config, generations, done))

    def log(self, generation: GenerationRecord) -> None:
        """Tell all."""
        self._tell(lambda tracker: tracker.log(generation))

    def artifact(self, name: str, path: Path) -> None:
        """Tell all."""
        self._tell(lambda tracker: tracker.artifact(name, path))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Tell all."""
        self._tell(lambda tracker: tracker.finish(summary))

    def _tell(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                name = type(tracker).__name__
                self._report(f"tracker {name} failed ({type(error).__name__}: {error}); the run goes on without it")
