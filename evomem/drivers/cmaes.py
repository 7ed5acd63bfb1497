"""Driver: CMA-ES, full or separable, through the ``cma`` package, with restarts.

N. Hansen, "The CMA evolution strategy: a tutorial", arXiv 1604.00772; separable: Ros and Hansen, PPSN 2008.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from pydantic import Field

from evomem.bounds import LARGE, POPULATION
from evomem.drivers.base import Array, Driver, Fitness, drivers
from evomem.drivers.common import DriverOptions, Gaussian, library
from evomem.drivers.restarts import RestartState, Strategy, first_descent, next_descent
from evomem.drivers.state import overlay, snapshot
from evomem.drivers.warm import WarmStart

# Fitness is an estimate from a few samples: a generation without differences, or a best value that does not improve,
# says little. What ends a descent is the distribution itself (step size, condition) and a long stagnation.
_FLAT_GENERATIONS = 20


@cache
def _libraries() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


@contextmanager
def single_threaded() -> Iterator[None]:
    """Run linear algebra on one thread and silence pycma's warnings inside the ``with`` block.

    On matrices as small as a search's, threads cost far more than they bring (a full generation in 200 dimensions:
    10 ms on one thread, up to seconds on two busy cores), and the last digits would depend on their number.
    """
    with warnings.catch_warnings(), _libraries().limit(limits=1, user_api="blas"):
        warnings.simplefilter("ignore")
        yield


SMALLEST = 3
"""Candidates of a generation that pycma takes."""


class CMAESOptions(DriverOptions):
    """Options of `CMAES`.

    Attributes
    ----------
    diagonal : separable CMA-ES; time and memory are linear in the dimension, and the covariance is learned about
        dim/3 times faster. Default: from 500 dimensions on, where a full covariance would hardly move in the
        generations that one can pay for.
    restarts : what follows a descent that has converged: nothing, ``ipop`` or ``bipop``.
    restart_spread : later descents begin at start + restart_spread * sigma * N(0, I).
    mirrored : add mirrored candidates to a part of the population (selective, Auger et al. 2011).
    """

    popsize: int | None = Field(default=None, ge=SMALLEST, le=POPULATION)
    diagonal: bool | None = None
    restarts: Strategy = "none"
    restart_spread: float = Field(default=1.0, ge=0, le=LARGE)
    mirrored: bool = False


def strategy(
    mean: Array,
    sigma: float,
    popsize: int,
    seed: tuple[int, ...],
    *,
    diagonal: bool,
    mirrored: bool = False,
    scales: Array | None = None,
) -> Any:
    """Return a pycma strategy that neither touches global state nor stops for reasons of noise.

    ``scales`` (dim,) are the first standard deviations of the coordinates, in units of ``sigma``.
    """
    cma = library("cma", "cmaes")
    settings = {
        "popsize": popsize,
        "CMA_diagonal": diagonal,
        "CMA_mirrors": mirrored,
        "CMA_stds": scales,
        "seed": np.nan,  # any number would seed numpy's global generator, and 0 means the time of day
        "randn": Gaussian(*seed),
        "tolflatfitness": _FLAT_GENERATIONS,
        "maxiter": np.inf,
        "verbose": -10,
        "verb_log": 0,
        "verb_disp": 0,
        "signals_filename": "",  # otherwise a file in the working directory could steer the search
    }
    with single_threaded():
        return cma.CMAEvolutionStrategy(mean, sigma, settings)


_SETTINGS = ("opts", "_es_opts", "inopts", "inputargs", "logger", "CMAOptions", "CMADataLogger")
"""Attributes of a strategy that follow from its settings. pycma evaluates options as Python: no file may set them."""


def snapshot_strategy(one: Any) -> Any:
    """Return the varying part of a pycma strategy (`evomem.drivers.state.snapshot`)."""
    return snapshot(one, _SETTINGS)


def restore_strategy(fresh: Any, tree: Any) -> Any:
    """Return the strategy of a `snapshot_strategy`; ``fresh`` has the same settings and is changed in place.

    pycma keeps injected solutions (mirrors) under Python's hash of their bytes, which differs from process to process.
    They are stored under this process's hash, so that pycma can look them up.
    """
    from cma.optimization_tools import BestSolution
    from cma.utilities.utils import BlancClass, ElapsedWCTime, SolutionDict

    one = overlay(fresh, tree, (BestSolution, BlancClass, ElapsedWCTime, SolutionDict), _SETTINGS)
    for name in ("sent_solutions", "_injected_solutions_archive"):
        old = getattr(one, name)
        new = type(old)()
        for key, last in old.items():
            for value in (*old.data_with_same_key.get(key, ()), last):
                new[old._unhashed_keys[key]] = value
        new.last_iteration = old.last_iteration
        setattr(one, name, new)
    return one


@drivers.register("cmaes")
class CMAES(Driver):
    """CMA-ES, the default: full covariance, separable from 500 dimensions on; restarts, mirrors, warm start (cma).

    Parameters
    ----------
    dim, start, seed : length of a vector, first mean (dim,), seed of everything random.
    warm : begin where another search's best candidates lie, with their mean and standard deviations; it takes the place
        of ``start`` and ``sigma``.
    options : `CMAESOptions`.
    """

    Options = CMAESOptions
    takes = frozenset({"warm"})
    packages = ("cma", "threadpoolctl")
    smallest_dim = 2
    options: CMAESOptions

    def __init__(self, dim: int, start: Array, seed: int, *, warm: WarmStart | None = None, **options: Any) -> None:
        super().__init__(dim, start, seed, **options)
        self._sigma = self.options.sigma
        self._scales: Array | None = None
        if warm is not None:
            warm.check(dim, self.name)
            self.start, (self._sigma, self._scales) = warm.mean, warm.diagonal()
        self._restart: RestartState = first_descent(self.popsize, self._sigma)
        self._strategy = self._descent()
        self._ended: tuple[float, Array] | None = None  # fitness and mean of the best descent that has ended
        self._level = -np.inf  # mean fitness of the running descent's last generation

    @property
    def diagonal(self) -> bool:
        """Whether the covariance is diagonal."""
        return self.dim >= 500 if self.options.diagonal is None else self.options.diagonal

    def _descent(self) -> Any:
        regime, number = self._restart.regime, self._restart.descents
        mean = self.start
        if number > 1:
            draw = np.random.default_rng([self.seed, number, 3]).standard_normal(self.dim)
            spread = self.options.restart_spread * self._sigma
            mean = self.start + spread * draw * (1.0 if self._scales is None else self._scales)
        return strategy(
            mean, regime.sigma, regime.popsize, (self.seed, number), diagonal=self.diagonal,
            mirrored=self.options.mirrored, scales=self._scales,
        )  # fmt: skip

    def _ask(self) -> Array:
        with single_threaded():
            return np.array(self._strategy.ask(), dtype=np.float64)

    def _tell(self, vectors: Array, fitness: Fitness) -> None:
        values = fitness.values
        with single_threaded():
            # check_points=False: after a resume pycma does not know the vectors as its own and would shorten them.
            self._strategy.tell(list(vectors), list(-values), check_points=False)
            reasons = dict(self._strategy.stop())
        self._level = float(values.mean())
        limit = self._restart.regime.limit
        if limit is not None and self._strategy.countevals >= limit:
            reasons["evaluations"] = limit
        if reasons:
            self._end_descent(", ".join(sorted(reasons)))

    def _end_descent(self, reason: str) -> None:
        if self._ended is None or self._level > self._ended[0]:
            self._ended = (self._level, self._running_mean())
        used = int(self._strategy.countevals)
        restart = next_descent(self.options.restarts, self._restart, used, self.popsize, self._sigma, self.seed)
        if restart is None:
            self._stopped = f"CMA-ES has converged ({reason})"
            return
        self._restart, self._level = restart, -np.inf
        self._strategy = self._descent()

    def _running_mean(self) -> Array:
        return np.array(self._strategy.mean, dtype=np.float64)

    def _mean(self) -> Array:
        """Return the running descent's mean, or the best ended one's while the last generation is worse than it was."""
        if self._ended is not None and self._ended[0] >= self._level:
            return self._ended[1]
        return self._running_mean()

    @property
    def sigma(self) -> float:
        """Current step size, in units of the vector."""
        return float(self._strategy.sigma)

    def _state(self) -> dict[str, Any]:
        return {
            "strategy": snapshot_strategy(self._strategy),
            "restart": self._restart,
            "ended": self._ended,
            "level": self._level,
        }

    def _load(self, state: dict[str, Any]) -> None:
        self._restart = state["restart"]
        self._strategy = restore_strategy(self._descent(), state["strategy"])
        self._ended, self._level = state["ended"], state["level"]
