"""Run: the journal, an append-only file of JSON lines from which everything else can be made again.

Three kinds of lines: ``unit`` (an evaluated `Unit` with all its evaluations), ``generation`` (its summary) and
``event`` (start, resume, warning, failed attempt, finish). Each has a number and a checksum
(`evomem.files.checksummed_lines`): a line that was changed, lost, doubled or moved after it was written is noticed and
does not count.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evomem.errors import RunError
from evomem.evaluation.measurement import LOGLIK, Evaluation, Measurement
from evomem.files.atomic import disk_errors
from evomem.files.checksummed_lines import LineChecks, checksummed, whole_lines
from evomem.files.reading import open_regular
from evomem.files.strict_json import as_float
from evomem.tracking.base import logger
from evomem.workers.units import Outcome

try:
    import fcntl
except ModuleNotFoundError:  # not on this system; run.lock has to do
    fcntl = None  # type: ignore[assignment]

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
        "content": unit.sample.digest,
        "seconds": outcome.seconds,
        "evaluations": [evaluation.to_json() for evaluation in outcome.evaluations],
    }


def evaluations_of(record: Record, measurement: Measurement = LOGLIK) -> list[Evaluation]:
    """Return the evaluations of a unit's line, exactly as they were written; see `Evaluation.from_json`.

    measurement : what the unit asks for; lines of earlier versions do not say what their numbers per head are.
    """
    return [Evaluation.from_json(entry, measurement) for entry in record["evaluations"]]


def measured(record: Record) -> list[Record]:
    """Return what a unit's line says of its candidates that is the same whenever they are evaluated."""
    return [{k: v for k, v in one.items() if k not in ("seconds", "tokens")} for one in record["evaluations"]]


def read_journal(path: Path, *, report: bool = True) -> Iterator[Record]:
    """Yield the lines of a journal that count; what is wrong with the others is logged, if ``report``.

    A torn last line after a kill is left out without a word.

    Raises
    ------
    RunError : the file cannot be read.
    """
    if not os.path.lexists(path):
        return
    checks = LineChecks()
    with disk_errors(path, "read"), open_regular(path, RunError) as file:
        for line in whole_lines(file, path):
            record = _counted(checks, line)
            if record is not None:
                yield record
    for problem in checks.problems() if report else ():
        logger.warning("%s: %s", path, problem)


def _counted(checks: LineChecks, line: bytes) -> Record | None:
    record = checks.take(line)
    if record is not None and not _has_shape(record):
        checks.reject()
        return None
    return record


_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "unit": {
        "key": (str,),
        "phase": (str,),
        "generation": (int, type(None)),
        "candidates": (str,),
        "seconds": (int, float, str),
        "evaluations": (list,),
    },
    "generation": {"generation": (int,), "stage": (str,), "fitness": (list,)},
    "event": {"event": (str,)},
}
"""What every line of a kind has, and of which type."""

_EVENTS: dict[str, dict[str, tuple[type, ...]]] = {
    "chance": {"task": (str,), "passed": (bool,)},
    "quarantined": {"candidate": (str,)},
    "all_failed": {"phase": (str,), "generation": (int, type(None))},
    "attempt_failed": {"seconds": (int, float, str)},
    "identity": {"files": (dict,)},
    "chunk": {"chunk": (int,), "phase": (str, type(None)), "generation": (int, type(None))},
}
"""The same of events that are read again."""


def _has_shape(record: Record) -> bool:
    """Whether a line has what those who read it rely on."""
    fields = _FIELDS.get(str(record.get("kind")))
    if fields is None:
        return False
    if record["kind"] == "event":
        fields = fields | _EVENTS.get(str(record.get("event")), {})
    if not all(isinstance(record.get(name, ...), types) for name, types in fields.items()):
        return False
    if record["kind"] == "unit":
        evaluations = record["evaluations"]
        return all(isinstance(one, dict) and type(one.get("tokens")) is int for one in evaluations) and _number(
            record["seconds"]
        )
    if record.get("event") == "chunk":
        return int(record["chunk"]) >= 1
    return record.get("event") != "attempt_failed" or _number(record["seconds"])


def _number(value: Any) -> bool:
    try:
        as_float(value)
    except (ValueError, OverflowError):
        return False
    return True


class Journal:
    """The journal of a run that is going on; this process alone writes into it.

    Opening it repairs a torn last line by cutting it off.

    Raises
    ------
    RunError : another process has it open, or it cannot be written.

    Attributes
    ----------
    repaired : bytes of a torn last line that were cut off.
    checks : what is wrong with the lines; those that are damaged are left out, and what they held is evaluated again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.totals = Totals()
        self.checks = LineChecks()
        self.repaired = 0
        with disk_errors(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        status = os.fstat(self._file)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._file)
            raise RunError(f"{path}: is no regular file")
        self._identity = status.st_dev, status.st_ino
        try:
            self._lock()
            self._check_in_place()
            with disk_errors(path):
                self._size = self._repair()
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        """Keep others out by a lock on the open file itself: no name can be removed to get around it."""
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{self.path}: is in use by another process; wait or stop it first") from None
        except OSError:
            return  # a file system without locks; run.lock has to do

    def _check_in_place(self) -> None:
        """Raise `RunError` if the file that is written into is no longer the one in the folder."""
        try:
            there = os.stat(self.path)
        except OSError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != self._identity:
            raise RunError(
                f"{self.path}: was moved, removed or replaced while this process works with it. Nothing more is "
                "written; put it back and resume the run"
            )

    def _repair(self) -> int:
        """Cut off what follows the last newline; return the size."""
        good = 0
        with self.path.open("rb") as file:
            for line in whole_lines(file, self.path):
                good += len(line)
                record = _counted(self.checks, line)
                if record is not None:
                    self.totals.add(record)
        self.repaired = os.fstat(self._file).st_size - good
        if self.repaired:
            os.ftruncate(self._file, good)
        return good

    @property
    def lines(self) -> int:
        """Number of the last line."""
        return self.checks.number

    def append(self, record: Record) -> None:
        """Write a line with one system call, so that a kill leaves it whole or torn at the end of the file.

        Raises
        ------
        RunError : the disk is full (the line is taken back and the run can be resumed), or somebody has moved the file.
        """
        self._check_in_place()
        line = checksummed(record, self.checks.number + 1)
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
        self.checks.number += 1
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
