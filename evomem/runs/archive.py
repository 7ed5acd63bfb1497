"""Run: the search's memory of candidates that may become the winner."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomem.drivers.base import Population

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Finalist:
    """A vector that is re-evaluated on the `select` split, and where it comes from."""

    label: str
    vector: Array


@dataclass
class Archive:
    """The best candidates so far, and the distribution's mean at some generations.

    Attributes
    ----------
    top : how many candidates to remember.
    snapshots : generations after which the mean is remembered.
    best : (fitness, generation, place, vector), best first; of equals the older.
    means : (generation, mean).
    """

    top: int
    snapshots: frozenset[int]
    best: list[tuple[float, int, int, Array]] = field(default_factory=list)
    means: list[tuple[int, Array]] = field(default_factory=list)

    def update(self, population: Population, fitness: Array, mean: Array) -> None:
        """Take in a generation that was told: its candidates, their fitness, and the mean that followed."""
        entries = [
            (float(value), population.generation, place, population.vectors[place].copy())
            for place, value in enumerate(fitness)
            if math.isfinite(value)
        ]
        self.best = sorted(self.best + entries, key=lambda entry: (-entry[0], entry[1], entry[2]))[: self.top]
        if population.generation in self.snapshots:
            self.means.append((population.generation, mean.copy()))

    def finalists(self, mean: Array, start: Array) -> list[Finalist]:
        """Return the final mean, the start as a control, the best candidates, and the remembered means; none twice."""
        all_of_them = [
            Finalist("mean", mean),
            Finalist("start", start),
            *(Finalist(f"candidate {g + 1}/{place}", vector) for _, g, place, vector in self.best),
            *(Finalist(f"mean after {g + 1}", vector) for g, vector in self.means),
        ]
        distinct: dict[bytes, Finalist] = {}
        for finalist in all_of_them:
            distinct.setdefault(finalist.vector.tobytes(), finalist)
        return list(distinct.values())

    def chosen(self, scores: Array, sizes: Array) -> list[int]:
        """Return the indices of the finalists to report, the winner last: here the best alone, the first of equals.

        Parameters
        ----------
        scores, sizes : (finalists,) fitness and measured bytes on `select`. Without a finite score there is no winner.
        """
        finite = np.isfinite(scores)
        return [int(np.argmax(np.where(finite, scores, -np.inf)))] if finite.any() else []

    def state_dict(self) -> dict[str, Any]:
        """Return everything that an exact resume needs."""
        return {"best": list(self.best), "means": list(self.means)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.best, self.means = list(state["best"]), list(state["means"])


def evenly_spaced(generations: int, count: int) -> frozenset[int]:
    """Return ``count`` generations that part a search into ``count + 1`` equal parts."""
    return frozenset(round(generations * (i + 1) / (count + 1)) - 1 for i in range(count)) - {-1, generations - 1}
