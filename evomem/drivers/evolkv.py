"""Driver: EvolKV's search: CMA-ES on one group of layers after the other, those before frozen at their best.

Yu and Chai, "EvolKV: evolutionary KV cache compression for LLM inference", arXiv 2509.08315. The space is one number a
layer (allocation `evomem.managers.allocation.layer_budgets.LayerBudgets`), the fitness the objective ``evolkv``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from evomem.bounds import GENERATIONS, POPULATION, UNITS
from evomem.drivers.base import Array, Driver, Fitness, Stage, drivers
from evomem.drivers.cmaes import SMALLEST, restore_strategy, single_threaded, snapshot_strategy, strategy
from evomem.drivers.common import DriverOptions, default_popsize
from evomem.errors import ConfigError

_GENERATIONS = 10
"""Generations of a group where nobody says how long the search is."""


class EvolKVOptions(DriverOptions):
    """Options of `EvolKV`; defaults are the paper's.

    Attributes
    ----------
    sigma : first step size of every group, in units of the target budget where the space is `LayerBudgets`.
    popsize : candidates of a generation; 4 + ⌊3 ln 8⌋ = 10 for groups of 8.
    group : coordinates (layers) that are searched together, in their order; a last one alone joins those before it.
    generations : of every group; by default those of the first stage, divided by the number of groups, and what is left
        over is the last group's.
    """

    popsize: int | None = Field(default=None, ge=SMALLEST, le=POPULATION)
    group: int = Field(default=8, ge=2, le=UNITS)
    generations: int | None = Field(default=None, ge=1, le=GENERATIONS)


@drivers.register("evolkv")
class EvolKV(Driver):
    """EvolKV: CMA-ES on groups of layers, bottom-up, each group frozen at the best candidate that it has seen (cma).

    Parameters
    ----------
    dim, start, seed : length of a vector, where all groups begin (dim,), seed of everything random.
    options : `EvolKVOptions`.
    """

    Options = EvolKVOptions
    packages = ("cma", "threadpoolctl")
    smallest_dim = 2
    options: EvolKVOptions

    def __init__(self, dim: int, start: Array, seed: int, **options: Any) -> None:
        super().__init__(dim, start, seed, **options)
        begins = list(range(0, dim, self.options.group))
        if dim - begins[-1] < 2:  # CMA-ES needs two dimensions
            begins.pop()
        self._groups = [np.arange(a, b) for a, b in zip(begins, [*begins[1:], dim], strict=True)]
        self._generations = self.options.generations
        self._frozen = self.start.copy()
        self._begin(0)

    def _population_size(self) -> int:
        return self.options.popsize or default_popsize(min(self.options.group, self.dim))

    def _begin(self, group: int) -> None:
        """Begin the search of a group, around the start."""
        self._group, self._spent = group, 0
        self._best_value, self._best_part = -np.inf, self._frozen[self._groups[group]].copy()
        self._strategy = strategy(
            self._frozen[self._groups[group]],
            self.options.sigma,
            self.popsize,
            (self.seed, group, 8),
            diagonal=False,
        )

    def _enter(self, stage: Stage) -> None:
        if self._generations is not None or stage.end <= stage.begin:
            return
        there = stage.end - stage.begin
        if there < len(self._groups):
            raise ConfigError(
                f"driver 'evolkv': {len(self._groups)} groups of layers are searched one after the other, and the "
                f"stage has {there} generations; give it more, or larger groups (driver.options.group)"
            )
        self._generations = there // len(self._groups)

    def _ask(self) -> Array:
        vectors = np.tile(self._frozen, (self.popsize, 1))
        with single_threaded():
            vectors[:, self._groups[self._group]] = np.array(self._strategy.ask(), dtype=np.float64)
        return vectors

    def _tell(self, vectors: Array, fitness: Fitness) -> None:
        parts = vectors[:, self._groups[self._group]]
        best = int(np.argmax(fitness.values))
        if fitness.values[best] > self._best_value:
            self._best_value, self._best_part = float(fitness.values[best]), parts[best].copy()
        with single_threaded():
            self._strategy.tell(list(parts), list(-fitness.values), check_points=False)
            converged = bool(dict(self._strategy.stop()))
        self._spent += 1
        last = self._group + 1 == len(self._groups)
        # The end of the stage is the last group's, unless the user says how long a group is searched.
        limit = self.options.generations if last else self._generations or _GENERATIONS
        ended = limit is not None and self._spent >= limit
        if (converged or ended) and not last:
            self._frozen[self._groups[self._group]] = self._best_part
            self._begin(self._group + 1)
        elif converged or ended:
            self._stopped = f"all {len(self._groups)} groups of layers " + (
                "have converged" if converged else "are done"
            )

    def _mean(self) -> Array:
        """Return the frozen groups and the running one's best (dim,)."""
        mean = self._frozen.copy()
        mean[self._groups[self._group]] = self._best_part
        return mean

    @property
    def sigma(self) -> float:
        """Step size of the group that is searched."""
        return float(self._strategy.sigma)

    def _state(self) -> dict[str, Any]:
        return {
            "group": self._group,
            "spent": self._spent,
            "generations": self._generations,
            "frozen": self._frozen.copy(),
            "best_value": self._best_value,
            "best_part": self._best_part.copy(),
            "strategy": snapshot_strategy(self._strategy),
        }

    def _load(self, state: dict[str, Any]) -> None:
        self._frozen, self._generations = state["frozen"].copy(), state["generations"]
        self._begin(state["group"])
        self._strategy = restore_strategy(self._strategy, state["strategy"])
        self._spent = state["spent"]
        self._best_value, self._best_part = state["best_value"], state["best_part"].copy()
