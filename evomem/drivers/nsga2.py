"""Driver: NSGA-II, score against measured bytes; finds a front of managers instead of one.

Deb, Pratap, Agarwal, Meyarivan, "A fast and elitist multiobjective genetic algorithm: NSGA-II", IEEE Transactions on
Evolutionary Computation 6(2), 2002; crossover: Deb and Agrawal, "Simulated binary crossover", Complex Systems 9, 1995.

Sorting, tournament, crossover and mutation are EvoTorch's; the loop around them is ours. EvoTorch's `GeneticAlgorithm`
measures parents and children in two evaluations inside one step, where ours must be one, on the same samples. And its
survival (`SolutionBatch.take_best`, 0.6.1) takes the order of the crowding distances for their ranks, so that it may
drop the end of a front and keep its most crowded part; `arg_pareto_sort` orders fronts as it should.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from evomem.bounds import LARGE, POPULATION
from evomem.drivers.base import Array, Driver, Fitness, drivers
from evomem.drivers.common import DriverOptions, filled, library
from evomem.errors import FitnessError

_TRIES = 100
"""How often a child that is a copy is mutated again: a step too small for the numbers would make copies for ever."""


class NSGA2Options(DriverOptions):
    """Options of `NSGA2`.

    Attributes
    ----------
    sigma : standard deviation of the first population around the start, and of a mutation.
    popsize : candidates of a generation, survivors included where they are measured again.
    remeasure : ask for the survivors again, beside their children and on the same samples; half of a generation are
        survivors then. Scores are estimates from a few samples: without it who was lucky once stays for ever. Turn it
        off where every generation has the same samples (``train_contexts`` equal to ``samples_per_generation``).
    tournament : candidates of which the best becomes a parent.
    crossover : SBX's distribution index; the larger, the nearer are children to their parents (15 to 20 is for long
        searches).
    mutation : probability that a number of a child is mutated. The customary 1 / dim is for thousands of generations:
        in the few dozen that a model's evaluations allow, it hardly moves (in 41 dimensions and 25 generations of 24 it
        found 0.53 of a front's hypervolume, 0.3 found 0.67).
    """

    popsize: int | None = Field(default=None, ge=4, le=POPULATION)
    remeasure: bool = True
    tournament: int = Field(default=2, ge=1, le=POPULATION)
    crossover: float = Field(default=5.0, ge=0, le=LARGE, allow_inf_nan=False)
    mutation: float = Field(default=0.3, gt=0, le=1)


@drivers.register("nsga2")
class NSGA2(Driver):
    """NSGA-II on two objectives, the score and the measured bytes: a front of managers (EvoTorch's operators).

    Parameters
    ----------
    dim, start, seed : length of a vector, centre of the first population (dim,) and a member of it, seed of everything
        random.
    options : `NSGA2Options`.
    """

    Options = NSGA2Options
    uses = frozenset({"costs"})
    packages = ("evotorch", "threadpoolctl")
    options: NSGA2Options

    def __init__(self, dim: int, start: Array, seed: int, **options: Any) -> None:
        super().__init__(dim, start, seed, **options)
        self._make_library(int(np.random.default_rng([seed, 5]).integers(0, 2**62)))
        self._survivors: Array = self.start[None]
        self._evals: Array = np.zeros((1, 2))

    def _make_library(self, seed: int) -> None:
        # First, because it imports EvoTorch silently.
        self._single_threaded = library("evomem.drivers.evotorch_steps", "nsga2").single_threaded
        from evotorch import Problem
        from evotorch.operators import GaussianMutation, SimulatedBinaryCrossOver

        # Never evaluated: it stands for the senses of the objectives, and for a generator of its own.
        self._problem = Problem(
            ["max", "min"], solution_length=self.dim, dtype=torch.float64, eval_dtype=torch.float64,
            initial_bounds=(-1.0, 1.0), seed=seed, store_solution_stats=False,
        )  # fmt: skip
        children = self.popsize - self._survive if self.options.remeasure else self.popsize
        self._cross = SimulatedBinaryCrossOver(
            self._problem, tournament_size=self.options.tournament, eta=self.options.crossover,
            num_children=children + children % 2,
        )  # fmt: skip
        self._mutate = GaussianMutation(
            self._problem, stdev=self.options.sigma, mutation_probability=self.options.mutation
        )
        self._children = children

    @property
    def _survive(self) -> int:
        """How many survive a generation."""
        return self.popsize // 2 if self.options.remeasure else self.popsize

    def _batch(self, vectors: Array, evals: Array) -> Any:
        from evotorch import SolutionBatch

        batch = SolutionBatch(self._problem, popsize=len(vectors), empty=True)
        batch.set_values(torch.from_numpy(vectors))
        batch.set_evals(torch.from_numpy(evals))
        return batch

    def _ask(self) -> Array:
        with self._single_threaded():
            return self._first() if self.generation == 0 else self._next()

    def _first(self) -> Array:
        draws = self._problem.make_gaussian((self.popsize, self.dim)).numpy()
        draws[0] = 0.0  # the start itself
        first: Array = self._survivors + self.options.sigma * draws
        return first

    def _next(self) -> Array:
        children = self._mutate(self._cross(self._batch(self._survivors, self._evals)))
        vectors = np.array(children.values.numpy())[: self._children]
        for _ in range(_TRIES):
            copies = _copies(vectors, self._survivors)
            if not copies.size:
                break
            again = self._mutate(self._batch(vectors[copies], np.zeros((len(copies), 2))))
            vectors[copies] = again.values.numpy()
        return np.concatenate([self._survivors, vectors]) if self.options.remeasure else vectors

    def _without_holes(self, fitness: Fitness, count: int) -> Fitness:
        """Return the fitness where failed candidates are strictly worse than all others in both.

        Raises
        ------
        FitnessError : no candidate has both.
        """
        filled(fitness.values, count)  # refuses what every driver refuses
        values, costs = (np.asarray(part, dtype=np.float64) for part in (fitness.values, fitness.costs))
        good = np.isfinite(values) & np.isfinite(costs)
        if not good.any():
            raise FitnessError("no candidate of the generation has both a fitness and a size (NaN or infinite)")
        worst, largest = np.nextafter(values[good].min(), -np.inf), np.nextafter(costs[good].max(), np.inf)
        return replace(fitness, values=np.where(good, values, worst), costs=np.where(good, costs, largest))

    def _tell(self, vectors: Array, fitness: Fitness) -> None:
        """Let the best survive, front by front, of the last front those that stand most alone."""
        evals = np.stack([fitness.values, np.asarray(fitness.costs)], axis=1)
        if not self.options.remeasure and self.generation > 0:
            vectors, evals = np.concatenate([self._survivors, vectors]), np.concatenate([self._evals, evals])
        with self._single_threaded():
            fronts = self._batch(vectors, evals).arg_pareto_sort().fronts
        best = torch.cat(fronts)[: self._survive].numpy()
        self._survivors, self._evals = vectors[best], evals[best]

    def _mean(self) -> Array:
        """Return the survivor with the best score (dim,), the start before anything was told: a front has no centre."""
        return np.asarray(self._survivors[int(np.argmax(self._evals[:, 0]))])

    def _state(self) -> dict[str, Any]:
        return {
            "survivors": self._survivors.copy(),
            "evals": self._evals.copy(),
            "generator": self._problem.generator.get_state().numpy().copy(),
        }

    def _load(self, state: dict[str, Any]) -> None:
        self._survivors, self._evals = state["survivors"].copy(), state["evals"].copy()
        self._problem.generator.set_state(torch.from_numpy(state["generator"].copy()))


def _copies(vectors: Array, others: Array) -> NDArray[np.int64]:
    """Return the indices of vectors (vectors, dim) that are among the others, or were there before."""
    seen = {other.tobytes() for other in others}
    copies = []
    for index, vector in enumerate(vectors):
        if vector.tobytes() in seen:
            copies.append(index)
        seen.add(vector.tobytes())
    return np.array(copies, dtype=np.int64)
