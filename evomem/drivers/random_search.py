"""Driver: random search, the control that every search must beat at equal evaluations."""

from __future__ import annotations

from typing import Any

import numpy as np

from evomem.drivers.base import Array, Driver, Fitness, drivers


@drivers.register("random_search")
class RandomSearch(Driver):
    """Independent draws from N(start, sigma^2 I); believes in the best seen so far.

    Options: `DriverOptions`.
    """

    def _ask(self) -> Array:
        draws = np.random.default_rng([self.seed, self.generation, 0]).standard_normal((self.popsize, self.dim))
        return np.asarray(self.start + self.options.sigma * draws)

    def _tell(self, vectors: Array, fitness: Fitness) -> None:
        """Learn nothing: the base remembers the best."""

    def _state(self) -> dict[str, Any]:
        return {}  # a generation is a pure function of the seed and its number

    def _load(self, state: dict[str, Any]) -> None:
        pass

    @classmethod
    def _current(cls, state: dict[str, Any]) -> dict[str, Any]:
        """States of versions before 0.2; a new driver has none, and leaves this out."""
        return {**state, "asked": not state["told"]} if "told" in state else state
