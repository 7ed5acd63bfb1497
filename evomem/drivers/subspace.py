"""Driver: any driver on some coordinates of a vector, while the others stay where they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomem.drivers.base import Array, Driver, Fitness, Population, Stage

Coordinates = NDArray[np.int64]


class SubspaceDriver(Driver):
    """Shows the vectors of a driver of fewer dimensions as whole ones, with everything else frozen.

    It is not registered: a stage of a search that names what it searches puts its driver into one
    (`evomem.runs.config.StageConfig.searches`). What goes into a checkpoint is the inner driver's state.

    Parameters
    ----------
    inner : of ``len(coordinates)`` dimensions.
    coordinates : (searched,) ascending places of the inner driver's numbers in a whole vector.
    frozen : (dim,) the whole vector that the others keep.
    """

    def __init__(self, inner: Driver, coordinates: Coordinates, frozen: Array) -> None:
        # The base's constructor is about a search of its own, and all of that is the inner driver's.
        self.inner, self.coordinates, self.frozen = inner, coordinates, np.array(frozen, dtype=np.float64)
        self.dim, self.options, self.popsize = len(frozen), inner.options, inner.popsize
        self.uses = inner.uses  # type: ignore[misc]  # of the class elsewhere; here the inner driver's

    @property
    def name(self) -> str:  # type: ignore[override]
        """The inner driver's name."""
        return self.inner.name

    @property
    def generation(self) -> int:  # type: ignore[override]
        """Generations that have been told."""
        return self.inner.generation

    @property
    def diagnostics(self) -> Mapping[str, float]:  # type: ignore[override]
        """Numbers about the last step, by name."""
        return self.inner.diagnostics

    def whole(self, part: Array) -> Array:
        """Return whole vectors (..., dim) of searched parts (..., searched)."""
        vectors = np.broadcast_to(self.frozen, (*part.shape[:-1], self.dim)).copy()
        vectors[..., self.coordinates] = part
        return vectors

    def _part(self, vector: Array | None) -> Array | None:
        return None if vector is None else self.whole(vector)

    def _ask(self) -> Array:
        return self.ask().vectors

    def _tell(self, vectors: Array, fitness: Fitness) -> None:
        raise NotImplementedError("tell() is the inner driver's")

    def enter(self, stage: Stage) -> None:
        """Begin, or go on with, a stage; see `Driver.enter`."""
        self.inner.enter(stage)

    def ask(self) -> Population:
        """Return the next generation, as whole vectors; gradients are wanted of the searched coordinates only."""
        asked = self.inner.ask()
        return replace(
            asked,
            vectors=self.whole(asked.vectors),
            behaviour=self._part(asked.behaviour),
            reference=self._part(asked.reference),
            learns=self.coordinates if asked.learns is None else self.coordinates[asked.learns],
        )

    def tell(self, population: Population, fitness: Fitness) -> None:
        """Learn from what came of the population that was asked last; see `Driver.tell`."""
        self.inner.tell(replace(population, vectors=population.vectors[:, self.coordinates]), fitness)

    @property
    def mean(self) -> Array:
        """The distribution's centre (dim,), frozen numbers included."""
        return self.whole(self.inner.mean)

    @property
    def sigma(self) -> float:
        """The inner driver's step size."""
        return self.inner.sigma

    def stopped(self) -> str | None:
        """Why the driver has nothing more to propose, or None."""
        return self.inner.stopped()

    def state_dict(self) -> dict[str, Any]:
        """Return the inner driver's state."""
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the inner driver from its state."""
        self.inner.load_state_dict(state)
