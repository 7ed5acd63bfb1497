"""Run: what came out of a search."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomem.bounds import GENERATIONS, LISTED
from evomem.errors import RunError
from evomem.files.atomic import write_atomically
from evomem.files.checksummed_lines import LineChecks, checksummed
from evomem.files.reading import read_bytes
from evomem.files.strict_json import as_float, shown
from evomem.runs.candidates import Row
from evomem.runs.folder_reading import FILE, of_shape, read_numbers, read_object
from evomem.runs.journal import read_journal

_VECTOR = "winner/vector.npy"
_MOST = LISTED * GENERATIONS


@dataclass(frozen=True)
class Score:
    """One candidate on the samples of one split.

    Attributes
    ----------
    contexts : samples, over all tasks.
    fitness : as the search measures it (weights, price, normalisation).
    loglik, exact, slots, bytes_mean, bytes_peak : means over samples and budgets; exact is None where nothing was
        generated.
    error : standard error of `loglik` over the samples; NaN for one sample.
    """

    contexts: int
    fitness: float
    loglik: float
    exact: float | None
    slots: float
    bytes_mean: float
    bytes_peak: float
    error: float

    @classmethod
    def of(cls, fitness: float, rows: Sequence[Row], candidate: int) -> Score:
        """Return the score of one candidate, by its index in the rows' evaluations."""
        evaluations = [row.evaluations[candidate] for row in rows]
        exact = [evaluation.exact for evaluation in evaluations if evaluation.exact is not None]
        logliks = by_sample(rows, candidate)
        count = len(logliks)
        with np.errstate(invalid="ignore"):  # a likelihood may be -inf
            deviation = float(np.std(logliks, ddof=1)) if count > 1 else math.nan
        return cls(
            contexts=count,
            fitness=fitness,
            loglik=_mean(logliks),
            exact=_mean(exact) if exact else None,
            slots=_mean([as_float(evaluation.slots) for evaluation in evaluations]),
            bytes_mean=_mean([as_float(evaluation.bytes_mean) for evaluation in evaluations]),
            bytes_peak=_mean([as_float(evaluation.bytes_peak) for evaluation in evaluations]),
            error=deviation / math.sqrt(count),
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Score:
        """Return what ``asdict`` and strict JSON made of a score."""
        numbers = {key: as_float(value) for key, value in data.items() if key not in ("contexts", "exact")}
        exact = None if data["exact"] is None else as_float(data["exact"])
        return cls(contexts=int(data["contexts"]), exact=exact, **numbers)


def by_sample(rows: Sequence[Row], candidate: int) -> list[float]:
    """Return the log-likelihood on every sample, of one candidate, by its index in the rows' evaluations.

    Budgets of the same sample are no independent measurements: they are averaged.
    """
    samples: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        evaluation = row.evaluations[candidate]
        samples.setdefault((row.task.label, evaluation.sample), []).append(as_float(evaluation.loglik))
    return [_mean(values) for values in samples.values()]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True)
