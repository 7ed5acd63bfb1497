"""Run: the journal, an append-only file of JSON lines from which everything else can be made again.

Three kinds of lines: ``unit`` (an evaluated `Unit` with all its evaluations), ``generation`` (its summary) and
``event`` (start, resume, warning, failed attempt, finish).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evomem.evaluation.types import Evaluation, Step
from evomem.runs.files import disk_errors
from evomem.strict_json import as_float, to_json
from evomem.workers.base import Outcome

Record = dict[str, Any]


@dataclass
class Totals:
    """What a run has spent, counted apart; every line of the journal counts, also work that was done twice.

    Attributes
    ----------
    evaluations : candidates on samples, by phase (`Unit.phase`).
    tokens : tokens that the model processed for them.
    seconds : wall time of finished units.
    failed_attempts, failed_seconds : units whose evaluation raised, and their wall time.
    """

    evaluations: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    failed_attempts: int = 0
    failed_seconds: float = 0.0

    def add(self, record: Record) -> None:
        """Count a line of the journal."""
        if record["kind"] == "unit":
            count = self.evaluations.get(record["phase"], 0) + len(record["evaluations"])
            self.evaluations[record["phase"]] = count
            self.tokens += sum(int(evaluation["tokens"]) for evaluation in record["evaluations"])
            self.seconds += as_float(record["seconds"])
        elif record["kind"] == "event" and record["event"] == "attempt_failed":
            self.failed_attempts += 1
            self.failed_seconds += as_float(record["seconds"])


def unit_record(outcome: Outcome) -> Record:
    """Return the line of a finished unit."""
    unit = outcome.unit
    return {
        "kind": "unit",
        "key": unit.key,
        "phase": unit.phase,
        "generation": unit.generation,
        "candidates": unit.digest,
        "seconds": outcome.seconds,
        "evaluations": [evaluation.to_json() for evaluation in outcome.evaluations],
    }


def evaluations_of(record: Record) -> list[Evaluation]:
    """Return the evaluations of a unit's line, exactly as they were written."""
    return [
        Evaluation(
            sample=entry["sample"],
            loglik=as_float(entry["loglik"]),
            exact=None if entry["exact"] is None else as_float(entry["exact"]),
            slots=as_float(entry["slots"]),
            bytes_peak=as_float(entry["bytes_peak"]),
            bytes_mean=as_float(entry["bytes_mean"]),
            tokens=int(entry["tokens"]),
            seconds=as_float(entry["seconds"]),
            heads=None if entry.get("heads") is None else tuple(tuple(map(float, row)) for row in entry["heads"]),
            steps=None if entry.get("steps") is None else tuple(map(Step.from_json, entry["steps"])),
            oracle=None if entry.get("oracle") is None else {k: as_float(v) for k, v in entry["oracle"].items()},
        )
        for entry in record["evaluations"]
    ]


def read_journal(path: Path) -> Iterator[Record]:
    """Yield the lines of a journal; damaged ones (a torn last line after a kill) are left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            record = _parse(line)
            if record is not None:
                yield record


def _parse(line: bytes) -> Record | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "kind" in record else None


class Journal:
    """The journal of a run that is going on.

    Opening it repairs a torn last line by cutting it off; ``repaired`` says how many bytes that were, ``damaged`` which
    lines in the middle cannot be read (they are left out, and what they held is evaluated again).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.totals = Totals()
        self.damaged: list[int] = []
        self.repaired = 0
        with disk_errors(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self._size = self._repair()

    def _repair(self) -> int:
        """Cut off what follows the last newline; return the size."""
        size = good = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                size += len(line)
                if not line.endswith(b"\n"):
                    break
                good = size
                record = _parse(line)
                if record is None:
                    self.damaged.append(number)
                else:
                    self.totals.add(record)
        if good < size:
            self.repaired = size - good
            os.ftruncate(self._file, good)
        return good

    def append(self, record: Record) -> None:
        """Write a line with one system call, so that a kill leaves it whole or torn at the end of the file.

        Raises
        ------
        RunError : the disk is full; the line is taken back and the run can be resumed.
        """
        line = (to_json(record) + "\n").encode()
        with disk_errors(self.path):
            written = 0
            try:
                while written < len(line):
                    written += os.write(self._file, line[written:])
            except OSError:
                if written:
                    os.ftruncate(self._file, self._size)
                raise
        self._size += len(line)
        self.totals.add(record)

    def event(self, event: str, **fields: Any) -> None:
        """Write an event with the time of day (seconds since 1970, UTC)."""
        self.append({"kind": "event", "event": event, "time": time.time(), **fields})

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        with disk_errors(self.path):
            os.fsync(self._file)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
