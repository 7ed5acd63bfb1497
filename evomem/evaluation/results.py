"""Evaluation: finished samples of a comparison, one line each, so that a killed one goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from evomem.errors import ConfigError, EvomemError
from evomem.evaluation.types import Evaluation
from evomem.strict_json import as_float, to_json

_NUMBERS = ("loglik", "slots", "bytes_peak", "bytes_mean", "seconds")


class SampleFile:
    """An append-only JSONL file: a first line that says what is measured, then one line a sample.

    A line holds the number of the place, the sample's id, and one evaluation per manager in the order of the first
    line. A last line that a kill has torn is cut off.

    Parameters
    ----------
    path : None keeps nothing.
    what : what the measurements depend on.

    Raises
    ------
    ConfigError : the file holds another comparison.
    """

    def __init__(self, path: Path | None, what: Mapping[str, Any]) -> None:
        self.path = path
        self._what = to_json(dict(what))
        self._known: dict[tuple[int, str], list[Evaluation]] = {}
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        if self.path is None:
            return self
        good = self._read(self.path) if self.path.exists() else 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
            self._file.truncate(good)
        except OSError as error:
            raise EvomemError(f"{self.path}: cannot be written: {error.strerror}") from None
        if good == 0:
            self._write(self._what)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def get(self, place: int, sample: str) -> list[Evaluation] | None:
        """Return the evaluations of a sample that is finished, or None."""
        return self._known.get((place, sample))

    def put(self, place: int, sample: str, evaluations: Sequence[Evaluation]) -> None:
        """Keep a finished sample."""
        if self._file is not None:
            self._write(to_json({"place": place, "sample": sample, "evaluations": [e.to_json() for e in evaluations]}))

    def _write(self, line: str) -> None:
        file = self._file
        if file is None:
            return
        try:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise EvomemError(
                f"{self.path}: cannot be written: {error.strerror}; the samples before this one are kept"
            ) from None

    def _read(self, path: Path) -> int:
        """Read what is there; return the length of its whole lines in bytes."""
        content = path.read_bytes()
        good = content.rfind(b"\n") + 1
        lines = content[:good].decode("utf-8", errors="replace").splitlines()
        if lines and json.loads(to_json(_parsed(lines[0], path))) != json.loads(self._what):
            raise ConfigError(
                f"{path}: holds samples of another comparison (other managers, model, task or settings); "
                "delete it, or choose another file"
            )
        for line in lines[1:]:
            record = _parsed(line, path)
            evaluations = [_evaluation(data) for data in record["evaluations"]]
            self._known[record["place"], record["sample"]] = evaluations
        return good


def _parsed(line: str, path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(line)
    except ValueError:
        raise ConfigError(f"{path}: a line is damaged; delete the file to begin again") from None
    return record


def _evaluation(data: Mapping[str, Any]) -> Evaluation:
    exact = data["exact"]
    numbers: dict[str, Any] = {name: as_float(data[name]) for name in _NUMBERS}
    return Evaluation(
        sample=data["sample"], exact=None if exact is None else as_float(exact), tokens=data["tokens"], **numbers
    )
