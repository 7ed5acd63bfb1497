"""Driver: EvoTorch's searchers, one generation at a time. Needs ``evotorch``; import it where a driver is made.

A searcher of EvoTorch calls the fitness function in the middle of its step. Here the step is cut there: when a
`Steps` is made and after every ``tell``, the next population is drawn and lies ready in ``vectors``; ``tell`` runs the
rest of the step on the fitness that it is given. So there is one state, the same before and after ``ask``.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from evomem.drivers.base import Array


def _quietly() -> None:
    """Import EvoTorch without the handlers that it puts on the terminal; those of somebody who has it already stay."""
    level = os.environ.get("EVOTORCH_VERBOSE_LEVEL")
    os.environ.setdefault("EVOTORCH_VERBOSE_LEVEL", "-1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import evotorch  # noqa: F401
    finally:
        if level is None:
            del os.environ["EVOTORCH_VERBOSE_LEVEL"]
    if level is None and not logging.getLogger("evotorch").handlers:
        logging.getLogger("evotorch").setLevel(logging.ERROR)  # its warnings would reach stderr without a handler too


_quietly()

from evotorch import Problem, SolutionBatch  # noqa: E402
from evotorch.algorithms import CEM, CMAES, PGPE, SNES, XNES  # noqa: E402
from evotorch.algorithms.searchalgorithm import SearchAlgorithm  # noqa: E402


@contextmanager
def single_threaded() -> Iterator[None]:
    """Run torch on one thread, silence EvoTorch's warnings and restore torch's generator after the ``with`` block.

    The last digits depend on the number of threads, and steps as small as a search's gain nothing from them. EvoTorch
    draws from the problem's generator, but moves the global one too.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)


class Told(Problem):  # type: ignore[misc]
    """A problem whose fitness comes from outside: larger is better, float64, a generator of its own, no actors.

    Attributes
    ----------
    fitness : (candidates,) of the population that is evaluated next; None: it is drawn now and gets its fitness later.
    """

    def __init__(self, dim: int, seed: int) -> None:
        # EvoTorch fills a batch that it then throws away from `initial_bounds`. In float32 its CMA-ES loses positive
        # definiteness now and then. The best and worst so far are not asked for.
        super().__init__(
            "max", solution_length=dim, dtype=torch.float64, eval_dtype=torch.float64, initial_bounds=(-1.0, 1.0),
            seed=seed, store_solution_stats=False,
        )  # fmt: skip
        self.fitness: Tensor | None = None

    def _evaluate_batch(self, solutions: SolutionBatch) -> None:
        fitness = torch.zeros(len(solutions), dtype=torch.float64) if self.fitness is None else self.fitness
        solutions.set_evals(fitness)


class Steps(Protocol):
    """A searcher of EvoTorch by ask and tell; its snapshot (`evomem.drivers.state`) continues bit-exactly."""

    @property
    def vectors(self) -> Array:
        """The population that waits for its fitness (candidates, dim)."""
        ...

    def tell(self, fitness: Array) -> None:
        """Learn from the fitness (candidates,) of `vectors`, and draw the next ones."""
        ...

    @property
    def mean(self) -> Array:
        """Centre of the distribution (dim,)."""
        ...

    @property
    def sigma(self) -> float:
        """Step size: root mean square of the standard deviations over the coordinates."""
        ...


class GaussianSteps:
    """SNES, XNES, PGPE and CEM: their step first learns from the last population, then draws and evaluates the next.

    Parameters
    ----------
    searcher : a `GaussianSearchAlgorithm` on a `Told` problem, not stepped yet.
    """

    def __init__(self, searcher: SearchAlgorithm) -> None:
        self._searcher = searcher
        self._searcher.step()

    @property
    def vectors(self) -> Array:
        """The population that waits for its fitness (candidates, dim)."""
        return _array(self._searcher.population.values)

    def tell(self, fitness: Array) -> None:
        """Learn from the fitness (candidates,) of `vectors`, and draw the next ones."""
        self._searcher.population.set_evals(torch.from_numpy(fitness))
        self._searcher.step()

    @property
    def mean(self) -> Array:
        """Centre of the distribution (dim,)."""
        return _array(self._searcher.status["center"])

    @property
    def sigma(self) -> float:
        """Root mean square of the standard deviations; for XNES, ||A||_F / sqrt(dim) of A with covariance A A^T."""
        spread: Tensor = self._searcher.status["stdev"]
        return float(spread.norm() / len(spread) ** 0.5)


class CMAESSteps(CMAES):  # type: ignore[misc]
    """CMA-ES: its step draws, evaluates and learns; the draw is made beforehand."""

    def __init__(self, problem: Told, **options: Any) -> None:
        super().__init__(problem, **options)
        self._drawn: tuple[Tensor, Tensor, Tensor] = super().sample_distribution()

    def sample_distribution(self, num_samples: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return what was drawn for this step, in the three coordinate systems of EvoTorch's method."""
        return self._drawn

    @property
    def vectors(self) -> Array:
        """The population that waits for its fitness (candidates, dim)."""
        return _array(self._drawn[2])

    def tell(self, fitness: Array) -> None:
        """Learn from the fitness (candidates,) of `vectors`, and draw the next ones.

        Raises
        ------
        torch.linalg.LinAlgError : the covariance is no longer positive definite.
        """
        self.problem.fitness = torch.from_numpy(fitness)
        self.step()
        self._drawn = super().sample_distribution()

    @property
    def mean(self) -> Array:
        """Centre of the distribution (dim,)."""
        return _array(self.m)


def _array(values: Any) -> Array:
    return np.array(values.numpy(), dtype=np.float64)


def cmaes_steps(start: Array, sigma: float, popsize: int, seed: int, *, diagonal: bool) -> Steps:
    """Return CMA-ES, full or separable."""
    problem = Told(len(start), seed)
    steps: Steps = CMAESSteps(
        problem, stdev_init=sigma, popsize=popsize, center_init=torch.from_numpy(start), separable=diagonal
    )
    return steps


def gaussian_steps(kind: str, start: Array, sigma: float, popsize: int, seed: int, **options: Any) -> Steps:
    """Return ``snes``, ``xnes``, ``pgpe`` or ``cem``, with the options of EvoTorch's class."""
    searchers = {"snes": SNES, "xnes": XNES, "pgpe": PGPE, "cem": CEM}
    problem = Told(len(start), seed)
    return GaussianSteps(
        searchers[kind](
            problem, stdev_init=sigma, popsize=popsize, center_init=torch.from_numpy(start.copy()), **options
        )
    )
