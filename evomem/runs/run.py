"""Run: a run folder to look at: configuration, journal, generations, winner."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from evomem.errors import RunError
from evomem.files.reading import is_file
from evomem.managers.base import MemoryManager
from evomem.runs.config import ExperimentConfig
from evomem.runs.folder_reading import read_config
from evomem.runs.journal import Record, Totals, read_journal
from evomem.runs.result import RunResult, read_result
from evomem.runs.resume import finished_generations
from evomem.runs.start import STATE, stored_space
from evomem.search_space.space import SearchSpace
from evomem.tracking.base import GenerationRecord
from evomem.validation import validate


@dataclass(frozen=True)
class Run:
    """A run on disk, running or finished; only read, so that it can be looked at while a process works in it.

    Attributes
    ----------
    folder : of the run.
    config : the resolved experiment.
    """

    folder: Path
    config: ExperimentConfig

    def records(self) -> Iterator[Record]:
        """Yield the journal's lines."""
        return read_journal(self.folder / "journal.jsonl")

    def generations(self) -> list[GenerationRecord]:
        """Return the finished generations in order."""
        return list(finished_generations(self.records()).values())

    def totals(self) -> Totals:
        """Return what the run has spent so far."""
        totals = Totals()
        for record in self.records():
            totals.add(record)
        return totals

    @property
    def result(self) -> RunResult | None:
        """The result of a finished run, or None."""
        return read_result(self.folder)

    @cached_property
    def space(self) -> SearchSpace:
        """The search space, with the tensors that the run started from."""
        path = self.folder / STATE
        if not path.exists():
            raise RunError(f"{self.folder}: the run has not begun to search yet")
        result = self.result
        if result is not None:
            result.check_file(STATE)
        return stored_space(self.config, path)

    @property
    def winner_vector(self) -> NDArray[np.float64]:
        """(dim,) the winner; raises `RunError` if the run is not finished."""
        return self._finished().vector

    @property
    def winner(self) -> MemoryManager:
        """The winner, at its plug-in's budget; raises `RunError` if the run is not finished."""
        manager = self.space.decode(self._finished().vector)
        budgets = self.config.plan()[-1].budgets
        return manager.with_options(budget=budgets[0]) if budgets else manager

    @property
    def plugin(self) -> Path:
        """Folder of the winner's plug-in; raises `RunError` if the run is not finished."""
        self._finished()
        return self.folder / "winner" / "plugin"

    def require_winner(self, manager: MemoryManager) -> None:
        """Raise `RunError` unless a manager has the winner's numbers, up to rounding; a plug-in may be exchanged."""
        expected, actual = self.winner.state_dict(), manager.state_dict()
        if expected.keys() != actual.keys() or not all(
            actual[name].shape == value.shape
            and torch.allclose(actual[name].double(), value.double(), rtol=1e-5, atol=1e-7, equal_nan=True)
            for name, value in expected.items()
        ):
            raise RunError(
                f"{self.folder}: winner/plugin and winner/vector.npy are not the same manager: one of them has been "
                "exchanged. Put it back, or delete result.json and resume the run, which writes both again"
            )

    def _finished(self) -> RunResult:
        result = self.result
        if result is None:
            raise RunError(f"{self.folder}: the run is not finished and has no winner yet; resume it first")
        return result


def open_run(folder: str | Path) -> Run:
    """Return the run in a folder; raise `RunError` if there is none."""
    folder = Path(folder)
    path = folder / "config.yaml"
    if not is_file(path):
        raise RunError(f"{folder}: is no run folder (there is no config.yaml in it)")
    return Run(folder, validate(ExperimentConfig, read_config(path), str(path)))
