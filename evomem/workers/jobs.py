"""Workers: from units to a schedule's jobs and from its results to outcomes; who may not be evaluated again.

A unit is evaluated whole. If that kills its workers the schedule tries its candidates one by one, and there are two
ways out. Either one of them, alone, kills its workers: then it is quarantined, in this unit and in every other one, and
the others' numbers are those that they have alone. Or none does: then it was not the candidates (somebody killed the
processes, or the machine did), and the unit is evaluated whole once more, for a batch's numbers may depend on the
company in their last digits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from evomem.errors import EvomemError, WorkerError
from evomem.evaluation.measurement import Evaluation
from evomem.workers.messages import Job, Piece, Quarantined, Result
from evomem.workers.units import Outcome, Unit, digest


class Barred(EvomemError):
    """A piece is not to be evaluated any more: a candidate in it is quarantined."""


@dataclass(eq=False)
class Case:
    """A unit that has no outcome yet.

    Attributes
    ----------
    unit : what is to be evaluated.
    seconds : wall time spent on it so far.
    again : it was taken apart, nobody was found, and it is evaluated whole once more.
    alone : what its candidates gave alone, by place.
    told : of quarantined candidates, for the user, by place.
    """

    unit: Unit
    seconds: float = 0.0
    again: bool = False
    alone: dict[int, Evaluation] = field(default_factory=dict)
    told: dict[int, str] = field(default_factory=dict)


class Casebook:
    """The units of a pool, from being asked for to their outcome.

    Parameters
    ----------
    quarantined : `candidate_digest` of candidates that are quarantined from the beginning.
    """

    def __init__(self, quarantined: Iterable[str] = ()) -> None:
        self._quarantined = dict.fromkeys(quarantined, "before the run was resumed, it ended its workers")
        self._cases: dict[str, tuple[Case, int | None]] = {}
        self._opened = 0

    def open(self, units: Iterable[Unit]) -> list[Job]:
        """Return the jobs for units."""
        return [self._job(Case(unit), unit.key, None) for unit in units]

    def forget(self) -> None:
        """Drop all units; what comes of their jobs is ignored."""
        self._cases.clear()

    def __len__(self) -> int:
        return len(self._cases)

    def spent(self, key: str, seconds: float = 0.0) -> tuple[Unit | None, float]:
        """Add wall time to a job's unit; return it and its time so far; None if it has its outcome already."""
        case, _ = self._cases.get(key, (None, None))
        if case is None:
            return None, 0.0
        case.seconds += seconds
        return case.unit, case.seconds

    def order(self, piece: Piece) -> tuple[Unit, int | None]:
        """Return what to send for a piece: a unit, and the place of its only candidate or None.

        Raises
        ------
        Barred : one of its candidates is quarantined by now, or its unit is forgotten.
        """
        if piece.key not in self._cases:
            raise Barred(f"{piece.key}: nobody asks for it any more")
        case, own = self._cases[piece.key]
        place = piece.place if own is None else own
        places = barred(case.unit, self._quarantined)
        if places and (place is None or place in places):
            raise Barred(f"{piece.key}: a candidate is quarantined")
        return case.unit, place

    def close(self, result: Result) -> tuple[Outcome | None, list[Job]]:
        """Take a job's result; return its unit's outcome if there is one now, and further jobs for it."""
        case, place = self._cases.pop(result.key, (None, None))
        if case is None:
            return None, []
        if place is not None:
            return self._one(case, place, result)
        if isinstance(result.error, Barred):
            return self._apart(case)
        if result.error is not None:
            return Outcome(case.unit, [], case.seconds, result.error), []
        if not result.isolated:
            return Outcome(case.unit, result.value, case.seconds), []
        if case.unit.vectors is None and isinstance(result.value[0], Quarantined):
            lost = result.value[0]
            error = WorkerError(
                f"unit {case.unit.key}: the full cache, which others are set against, cannot be evaluated: alone, it "
                f"ended its worker {lost.deaths} times ({lost.reason}). Is there memory enough for a worker?"
            )
            return Outcome(case.unit, [], case.seconds, error), []
        for number, value in enumerate(result.value):
            self._take(case, number, value)
        if case.told or case.again:
            return self._outcome(case)
        case.again = True
        return None, [self._job(case, case.unit.key, None)]

    def _one(self, case: Case, place: int, result: Result) -> tuple[Outcome | None, list[Job]]:
        """Take the result of one candidate's own job."""
        if isinstance(result.error, Barred):
            self._bar(case, place)
            return self._outcome(case)
        if result.error is not None:
            self._cases = {key: entry for key, entry in self._cases.items() if entry[0] is not case}
            return Outcome(case.unit, [], case.seconds, result.error), []
        self._take(case, place, result.value[0])
        return self._outcome(case)

    def _take(self, case: Case, place: int, value: Quarantined | list[Evaluation] | Evaluation) -> None:
        """Note what came of a candidate alone."""
        if isinstance(value, Quarantined):
            reason = f"alone, it ended its worker {value.deaths} times ({value.reason})"
            self._quarantined[candidate_digest(case.unit, place)] = reason
            case.told[place] = _told(case.unit, place, reason)
            case.alone[place] = nothing(case.unit)
        else:
            case.alone[place] = value[0] if isinstance(value, list) else value

    def _bar(self, case: Case, place: int) -> None:
        """Note that a candidate is quarantined without having been tried here."""
        reason = self._quarantined[candidate_digest(case.unit, place)]
        case.told[place] = _told(case.unit, place, f"elsewhere, {reason}")
        case.alone[place] = nothing(case.unit)

    def _apart(self, case: Case) -> tuple[Outcome | None, list[Job]]:
        """Give every candidate that is not quarantined a job of its own."""
        for place in barred(case.unit, self._quarantined):
            self._bar(case, place)
        free = [place for place in range(case.unit.candidates) if place not in case.alone]
        return self._outcome(case)[0], [self._job(case, f"{case.unit.key}#{place}", place) for place in free]

    def _outcome(self, case: Case) -> tuple[Outcome | None, list[Job]]:
        """Return the outcome of a unit whose candidates are tried alone, once all of them are there."""
        if len(case.alone) < case.unit.candidates:
            return None, []
        evaluations = [case.alone[place] for place in range(case.unit.candidates)]
        places = sorted(case.told)
        told = tuple(case.told[place] for place in places)
        digests = tuple(candidate_digest(case.unit, place) for place in places)
        return Outcome(case.unit, evaluations, case.seconds, quarantined=told, digests=digests), []

    def _job(self, case: Case, name: str, place: int | None) -> Job:
        self._opened += 1
        key = f"{self._opened}:{name}"
        self._cases[key] = case, place
        return Job(key, case.unit.candidates if place is None else 1, affinity(case.unit))


def affinity(unit: Unit) -> str:
    """Return the name of what units of the same sample share: its context."""
    return f"{unit.task}/{unit.sample.id}"


def candidate_digest(unit: Unit, place: int) -> str:
    """Return the short hash of one candidate of a unit, whatever it is measured on."""
    return digest(None if unit.vectors is None else unit.vectors[place : place + 1], unit.seeds[:0])


def barred(unit: Unit, quarantined: Collection[str]) -> list[int]:
    """Return the places of quarantined candidates in a unit."""
    if not quarantined:
        return []
    return [place for place in range(unit.candidates) if candidate_digest(unit, place) in quarantined]


def nothing(unit: Unit) -> Evaluation:
    """Return the evaluation of a candidate that cannot be evaluated: nothing was measured, the worst fitness."""
    return Evaluation(unit.sample.id)


def _told(unit: Unit, place: int, reason: str) -> str:
    return f"candidate {place} of unit {unit.key} is quarantined: {reason}. It counts as the worst, the search goes on"
