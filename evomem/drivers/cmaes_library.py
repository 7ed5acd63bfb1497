"""Driver: LRA-CMA-ES and CatCMA with margin, through the ``cmaes`` package, which is imported when one is made."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from evomem.drivers.base import Array, Driver, Fitness, drivers
from evomem.drivers.cmaes import single_threaded
from evomem.drivers.common import checked_start, library
from evomem.drivers.state import overlay, snapshot
from evomem.drivers.warm import WarmStart
from evomem.errors import ConfigError
from evomem.search_space.option_ranges import Variable


class _Library(Driver):
    """What the drivers of this file share; a subclass makes the strategy and translates its solutions.

    The package keeps what a driver has to report (mean, step size, probabilities) in attributes with an underscore;
    they are read here and nowhere else.
    """

    packages = ("cmaes", "threadpoolctl")

    def __init__(self, dim: int, start: Array, seed: int, **options: Any) -> None:
        super().__init__(dim, start, seed, **options)
        package = library("cmaes", self.name, "cmaes")
        with single_threaded():
            self._strategy = self._make(package, int(np.random.default_rng([seed, 5]).integers(0, 2**32)))
        self._solutions: list[Any] = []  # what the strategy asked, in its own form

    @abstractmethod
    def _make(self, package: Any, seed: int) -> Any:
        """Return the library's searcher, begun."""

    @abstractmethod
    def _vector(self, solution: Any) -> Array:
        """Return the candidate that one of the library's solutions stands for."""

    def _ask(self) -> Array:
        with single_threaded():
            self._solutions = [self._strategy.ask() for _ in range(self.popsize)]
        return np.array([self._vector(solution) for solution in self._solutions], dtype=np.float64)

    def _tell(self, vectors: Array, fitness: Fitness) -> None:
        try:
            with single_threaded():
                self._strategy.tell(list(zip(self._solutions, (-fitness.values).tolist(), strict=True)))
                if self._has_gaussian and self._strategy.should_stop():
                    self._stopped = f"{self.name} has converged"
        except np.linalg.LinAlgError:
            self._stopped = "the covariance cannot be decomposed any more"
        self._solutions = []

    def _finite(self) -> bool:
        numbers = [self._strategy._sigma, *self._strategy._mean] if self._has_gaussian else []
        return bool(np.isfinite(numbers).all())

    @property
    def _has_gaussian(self) -> bool:
        return True

    @property
    def sigma(self) -> float:
        """Step size, in units of the vector."""
        return float(self._strategy._sigma) if self._has_gaussian else float("nan")

    def _state(self) -> dict[str, Any]:
        return {"strategy": snapshot(self._strategy), "solutions": snapshot(self._solutions)}

    def _load(self, state: dict[str, Any]) -> None:
        self._strategy = overlay(self._strategy, state["strategy"])
        self._solutions = overlay(None, state["solutions"], self._solution_classes())

    def _solution_classes(self) -> tuple[type, ...]:
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
    warm : begin where another search's best candidates lie; it takes the coordinate of ``start`` and ``sigma``.
    options : `DriverOptions`.
    """

    takes = frozenset({"warm"})
    smallest_dim = 2

    def __init__(self, dim: int, start: Array, seed: int, *, warm: WarmStart | None = None, **options: Any) -> None:
        if warm is not None:
            warm.check(dim, self.name)
        self._warm = warm
        super().__init__(dim, start, seed, **options)

    def _make(self, package: Any, seed: int) -> Any:
        mean, sigma, covariance = self.start, self.options.sigma, None
        if self._warm is not None:
            mean, (sigma, covariance) = self._warm.mean, self._warm.full()
        return package.CMA(
            mean=mean, sigma=sigma, cov=covariance, population_size=self.popsize, seed=seed, lr_adapt=True
        )

    def _vector(self, solution: Any) -> Array:
        return np.asarray(solution)

    def _mean(self) -> Array:
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

    takes = frozenset({"variables"})

    def __init__(
        self, dim: int, start: Array, seed: int, *, variables: Sequence[Variable] = (), **options: Any
    ) -> None:
        named = [coordinate for variable in variables for coordinate in variable.coordinates]
        if len(set(named)) != len(named) or any(not 0 <= coordinate < dim for coordinate in named):
            raise ConfigError(f"driver 'catcma': variables overlap, or lie outside the vector's {dim} coordinates")
        self._integers = [variable for variable in variables if variable.codes is not None and variable.bounds]
        self._categories = [variable for variable in variables if variable.codes is not None and not variable.bounds]
        discrete = {coordinate for variable in self._integers + self._categories for coordinate in variable.coordinates}
        self._numbers = [coordinate for coordinate in range(dim) if coordinate not in discrete]
        self._bounds = np.full((dim, 2), [-np.inf, np.inf])
        for variable in variables:
            if variable.bounds is not None:
                self._bounds[variable.offset] = variable.bounds
        # Where the Gaussian's coordinates lie in the vector: numbers first, then integers, as the package wants them.
        self._gaussian = np.array([*self._numbers, *(variable.offset for variable in self._integers)], dtype=np.int64)
        start = checked_start(dim, start)
        for variable in variables:
            if variable.bounds is not None:
                start[variable.offset] = variable.inside(start[variable.offset])
        super().__init__(dim, start, seed, **options)

    @property
    def _has_gaussian(self) -> bool:
        return len(self._gaussian) > 0

    def _make(self, package: Any, seed: int) -> Any:
        if self.popsize < 4:
            raise ConfigError("driver 'catcma': popsize: give at least 4 candidates")
        return package.CatCMAwM(
            x_space=self._bounds[self._numbers].tolist() or None,
            z_space=[_codes(variable)[:, 0].tolist() for variable in self._integers] or None,
            c_space=[len(_codes(variable)) for variable in self._categories] or None,
            population_size=self.popsize,
            mean=self.start[self._gaussian],
            sigma=self.options.sigma,
            # The package's own would be as wide as the mean is far from the bounds: 0 for a start on one.
            cov=np.eye(len(self._gaussian)),
            cat_param=self._first_probabilities(),
            seed=seed,
        )

    def _solution_classes(self) -> tuple[type, ...]:

        return (type(self._strategy).Solution,)

    def _first_probabilities(self) -> Array | None:
        """Return (categorical variables, largest number of values): the start's value is twice as likely as others."""
        if not self._categories:
            return None
        table = np.zeros((len(self._categories), max(variable.width for variable in self._categories)))
        for row, variable in zip(table, self._categories, strict=True):
            row[: variable.width] = 1.0
            row[variable.nearest(self.start)] = 2.0
        return np.asarray(table / table.sum(axis=1, keepdims=True))

    def _vector(self, solution: Any) -> Array:
        vector = np.empty(self.dim)
        vector[self._numbers] = solution.x if self._numbers else []
        for number, variable in enumerate(self._integers):
            vector[variable.offset] = solution.z[number]
        for number, variable in enumerate(self._categories):
            vector[variable.coordinates] = _codes(variable)[int(np.argmax(solution.c[number]))]
        return vector

    def _mean(self) -> Array:
        """Return the mean of the numbers, the nearest integers, the most likely categories."""
        vector = self.start.copy()
        if self._has_gaussian:
            mean = vector[self._gaussian] = np.array(self._strategy._mean, dtype=np.float64)
            numbers = mean[: len(self._numbers)]
            vector[self._numbers] = np.clip(numbers, *self._bounds[self._numbers].T)
        for variable in self._integers:
            vector[variable.offset] = _codes(variable)[variable.nearest(vector), 0]
        for number, variable in enumerate(self._categories):
            vector[variable.coordinates] = _codes(variable)[int(np.argmax(self._strategy._q[number]))]
        return vector


def _codes(variable: Variable) -> Array:
    if variable.codes is None:
        raise ConfigError("driver 'catcma': a categorical variable needs the codes of its values")
    return variable.codes
