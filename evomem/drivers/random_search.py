"""Driver: random search, the control that every search must beat at equal evaluations."""

from __future__ import annotations

from typing import Any

import numpy as np

from evomem.drivers.base import Array, Fitness, Population, drivers
from evomem.drivers.common import (
    DriverOptions,
    check_told,
    checked_start,
    default_popsize,
    filled,
    parse_options,
    sampling_seeds,
)


@drivers.register("random_search")
class RandomSearch:
    """Independent draws from N(start, sigma^2 I); believes in the best seen so far.

    Parameters
    ----------
    dim, start, seed : length of a vector, centre of the draws (dim,), seed of everything random.
    options : `DriverOptions`.
    """

    def __init__(self, dim: int, start: Array, seed: int, **options: Any) -> None:
        self.dim = dim
        self.options = parse_options(DriverOptions, "random_search", options)
        self._start = checked_start(dim, start)
        self._seed = seed
        self._popsize = self.options.popsize or default_popsize(dim)
        self._generation = 0
        self._told = True
        self._best = self._start.copy()
        self._best_fitness = -np.inf

    def ask(self) -> Population:
        """Return the next generation: a pure function of the seed and the generation's number."""
        draws = np.random.default_rng([self._seed, self._generation, 0]).standard_normal((self._popsize, self.dim))
        self._told = False
        seeds = sampling_seeds(self._seed, self._generation, self._popsize)
        return Population(self._generation, self._start + self.options.sigma * draws, seeds)

    def tell(self, population: Population, fitness: Fitness) -> None:
        """Remember the best candidate; the first of equals."""
        check_told(None if self._told else self.ask(), population)
        values = filled(fitness.values, len(population.vectors))
        best = int(np.argmax(values))
        if values[best] > self._best_fitness:
            self._best, self._best_fitness = population.vectors[best].copy(), float(values[best])
        self._generation += 1
        self._told = True

    @property
    def mean(self) -> Array:
        """The best vector so far (dim,), the start before anything was told."""
        return self._best.copy()

    @property
    def sigma(self) -> float:
        """Step size; it does not change."""
        return self.options.sigma

    def stopped(self) -> str | None:
        """Return None: there is always another draw."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return everything that an exact resume needs."""
        return {
            "generation": self._generation,
            "told": self._told,
            "best": self._best.copy(),
            "best_fitness": self._best_fitness,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._generation = state["generation"]
        self._told = state["told"]
        self._best = np.array(state["best"], dtype=np.float64)
        self._best_fitness = state["best_fitness"]
