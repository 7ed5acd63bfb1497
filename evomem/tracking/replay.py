"""Tracking: tell a tracker about a run after the fact, from its journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from evomem.errors import RunError
from evomem.tracking.base import GenerationRecord, Tracker


class RecordedRun(Protocol):
    """What is told of a run; `evomem.runs.open_run` returns one."""

    @property
    def folder(self) -> Path:
        """The run's folder."""

    @property
    def config(self) -> Any:
        """The resolved experiment, with ``resolved()`` and ``plan()``."""

    @property
    def result(self) -> Any:
        """What came out, with ``to_json()`` and ``lines()``; None until the run is finished."""

    def generations(self) -> Sequence[GenerationRecord]:
        """Return the finished generations in order."""


def replay(run: RecordedRun, tracker: Tracker) -> Mapping[str, Any]:
    """Tell a tracker what it would have heard while the run went on; return the summary that it was given.

    The run is only read and its lock is not taken: it may be running, finished or interrupted. Without a result the
    summary's ``status`` is ``unfinished``: a journal cannot tell a run that goes on from one that was killed.

    Raises
    ------
    RunError : the run has not finished a generation yet.
    """
    generations = run.generations()
    if not generations:
        raise RunError(f"{run.folder}: no generation is finished yet; there is nothing to tell")
    result = run.result  # before anything is told: a damaged result leaves no half-told tracker
    tracker.start(run.config.resolved(), run.config.plan()[-1].end, ())
    for generation in generations:
        tracker.log(generation)
    summary: dict[str, Any] = {"status": "unfinished"}
    if result is not None:
        tracker.artifact("winner", run.folder / "winner")
        summary = {"status": "finished", **result.to_json(), "lines": result.lines()}
    tracker.finish(summary)
    return summary
