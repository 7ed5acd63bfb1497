"""Run: a search on two objectives, score and measured bytes, and the front of managers that comes out of it.

::

    front.json        the members, the smallest first, with their scores on `select` and `sealed` (`Member`)
    front/00 .. NN    the members as plug-ins
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomem import drivers
from evomem.drivers.base import Fitness, Population
from evomem.errors import ConfigError, RunError
from evomem.files.strict_json import as_float, to_json
from evomem.runs.archive import Finalist
from evomem.runs.config import ExperimentConfig
from evomem.runs.experiment_parts import Budget
from evomem.runs.folder_reading import of_shape, read_json
from evomem.runs.result import Score

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

MEMBERS = 12
"""Members of a front that are reported and exported, at most."""


def wants_bytes(config: ExperimentConfig) -> bool:
    """Whether a driver of the experiment learns from the measured bytes too."""
    return any(drivers.uses(stage.driver.name, "costs") for stage in config.plan())


def check_bytes_may_vary(config: ExperimentConfig) -> None:
    """Raise `ConfigError` if the stages set the budget, which such a search is about, or name another driver."""
    plan = config.plan()
    fixed = [stage.name for stage in plan if stage.budgets]
    name = next((stage.driver.name for stage in plan if drivers.uses(stage.driver.name, "costs")), None)
    if name is not None and plan[-1].since:
        raise ConfigError(
            f"stages: driver: driver {name!r} looks for a front, and others look for one manager; a search is for one "
            "or the other: give all stages the same driver"
        )
    if name is not None and fixed:
        raise ConfigError(
            f"experiment: budgets: driver {name!r} looks for the best score at every size of the memory, "
            f"and {fixed[0]} gives all candidates the same; leave budgets out and let the space vary the budget "
            "(search_spaces/feature_scorer_pareto.yaml)"
        )


def preflight_bytes(fitness: Fitness) -> str | None:
    """Return a warning if the candidates of the first generation all hold the same memory, else None."""
    sizes = np.zeros(0) if fitness.costs is None else fitness.costs[np.isfinite(fitness.costs)]
    if len(sizes) < 2 or np.ptp(sizes) > 1e-6 * sizes.max():
        return None
    return (
        f"pre-flight: all candidates hold {sizes[0]:,.0f} bytes: there is no front to find. Let the space vary what a "
        "manager keeps, for example its budget (search_spaces/feature_scorer_pareto.yaml)"
    )


# ---- fronts ---------------------------------------------------------------------------------------------------------


def front_of(scores: Array, sizes: Array) -> Indices:
    """Return the indices of the candidates that no other dominates, the smallest first.

    One dominates another if it is at least as good in both (score larger, bytes smaller) and better in one. Of equal
    candidates the first counts; one whose score or bytes are not finite is never on the front.

    Parameters
    ----------
    scores, sizes : (candidates,) fitness and measured bytes.
    """
    front: list[int] = []
    best = -math.inf
    for index in np.lexsort((np.arange(len(scores)), -scores, sizes)).tolist():  # by bytes, then score, then index
        if np.isfinite(sizes[index]) and np.isfinite(scores[index]) and scores[index] > best:
            front.append(index)
            best = float(scores[index])
    return np.array(front, dtype=np.int64)


def well_spread(scores: Array, sizes: Array, count: int) -> Indices:
    """Return ``count`` indices into a front that is sorted by bytes, both ends among them, the most crowded left out.

    One after the other, the member goes whose neighbours are the nearest to each other: the crowding distance (Deb et
    al. 2002, section III-B), with each objective in units of its range, the bytes on a logarithmic scale.
    """
    if count == 1:
        return np.array([len(scores) - 1], dtype=np.int64)
    kept = list(range(len(scores)))
    objectives = np.stack([scores, np.log(np.maximum(sizes, 1.0))], axis=1)
    span = np.ptp(objectives, axis=0)
    objectives = objectives / np.where(span > 0, span, 1.0)
    while len(kept) > max(count, 2):
        points = objectives[kept]
        crowding = np.abs(points[2:] - points[:-2]).sum(axis=1)
        del kept[1 + int(np.argmin(crowding))]
    return np.array(kept, dtype=np.int64)


@dataclass(frozen=True)
class Candidate:
    """A vector that was measured in a generation.

    Attributes
    ----------
    score, size : fitness and measured bytes, as measured there.
    generation, place : where it was asked for.
    """

    score: float
    size: float
    generation: int
    place: int
    vector: Array


@dataclass
class FrontArchive:
    """The front over all generations, and the front of the last one.

    Scores of different generations are on different samples: the archive keeps what was lucky, too. Hence the last
    generation's own front, all on the same samples, comes first, and all of both are measured again on `select`.

    Attributes
    ----------
    top : members of the archive at most, well spread.
    best : the archive.
    last : the front of the newest generation.
    """

    top: int
    best: list[Candidate] = field(default_factory=list)
    last: list[Candidate] = field(default_factory=list)

    def update(self, population: Population, fitness: Array, sizes: Array) -> None:
        """Take in a generation: its candidates, their fitness and bytes (candidates,)."""
        new = [
            Candidate(float(fitness[n]), float(sizes[n]), population.generation, n, vector.copy())
            for n, vector in enumerate(population.vectors)
        ]
        # A survivor that was measured again: what is newest counts.
        known = {candidate.vector.tobytes() for candidate in new}
        self.last = _front(new, len(new))
        older = [candidate for candidate in self.best if candidate.vector.tobytes() not in known]
        self.best = _front(older + self.last, self.top)

    def finalists(self, mean: Array, start: Array) -> list[Finalist]:
        """Return both fronts and the start as a control; none twice."""
        known = [Finalist(f"candidate {c.generation + 1}/{c.place}", c.vector) for c in self.last + self.best]
        distinct: dict[bytes, Finalist] = {}
        for finalist in [Finalist("start", start), *known]:
            distinct.setdefault(finalist.vector.tobytes(), finalist)
        return list(distinct.values())

    def chosen(self, scores: Array, sizes: Array) -> list[int]:
        """Return the finalists to report: the front of those on `select`, well spread; the best score comes last."""
        front = front_of(scores, sizes)
        chosen: list[int] = front[well_spread(scores[front], sizes[front], MEMBERS)].tolist()
        return chosen

    def state_dict(self) -> dict[str, Any]:
        """Return everything that an exact resume needs."""
        return {"best": list(self.best), "last": list(self.last)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.best, self.last = list(state["best"]), list(state["last"])


def _front(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    scores = np.array([candidate.score for candidate in candidates])
    sizes = np.array([candidate.size for candidate in candidates])
    front = front_of(scores, sizes)
    if not count or not len(front):
        return []
    return [candidates[n] for n in front[well_spread(scores[front], sizes[front], count)]]


# ---- what a run reports ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """A manager on the front.

    Attributes
    ----------
    place : 0 is the smallest; its plug-in is ``front/00``.
    label : where it comes from: ``candidate 12/3`` or ``start``.
    budget : the manager's own; None if it has none.
    select, sealed : scores on the two splits.
    interval : 95 % bootstrap interval of the log-likelihood on `sealed`; None with one sample.
    """

    place: int
    label: str
    budget: Budget | None
    select: Score
    sealed: Score
    interval: tuple[float, float] | None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON-serialisable dictionary."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Member:
        """Return the member that `to_json` wrote."""
        interval = data["interval"]
        return cls(
            place=data["place"],
            label=data["label"],
            budget=data["budget"],
            select=Score.from_json(data["select"]),
            sealed=Score.from_json(data["sealed"]),
            interval=None if interval is None else (as_float(interval[0]), as_float(interval[1])),
        )


def plugin_folder(run: Path, place: int) -> Path:
    """Return the folder of a member's plug-in."""
    return run / "front" / f"{place:02d}"


