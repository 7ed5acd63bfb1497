"""Workers: units until they have their outcome: who is to blame when workers die, and who is quarantined.

A unit is evaluated whole. If that kills its workers, the schedule tries its candidates one by one. There are two ways
out:

* One candidate, alone, kills its workers. It is quarantined, in this unit and in every other one. The others' numbers
  are those that they have alone.
* None does. Then the candidates are not to blame (somebody killed the processes, or the machine did), and the unit is
  evaluated whole once more, for a batch's numbers may depend on the company in their last digits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from evomem.errors import EvomemError, WorkerError
from evomem.evaluation.measurement import Evaluation
from evomem.workers.messages import Job, Piece, Quarantined, Result
from evomem.workers.units import Outcome, Unit, digest


class PieceWithdrawnError(EvomemError):
    """A piece is not evaluated any more: one of its candidates is quarantined, or nobody asks for its unit."""


@dataclass(eq=False)
class OpenUnit:
    """A unit that has no outcome yet.

    Attributes
    ----------
    unit : what is to be evaluated.
    seconds : wall time spent on it so far.
    whole_again : its candidates were tried one by one, none was to blame, and it is evaluated whole once more.
    evaluations : of candidates that were tried alone, by their index in the unit.
    messages : about quarantined candidates, for the user, by their index.
    """

    unit: Unit
    seconds: float = 0.0
    whole_again: bool = False
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    messages: dict[int, str] = field(default_factory=dict)


class OpenUnits:
    """The units of a pool, from being asked for to their outcome.

    Parameters
    ----------
    quarantined : `candidate_digest` of candidates that are quarantined from the beginning.
    """

    def __init__(self, quarantined: Iterable[str] = ()) -> None:
        self._quarantined = dict.fromkeys(quarantined, "before the run was resumed, it ended its workers")
        self._of_job: dict[str, tuple[OpenUnit, int | None]] = {}
        self._jobs = 0

    def add(self, units: Iterable[Unit]) -> list[Job]:
        """Return the jobs for units."""
        return [self._job(OpenUnit(unit), unit.key, None) for unit in units]

    def clear(self) -> None:
        """Drop all units; what comes of their jobs is ignored."""
        self._of_job.clear()

    def __len__(self) -> int:
        return len(self._of_job)

    def add_seconds(self, key: str, seconds: float = 0.0) -> tuple[Unit | None, float]:
        """Add wall time to a job's unit; return the unit and its time so far; None if it has its outcome already."""
        opened, _ = self._of_job.get(key, (None, None))
        if opened is None:
            return None, 0.0
        opened.seconds += seconds
        return opened.unit, opened.seconds

    def order(self, piece: Piece) -> tuple[Unit, int | None]:
        """Return what to send for a piece: a unit, and the index of its only candidate; None for all of them.

        Raises
        ------
        PieceWithdrawnError : one of its candidates is quarantined by now, or its unit was dropped.
        """
        if piece.key not in self._of_job:
            raise PieceWithdrawnError(f"{piece.key}: nobody asks for it any more")
        opened, only = self._of_job[piece.key]
        candidate = piece.candidate if only is None else only
        quarantined = quarantined_in(opened.unit, self._quarantined)
        if quarantined and (candidate is None or candidate in quarantined):
            raise PieceWithdrawnError(f"{piece.key}: a candidate is quarantined")
        return opened.unit, candidate

    def close(self, result: Result) -> tuple[Outcome | None, list[Job]]:
        """Take a job's result; return its unit's outcome if there is one now, and further jobs for the unit."""
        opened, candidate = self._of_job.pop(result.key, (None, None))
        if opened is None:
            return None, []
        if candidate is not None:
            return self._close_candidate(opened, candidate, result)
        if isinstance(result.error, PieceWithdrawnError):
            return self._take_apart(opened)
        if result.error is not None:
            return Outcome(opened.unit, [], opened.seconds, result.error), []
        if not result.isolated:
            return Outcome(opened.unit, result.value, opened.seconds), []
        if opened.unit.vectors is None and isinstance(result.value[0], Quarantined):
            lost = result.value[0]
            error = WorkerError(
                f"unit {opened.unit.key}: the full cache, which others are set against, cannot be evaluated: alone, it "
                f"ended its worker {lost.deaths} times ({lost.reason}). Is there memory enough for a worker?"
            )
            return Outcome(opened.unit, [], opened.seconds, error), []
        for index, value in enumerate(result.value):
            self._take(opened, index, value)
        if opened.messages or opened.whole_again:
            return self._outcome(opened)
        opened.whole_again = True
        return None, [self._job(opened, opened.unit.key, None)]

    def _close_candidate(self, opened: OpenUnit, candidate: int, result: Result) -> tuple[Outcome | None, list[Job]]:
        """Take the result of a job for one candidate."""
        if isinstance(result.error, PieceWithdrawnError):
            self._leave_out(opened, candidate)
            return self._outcome(opened)
        if result.error is not None:
            self._of_job = {key: entry for key, entry in self._of_job.items() if entry[0] is not opened}
            return Outcome(opened.unit, [], opened.seconds, result.error), []
        self._take(opened, candidate, result.value[0])
        return self._outcome(opened)

    def _take(self, opened: OpenUnit, candidate: int, value: Quarantined | list[Evaluation] | Evaluation) -> None:
        """Note what came of a candidate alone."""
        if isinstance(value, Quarantined):
            reason = f"alone, it ended its worker {value.deaths} times ({value.reason})"
            self._quarantined[candidate_digest(opened.unit, candidate)] = reason
            opened.messages[candidate] = _message(opened.unit, candidate, reason)
            opened.evaluations[candidate] = unmeasured(opened.unit)
        else:
            opened.evaluations[candidate] = value[0] if isinstance(value, list) else value

    def _leave_out(self, opened: OpenUnit, candidate: int) -> None:
        """Note that a candidate is quarantined without having been tried here."""
        reason = self._quarantined[candidate_digest(opened.unit, candidate)]
        opened.messages[candidate] = _message(opened.unit, candidate, f"elsewhere, {reason}")
        opened.evaluations[candidate] = unmeasured(opened.unit)

    def _take_apart(self, opened: OpenUnit) -> tuple[Outcome | None, list[Job]]:
        """Give every candidate that is not quarantined a job of its own."""
        for candidate in quarantined_in(opened.unit, self._quarantined):
            self._leave_out(opened, candidate)
        rest = [index for index in range(opened.unit.candidates) if index not in opened.evaluations]
        return self._outcome(opened)[0], [self._job(opened, f"{opened.unit.key}#{index}", index) for index in rest]

    def _outcome(self, opened: OpenUnit) -> tuple[Outcome | None, list[Job]]:
        """Return the outcome of a unit whose candidates are tried alone, once all of them are there."""
        if len(opened.evaluations) < opened.unit.candidates:
            return None, []
        evaluations = [opened.evaluations[index] for index in range(opened.unit.candidates)]
        quarantined = sorted(opened.messages)
        messages = tuple(opened.messages[index] for index in quarantined)
        digests = tuple(candidate_digest(opened.unit, index) for index in quarantined)
        return Outcome(opened.unit, evaluations, opened.seconds, quarantined=messages, digests=digests), []

    def _job(self, opened: OpenUnit, name: str, candidate: int | None) -> Job:
        self._jobs += 1
        key = f"{self._jobs}:{name}"
        self._of_job[key] = opened, candidate
        return Job(key, opened.unit.candidates if candidate is None else 1, affinity(opened.unit))


def affinity(unit: Unit) -> str:
    """Return the name of what units of the same sample share: its context."""
    return f"{unit.task}/{unit.sample.id}"


def candidate_digest(unit: Unit, candidate: int) -> str:
    """Return the short hash of one candidate of a unit, by its index, whatever it is measured on."""
    return digest(None if unit.vectors is None else unit.vectors[candidate : candidate + 1], unit.seeds[:0])


def quarantined_in(unit: Unit, quarantined: Collection[str]) -> list[int]:
    """Return the indices of a unit's candidates whose digests are among the quarantined ones."""
    if not quarantined:
        return []
    return [index for index in range(unit.candidates) if candidate_digest(unit, index) in quarantined]


def unmeasured(unit: Unit) -> Evaluation:
    """Return the evaluation of a candidate that cannot be evaluated: nothing was measured, the worst fitness."""
    return Evaluation(unit.sample.id)


def _message(unit: Unit, candidate: int, reason: str) -> str:
    return (
        f"candidate {candidate} of unit {unit.key} is quarantined: {reason}. It counts as the worst, the search goes on"
    )
