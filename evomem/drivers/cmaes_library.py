"""Driver: LRA-CMA-ES and CatCMA with margin, through the ``cmaes`` package, which is imported when one is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evomem.drivers.base import Array, Fitness, Population, drivers
from evomem.drivers.cmaes import alone
from evomem.drivers.common import (
    DriverOptions,
    check_told,
    checked_start,
    default_popsize,
    filled,
    library,
    parse_options,
    sampling_seeds,
)
from evomem.drivers.state import overlay, snapshot
from evomem.drivers.warm import WarmStart
from evomem.errors import ConfigError
from evomem.search_space.option_ranges import Variable


class _Library:
    """What the drivers of this file share; a subclass makes the strategy and translates its solutions.

    The package keeps what a driver has to report (mean, step size, probabilities) in attributes with an underscore;
    they are read here and nowhere else.
    """

    name: str
    packages = ("cmaes", "threadpoolctl")

    def __init__(self, dim: int, start: Array, seed: int, **options: Any) -> None:
        self.dim = dim
        self.options = parse_options(DriverOptions, self.name, options)
        self._start = checked_start(dim, start)
        self._seed = seed
        self._popsize = self.options.popsize or default_popsize(dim)
        package = library("cmaes", self.name, "cmaes")
        with alone():
            self._strategy = self._make(package, int(np.random.default_rng([seed, 5]).integers(0, 2**32)))
        self._generation = 0
        self._solutions: list[Any] = []  # what the strategy asked, in its own form
        self._asked: Population | None = None
        self._stopped: str | None = None
        self._kept: Array | None = None  # the last finite mean of a search that has degenerated

    def _make(self, package: Any, seed: int) -> Any:
        raise NotImplementedError

    def _vector(self, solution: Any) -> Array:
        raise NotImplementedError

    def ask(self) -> Population:
        """Return the next generation; the same one until it is told."""
        if self._asked is None:
            with alone():
                self._solutions = [self._strategy.ask() for _ in range(self._popsize)]
            vectors = np.array([self._vector(solution) for solution in self._solutions], dtype=np.float64)
            seeds = sampling_seeds(self._seed, self._generation, self._popsize)
            self._asked = Population(self._generation, vectors, seeds)
        return self._asked

    def tell(self, population: Population, fitness: Fitness) -> None:
        """Learn; a candidate without a finite fitness counts as the worst."""
        check_told(self._asked, population)
        losses, before = -filled(fitness.values, self._popsize), self.mean
        try:
            with alone():
                self._strategy.tell(list(zip(self._solutions, losses.tolist(), strict=True)))
                if self._has_gaussian and self._strategy.should_stop():
                    self._stopped = f"{self.name} has converged"
        except np.linalg.LinAlgError:
            self._stopped = "the covariance cannot be decomposed any more"
        self._solutions, self._asked = [], None
        self._generation += 1
        if self._has_gaussian and not np.isfinite([self._strategy._sigma, *self._strategy._mean]).all():
            self._stopped, self._kept = "the distribution is no longer finite", before

    @property
    def _has_gaussian(self) -> bool:
        return True

    @property
    def mean(self) -> Array:
        """The distribution's centre (dim,), always finite."""
        return self._centre() if self._kept is None else self._kept.copy()

    def _centre(self) -> Array:
        raise NotImplementedError

    @property
    def sigma(self) -> float:
        """Step size, in units of the vector."""
        return float(self._strategy._sigma) if self._has_gaussian else float("nan")

    def stopped(self) -> str | None:
        """Why there is nothing more to propose, or None."""
        return self._stopped

    def state_dict(self) -> dict[str, Any]:
        """Return everything that an exact resume needs, as plain values and arrays."""
        return {
            "strategy": snapshot(self._strategy),
            "generation": self._generation,
            "solutions": snapshot(self._solutions),
            "asked": self._asked,
            "stopped": self._stopped,
            "kept": self._kept,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._strategy = overlay(self._strategy, state["strategy"])
        self._solutions = overlay(None, state["solutions"], self._kinds())
        self._asked = state["asked"]
        self._generation, self._stopped, self._kept = state["generation"], state["stopped"], state["kept"]

    def _kinds(self) -> tuple[type, ...]:
        """Return the classes of the package that solutions are of, besides arrays."""
        return ()


@drivers.register("lra_cma")
class LRACMA(_Library):
    """CMA-ES whose learning rates follow the noise: for noisy or multimodal fitness, up to a few hundred dimensions.

    Nomura, Akimoto, Ono, "CMA-ES with learning rate adaptation", GECCO 2023 (arXiv 2304.03473). Cost and memory grow
    with dim^2 per candidate and dim^3 per generation.

    Parameters
    ----------
    dim, start, seed : length of a vector, first mean (dim,), seed of everything random.
    warm : begin where another search's best candidates lie; it takes the place of ``start`` and ``sigma``.
    options : `DriverOptions`.
    """

    name = "lra_cma"
    takes_warm_start = True

    def __init__(self, dim: int, start: Array, seed: int, *, warm: WarmStart | None = None, **options: Any) -> None:
        if dim < 2:
            raise ConfigError(f"driver 'lra_cma': needs at least 2 dimensions, this space has {dim}")
        if warm is not None:
            warm.check(dim, self.name)
        self._warm = warm
        super().__init__(dim, start, seed, **options)

    def _make(self, package: Any, seed: int) -> Any:
        mean, sigma, covariance = self._start, self.options.sigma, None
        if self._warm is not None:
            mean, (sigma, covariance) = self._warm.mean, self._warm.full()
        return package.CMA(
            mean=mean, sigma=sigma, cov=covariance, population_size=self._popsize, seed=seed, lr_adapt=True
        )

    def _vector(self, solution: Any) -> Array:
        return np.asarray(solution)

    def _centre(self) -> Array:
        return np.array(self._strategy.mean, dtype=np.float64)


@drivers.register("catcma")
class CatCMA(_Library):
    """CatCMA with margin: for spaces that mix numbers with integers and categories, up to a few hundred dimensions.

    Hamano et al., "CatCMA with Margin", GECCO 2025 (arXiv 2504.07884). A Gaussian proposes the numbers and integers
    (an integer's neighbours keep a least probability, so that it cannot freeze), a categorical distribution the
    categories. Every coordinate that no variable names is an unbounded number.

    In the vector, a bounded number stays in the part of the line on which its encoding is one-to-one; an integer or a
    category is one of the coordinates that encode its values exactly. Vectors of the other drivers decode to the same
    managers, but lie anywhere.

    Parameters
    ----------
    dim, start, seed : length of a vector, first mean (dim,), seed of everything random.
    variables : what bounded, integer and categorical coordinates stand for (`SearchSpace.variables`).
    options : `DriverOptions`.
    """

    name = "catcma"
    takes_variables = True

    def __init__(
        self, dim: int, start: Array, seed: int, *, variables: Sequence[Variable] = (), **options: Any
    ) -> None:
        named = [place for variable in variables for place in variable.places]
        if len(set(named)) != len(named) or any(not 0 <= place < dim for place in named):
            raise ConfigError(f"driver 'catcma': variables overlap, or lie outside the vector's {dim} coordinates")
        self._integers = [variable for variable in variables if variable.codes is not None and variable.bounds]
        self._categories = [variable for variable in variables if variable.codes is not None and not variable.bounds]
        discrete = {place for variable in self._integers + self._categories for place in variable.places}
        self._numbers = [place for place in range(dim) if place not in discrete]
        self._bounds = np.full((dim, 2), [-np.inf, np.inf])
        for variable in variables:
            if variable.bounds is not None:
                self._bounds[variable.place] = variable.bounds
        # Where the Gaussian's coordinates lie in the vector: numbers first, then integers, as the package wants them.
        self._gaussian = np.array([*self._numbers, *(variable.place for variable in self._integers)], dtype=np.int64)
        start = checked_start(dim, start)
        for variable in variables:
            if variable.bounds is not None:
                start[variable.place] = variable.inside(start[variable.place])
        super().__init__(dim, start, seed, **options)

    @property
    def _has_gaussian(self) -> bool:
        return len(self._gaussian) > 0

    def _make(self, package: Any, seed: int) -> Any:
        if self._popsize < 4:
            raise ConfigError("driver 'catcma': popsize: give at least 4 candidates")
        return package.CatCMAwM(
            x_space=self._bounds[self._numbers].tolist() or None,
            z_space=[_codes(variable)[:, 0].tolist() for variable in self._integers] or None,
            c_space=[len(_codes(variable)) for variable in self._categories] or None,
            population_size=self._popsize,
            mean=self._start[self._gaussian],
            sigma=self.options.sigma,
            # The package's own would be as wide as the mean is far from the bounds: 0 for a start on one.
            cov=np.eye(len(self._gaussian)),
            cat_param=self._first_probabilities(),
            seed=seed,
        )

    def _kinds(self) -> tuple[type, ...]:

        return (type(self._strategy).Solution,)

    def _first_probabilities(self) -> Array | None:
        """Return (categorical variables, largest number of values): the start's value is twice as likely as others."""
        if not self._categories:
            return None
        table = np.zeros((len(self._categories), max(variable.width for variable in self._categories)))
        for row, variable in zip(table, self._categories, strict=True):
            row[: variable.width] = 1.0
            row[variable.nearest(self._start)] = 2.0
        return np.asarray(table / table.sum(axis=1, keepdims=True))

    def _vector(self, solution: Any) -> Array:
        vector = np.empty(self.dim)
        vector[self._numbers] = solution.x if self._numbers else []
        for number, variable in enumerate(self._integers):
            vector[variable.place] = solution.z[number]
        for number, variable in enumerate(self._categories):
            vector[variable.places] = _codes(variable)[int(np.argmax(solution.c[number]))]
        return vector

    def _centre(self) -> Array:
        """Return the mean of the numbers, the nearest integers, the most likely categories."""
        vector = self._start.copy()
        if self._has_gaussian:
            mean = vector[self._gaussian] = np.array(self._strategy._mean, dtype=np.float64)
            numbers = mean[: len(self._numbers)]
            vector[self._numbers] = np.clip(numbers, *self._bounds[self._numbers].T)
        for variable in self._integers:
            vector[variable.place] = _codes(variable)[variable.nearest(vector), 0]
        for number, variable in enumerate(self._categories):
            vector[variable.places] = _codes(variable)[int(np.argmax(self._strategy._q[number]))]
        return vector


def _codes(variable: Variable) -> Array:
    if variable.codes is None:
        raise ConfigError("driver 'catcma': a categorical variable needs the codes of its values")
    return variable.codes