class RunResult:
    """The end of a search.

    Attributes
    ----------
    folder : of the run.
    winner : where the winner comes from: ``mean``, ``start``, ``candidate 12/3``, ``mean after 40``.
    vector : (dim,) of the winner.
    generations : that were told.
    stopped : why the driver stopped before the planned end, or None.
    finalists : scores on `select` by label, the winner among them.
    train, select, sealed : the winner's scores; ``train`` is on contexts that the search has used.
    spent : evaluations by phase, tokens, seconds, failed attempts (`evomem.runs.journal.Totals`).
    front : members of the front of which the winner has the best score (`evomem.runs.front`); 0: the search had one
        objective.
    files : digests of the run's files that a winner is made of, by their names.
    """

    folder: Path
    winner: str
    vector: NDArray[np.float64]
    generations: int
    stopped: str | None
    finalists: dict[str, Score]
    train: Score
    select: Score
    sealed: Score
    spent: dict[str, Any]
    front: int = 0
    files: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return everything but the vector and the folder, JSON-serialisable."""
        data = asdict(self)
        del data["vector"], data["folder"], data["files"]
        return data

    @classmethod
    def from_json(cls, folder: Path, data: Mapping[str, Any]) -> RunResult:
        """Return the result that a run folder holds."""
        result = cls(
            folder=folder,
            winner=data["winner"],
            vector=read_numbers(folder / "winner" / "vector.npy"),
            generations=data["generations"],
            stopped=data["stopped"],
            finalists={label: Score.from_json(score) for label, score in data["finalists"].items()},
            train=Score.from_json(data["train"]),
            select=Score.from_json(data["select"]),
            sealed=Score.from_json(data["sealed"]),
            spent=data["spent"],
            front=data.get("front", 0),
            files=dict(data.get("files") or {}),
        )
        result._check()
        return result

    def _check(self) -> None:
        """Raise `ValueError` for what no search ends with."""
        if repr(self.finalists.get(self.winner)) != repr(self.select):  # as text: NaN is NaN
            raise ValueError(f"its winner {shown(self.winner)} is none of its finalists, or not by these scores")
        counts = (self.generations, self.front, *(score.contexts for score in (self.train, self.select, self.sealed)))
        if not all(type(count) is int and 0 <= count <= _MOST for count in counts) or self.front > len(self.finalists):
            raise ValueError("a count of generations, contexts or members of the front is none")
        if not (self.stopped is None or isinstance(self.stopped, str)) or not isinstance(self.spent, dict):
            raise ValueError("stopped is a text or nothing, and spent an object")
        if not isinstance(self.spent.get("evaluations"), dict):
            raise ValueError("spent has no evaluations")

    def check_file(self, name: str) -> None:
        """Raise `RunError` if a file of the folder is not the one that the run ended with."""
        digest = self.files.get(name)
        if digest is not None and digest_of(self.folder / name) != digest:
            raise RunError(f"{self.folder / name}: is not the file that the run ended with; put it back")

    def lines(self) -> list[str]:
        """Return the result as text: the finalists, and what the winner lost from split to split."""
        text = self._finalist_lines() if not self.front else [self._front_line()]
        train, select, sealed = self.train.fitness, self.select.fitness, self.sealed.fitness
        text.append(
            f"winner's fitness: train {train:.4f}, select {select:.4f} ({select - train:+.4f}), "
            f"sealed {sealed:.4f} ({sealed - select:+.4f})"
        )
        spread = "" if math.isnan(self.sealed.error) else f" +- {self.sealed.error:.4f}"
        parts = [] if math.isnan(self.sealed.loglik) else [f"loglik {self.sealed.loglik:.4f}{spread}"]
        parts += [] if self.sealed.exact is None else [f"exact match {self.sealed.exact:.3f}"]
        parts += [f"{self.sealed.slots:.1f} slots a head", f"{self.sealed.bytes_mean / 1e6:.2f} MB"]
        text.append(f"sealed ({self.sealed.contexts} samples): {', '.join(parts)}")
        if self.winner == "start" and not self.front:
            text.append("no candidate was better than the start on select: the search has found nothing")
        return text

    def _finalist_lines(self) -> list[str]:
        finalists = sorted(self.finalists.items(), key=lambda item: -_order(item[1].fitness))
        lines = [f"select ({self.select.contexts} samples over all tasks):"]
        for label, score in finalists:
            mark = "  <- winner" if label == self.winner else ""
            likelihood = "" if math.isnan(score.loglik) else f"  loglik {score.loglik:8.4f}"
            lines.append(f"  {label:<20} fitness {score.fitness:8.4f}{likelihood}{mark}")
        return lines

    def _front_line(self) -> str:
        return (
            f"front: {self.front} of {len(self.finalists)} finalists, by score against measured bytes on select "
            f"({self.select.contexts} samples); the winner is the largest, {self.winner}"
        )


def digest_of(path: Path) -> str:
    """Return the short SHA-256 of a file of a run."""
    return hashlib.sha256(read_bytes(path, FILE, RunError)).hexdigest()[:16]


def write_result(result: RunResult, identity: Mapping[str, str]) -> None:
    """Write ``result.json``, sealed, with the digests of the files that the winner is made of."""
    files = {name: digest for name, digest in identity.items() if "/" in name}
    files[_VECTOR] = digest_of(result.folder / _VECTOR)
    write_atomically(result.folder / "result.json", checksummed({**result.to_json(), "files": files}, 1))


def read_result(folder: Path) -> RunResult | None:
    """Return the result that a run folder holds; None if the run is not finished.

    Raises
    ------
    RunError : it is damaged, or not as it was written.
    """
    path = folder / "result.json"
    if not os.path.lexists(path):
        return None
    cure = "delete it and resume the run, which chooses the winner again from its journal"
    data = read_object(path, cure)
    if "check" in data and LineChecks().take(path.read_bytes()) is None:
        raise RunError(f"{path}: is not as it was written (checksum); {cure}")
    with of_shape(path, cure):
        result = RunResult.from_json(folder, data)
        result.lines()  # what is shown of it has the types that it is shown by
    result.check_file(_VECTOR)
    if "check" not in data:
        with of_shape(path, cure):
            _check_journal(result, path, cure)
    return result


def _check_journal(result: RunResult, path: Path, cure: str) -> None:
    """Raise `RunError` if a result without a checksum, as an earlier evomem wrote it, is not the journal's."""
    journal = path.with_name("journal.jsonl")
    if not journal.is_file():
        return
    generations, winners = set(), []
    for record in read_journal(journal, report=False):
        if record["kind"] == "generation":
            generations.add(record["generation"])
        elif record["kind"] == "event" and record["event"] == "finish":
            winners.append(record["winner"])
    said = (result.winner, result.generations)
    known = (winners[-1] if winners else result.winner, len(generations))
    if said != known:
        raise RunError(
            f"{path}: is not as it was written: it says winner {shown(said[0])} after {said[1]} generations, the "
            f"journal {shown(known[0])} after {known[1]}; {cure}"
        )


def _order(fitness: float) -> float:
    return fitness if math.isfinite(fitness) else -math.inf
