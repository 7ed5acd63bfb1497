"""Evaluation: finished samples of a comparison, one line each, so that a killed one goes on."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from evomem.errors import ConfigError, EvomemError
from evomem.evaluation.measurement import EXACT, Evaluation
from evomem.files.atomic import write_atomically
from evomem.files.checksummed_lines import LineChecks, checksummed, whole_lines
from evomem.files.reading import open_regular
from evomem.files.strict_json import to_json

logger = logging.getLogger("evomem")


class SampleFile:
    """An append-only JSONL file: a first line that says what is measured, then one line a sample.

    A line holds the number of the scenario (under ``place``), the sample's id, and one evaluation per manager in the
    order of the first line. A last line that a kill has torn is cut off. Lines have checksums
    (`evomem.files.checksummed_lines`): one that is not as it was written is left out with a warning, and its sample is
    measured again.

    Parameters
    ----------
    path : None keeps nothing.
    fingerprint : what the measurements depend on.
    finished : file of an earlier comparison. If it has this fingerprint, and there is nothing at ``path``, its samples
        are taken over, with a warning that says so.

    Raises
    ------
    ConfigError : the file holds another comparison.
    """

    def __init__(self, path: Path | None, fingerprint: Mapping[str, Any], finished: Path | None = None) -> None:
        self.path = path
        self._finished = finished
        self._fingerprint = dict(fingerprint)
        self._checks = LineChecks()
        self._known: dict[tuple[int, str], list[Evaluation]] = {}
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        if self.path is None:
            return self
        try:
            if self._finished is not None and not os.path.lexists(self.path):
                self._take_over(self._finished, self.path)
            good = self._read(self.path) if os.path.lexists(self.path) else 0
        except OSError as error:
            raise EvomemError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
            self._file.truncate(good)
        except OSError as error:
            raise EvomemError(f"{self.path}: cannot be written: {error.strerror}") from None
        if self._checks.number == 0:
            self._write(self._fingerprint)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def get(self, scenario: int, sample: str) -> list[Evaluation] | None:
        """Return the evaluations of a sample that is finished, or None."""
        return self._known.get((scenario, sample))

    def append(self, scenario: int, sample: str, evaluations: Sequence[Evaluation]) -> None:
        """Keep a finished sample."""
        if self._file is not None:
            self._write({"place": scenario, "sample": sample, "evaluations": [e.to_json() for e in evaluations]})

    def _write(self, record: dict[str, Any]) -> None:
        file = self._file
        if file is None:
            return
        try:
            file.write(checksummed(record, self._checks.number + 1))
            self._checks.number += 1
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise EvomemError(
                f"{self.path}: cannot be written: {error.strerror}; the samples before this one are kept"
            ) from None

    def _read(self, path: Path) -> int:
        """Read what is there; return the length of its whole lines in bytes."""
        good = 0
        with open_regular(path, EvomemError) as file:
            # Bytes, cut at newlines only: text may hold other characters that some take for the end of a line.
            for line in whole_lines(file, path):
                first, record = good == 0, self._checks.take(line)
                good += len(line)
                if first:
                    self._check_same(record, path)
                elif record is not None and not self._keep(record):
                    self._checks.reject()
        for problem in self._checks.problems():
            logger.warning("%s: %s; those samples are measured again", path, problem)
        return good

    def _take_over(self, finished: Path, path: Path) -> None:
        """Copy the file of an earlier comparison to ``path`` if it measured the same."""
        if not os.path.lexists(finished):
            return
        with open_regular(finished, EvomemError) as file:
            first = next(iter(whole_lines(file, finished)), b"")
        record = LineChecks().take(first)
        if record is None or record != self._expected(record):
            return
        write_atomically(path, finished.read_bytes())
        logger.warning(
            "%s: samples that were measured before are taken over, because rows at another price need no others; "
            "delete it to measure anew",
            finished,
        )

    def _expected(self, record: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return what the first line must say; a file from before samples had a digest has none."""
        expected: dict[str, Any] = json.loads(to_json(self._fingerprint))
        if record is not None and "samples" not in record:
            expected.pop("samples", None)
        return expected

    def _check_same(self, record: dict[str, Any] | None, path: Path) -> None:
        expected = self._expected(record)
        if record != expected:
            names = [] if record is None else [name for name in expected if record.get(name) != expected[name]]
            differs = "" if record is None else f" (its {', '.join(names)})"
            raise ConfigError(
                f"{path}: holds samples of another comparison{differs}: other managers, model, task, questions or "
                "settings; delete it, or choose another file"
            )

    def _keep(self, record: dict[str, Any]) -> bool:
        """Take in a finished sample; return whether the line is one."""
        try:
            scenario, sample = int(record["place"]), str(record["sample"])
            evaluations = [Evaluation.from_json(data, EXACT) for data in record["evaluations"]]
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            return False
        if len(evaluations) != len(self._fingerprint.get("managers", evaluations)):
            return False
        self._known[scenario, sample] = evaluations
        return True