def front_json(members: Sequence[Member]) -> bytes:
    """Return the contents of ``front.json``, a member a line."""
    return ("[\n" + ",\n".join(to_json(member.to_json()) for member in members) + "\n]\n").encode()


def read_front(run: Path) -> list[Member]:
    """Return the front of a run, the smallest member first; nothing if the run has none.

    Raises
    ------
    RunError : ``front.json`` is damaged.
    """
    path = run / "front.json"
    if not path.exists():
        return []
    cure = "delete result.json and resume the run"
    with of_shape(path, cure):
        members = [Member.from_json(data) for data in read_json(path, cure)]
        if [member.place for member in members] != list(range(len(members))):
            raise ValueError("places of its members")
    return members


def member_of(run: Path, place: int | None, size: float | None) -> Member:
    """Return a member by its place, or the largest whose measured bytes on `sealed` are at most ``size``.

    Raises
    ------
    RunError : the run has no front, no such place, or no member as small.
    """
    members = read_front(run)
    if not members:
        raise RunError(f"{run}: has no front; only a run of a driver like nsga2 has one, when it is finished")
    if place is not None:
        if not 0 <= place < len(members):
            raise RunError(f"{run}: the front has places 0 to {len(members) - 1}, not {place}")
        return members[place]
    fitting = [member for member in members if size is not None and member.sealed.bytes_mean <= size]
    if not fitting:
        smallest = min(member.sealed.bytes_mean for member in members)
        raise RunError(f"{run}: no member fits in {size:,.0f} bytes; the smallest holds {smallest:,.0f}")
    return max(fitting, key=lambda member: member.sealed.bytes_mean)
