"""Driver: the searchers of EvoTorch (CMA-ES, SNES, XNES, PGPE, CEM), evaluated by us.

EvoTorch's own evaluation (its Ray actors) is not used: it loses a generation with an actor, and its results depend on
the number of actors. The library, which brings Ray with it, is imported when a driver is made.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import numpy as np
from pydantic import Field
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from evomem.bounds import LARGE
from evomem.drivers.base import Array, Driver, Fitness, drivers
from evomem.drivers.common import DriverOptions, default_popsize, library
from evomem.drivers.state import overlay, snapshot
from evomem.errors import ConfigError

_MEMORY = 4 * 2**30
"""Bytes that full CMA-ES of EvoTorch may take for its update: it holds an outer product per candidate."""

_CLOCK = ("_first_step_datetime",)


class EvoTorchCMAESOptions(DriverOptions):
    """Options of `EvoTorchCMAES`.

    Attributes
    ----------
    diagonal : separable CMA-ES. Default: from 500 dimensions on, as in the driver ``cmaes``.
    """

    diagonal: bool | None = None


class NESOptions(DriverOptions):
    """Options of `SNES` and `XNES`.

    Attributes
    ----------
    center_learning_rate : of the mean; 1 is the papers' value.
    stdev_learning_rate : of the standard deviations, as a multiple of the papers' value for the dimension.
    """

    center_learning_rate: float = Field(default=1.0, gt=0, le=LARGE, allow_inf_nan=False)
    stdev_learning_rate: float = Field(default=1.0, gt=0, le=LARGE, allow_inf_nan=False)


class PGPEOptions(DriverOptions):
    """Options of `PGPE`.

    Attributes
    ----------
    optimizer : what follows the estimated gradient: ``clipup`` (a speed limit, hence no step longer than
        ``max_speed``; near an optimum it circles), ``adam``, or ``sgd`` (plain steps).
    center_learning_rate : of the optimizer. Default: for ``clipup`` half of ``max_speed``; ``sigma`` / 3 for the
        others.
    max_speed : of ``clipup``, length of the longest step. Default: a fifteenth of the first distribution's radius,
        ``sigma`` sqrt(dim) (Toklu et al. 2020, section 3.2).
    stdev_learning_rate : of the standard deviations.
    stdev_max_change : the largest share by which a standard deviation changes in a generation.
    """

    optimizer: Literal["clipup", "adam", "sgd"] = "clipup"
    center_learning_rate: float | None = Field(default=None, gt=0, le=LARGE, allow_inf_nan=False)
    max_speed: float | None = Field(default=None, gt=0, le=LARGE, allow_inf_nan=False)
    stdev_learning_rate: float = Field(default=0.1, ge=0, le=LARGE, allow_inf_nan=False)
    stdev_max_change: float = Field(default=0.2, gt=0, lt=1)


class CEMOptions(DriverOptions):
    """Options of `CEM`.

    Attributes
    ----------
    parents : share of the population that the next distribution is fitted to (at least 2 candidates).
    stdev_max_change : the largest share by which a standard deviation changes in a generation. Without such a limit
        populations as small as ours collapse before they arrive.
    """

    parents: float = Field(default=0.25, gt=0, lt=1)
    stdev_max_change: float | None = Field(default=0.1, gt=0, lt=1)


class _EvoTorch(Driver):
    """What the drivers of this file share; a subclass makes the steps."""

    packages = ("evotorch", "threadpoolctl")

    def __init__(self, dim: int, start: Array, seed: int, **options: Any) -> None:
        super().__init__(dim, start, seed, **options)
        library_seed = int(np.random.default_rng([seed, 4]).integers(0, 2**62))
        with self._library().single_threaded():
            self._steps = self._make(self.start.copy(), library_seed)

    def _library(self) -> Any:
        return library("evomem.drivers.evotorch_steps", self.name)

    @abstractmethod
    def _make(self, start: Array, seed: int) -> Any:
        """Return the library's searcher, begun."""

    def _ask(self) -> Array:
        return np.asarray(self._steps.vectors)

    def _tell(self, vectors: Array, fitness: Fitness) -> None:
        try:
            with self._library().single_threaded():
                self._steps.tell(fitness.values)
        except LinAlgError:
            self._stopped = "the covariance is no longer positive definite"
        if self.sigma < 1e-12 * self.options.sigma:
            self._stopped = "the search has converged (standard deviations)"

    def _finite(self) -> bool:
        return bool(np.isfinite([self._steps.mean, *self._steps.vectors]).all())

    def _mean(self) -> Array:
        return np.asarray(self._steps.mean)

    @property
    def sigma(self) -> float:
        """Step size, in units of the vector: root mean square over the coordinates, or CMA-ES's sigma."""
        return float(self._steps.sigma)

    def _state(self) -> dict[str, Any]:
        return {"steps": snapshot(self._steps, _CLOCK)}

    def _load(self, state: dict[str, Any]) -> None:
        self._steps = overlay(self._steps, state["steps"], skip=_CLOCK)


@drivers.register("evotorch_cmaes")
class EvoTorchCMAES(_EvoTorch):
    """CMA-ES as vectorised by EvoTorch: the fastest separable one in thousands of dimensions.

    N. Hansen, arXiv 1604.00772; separable: Ros and Hansen, PPSN 2008. Options: `EvoTorchCMAESOptions`.
    """

    Options = EvoTorchCMAESOptions
    smallest_dim = 2
    options: EvoTorchCMAESOptions

    @property
    def diagonal(self) -> bool:
        """Whether the covariance is diagonal."""
        return self.dim >= 500 if self.options.diagonal is None else self.options.diagonal

    def _make(self, start: Array, seed: int) -> Any:
        needed = self.popsize * self.dim**2 * 8
        if not self.diagonal and needed > _MEMORY:
            raise ConfigError(
                f"driver 'evotorch_cmaes': a full covariance of {self.dim} dimensions takes {needed / 1e9:.0f} GB per "
                "generation; take diagonal: true, or the driver cmaes"
            )
        make = self._library().cmaes_steps
        return make(start, self.options.sigma, self.popsize, seed, diagonal=self.diagonal)


class _NES(_EvoTorch):
    Options = NESOptions
    options: NESOptions

    def _make(self, start: Array, seed: int) -> Any:
        return self._library().gaussian_steps(
            self.name, start, self.options.sigma, self.popsize, seed,
            center_learning_rate=self.options.center_learning_rate,
            stdev_learning_rate=self.options.stdev_learning_rate,
        )  # fmt: skip


@drivers.register("snes")
class SNES(_NES):
    """Separable natural evolution strategy: a step size per coordinate, linear in the dimension (EvoTorch).

    Schaul, Glasmachers, Schmidhuber, "High dimensions and heavy tails for natural evolution strategies", GECCO 2011.
    Options: `NESOptions`.
    """


@drivers.register("xnes")
class XNES(_NES):
    """Exponential natural evolution strategy: a full covariance, for a few hundred dimensions (EvoTorch).

    Glasmachers et al., "Exponential natural evolution strategies", GECCO 2010. Options: `NESOptions`.
    """

    smallest_dim = 2


@drivers.register("pgpe")
class PGPE(_EvoTorch):
    """Policy gradient with parameter exploration: mirrored pairs, steps of limited length by ClipUp (EvoTorch).

    Sehnke et al., "Parameter-exploring policy gradients", Neural Networks 23(4), 2010; ClipUp: Toklu, Liskowski,
    Srivastava, PPSN 2020 (arXiv 2008.02387). Options: `PGPEOptions`.
    """

    Options = PGPEOptions
    options: PGPEOptions

    def _population_size(self) -> int:
        size = self.options.popsize
        if size is not None and size % 2:
            raise ConfigError(
                f"driver 'pgpe': candidates come in mirrored pairs; popsize {size} is odd, give {size + 1}"
            )
        return size or 2 * -(-default_popsize(self.dim) // 2)

    def _make(self, start: Array, seed: int) -> Any:
        options = self.options
        clipup = options.optimizer == "clipup"
        if options.max_speed is not None and not clipup:
            raise ConfigError("driver 'pgpe': max_speed is an option of optimizer: clipup only")
        speed = options.max_speed or options.sigma * self.dim**0.5 / 15
        return self._library().gaussian_steps(
            "pgpe", start, options.sigma, self.popsize, seed,
            center_learning_rate=options.center_learning_rate or (speed / 2 if clipup else options.sigma / 3),
            stdev_learning_rate=options.stdev_learning_rate,
            stdev_max_change=options.stdev_max_change,
            optimizer=options.optimizer,
            optimizer_config={"max_speed": speed} if clipup else None,
        )  # fmt: skip


@drivers.register("cem")
class CEM(_EvoTorch):
    """Cross-entropy method: a separable Gaussian, fitted to the best of each generation (EvoTorch).

    Rubinstein, "The cross-entropy method for combinatorial and continuous optimization", 1999; Duan et al., ICML 2016.
    Options: `CEMOptions`.
    """

    Options = CEMOptions
    options: CEMOptions

    def _make(self, start: Array, seed: int) -> Any:
        # A deviation needs two parents, and EvoTorch rounds down.
        if self.popsize < 3:
            raise ConfigError("driver 'cem': popsize: give at least 3 candidates, 2 of them parents")
        return self._library().gaussian_steps(
            "cem", start, self.options.sigma, self.popsize, seed,
            parenthood_ratio=max(self.options.parents, 2.5 / self.popsize),
            stdev_max_change=self.options.stdev_max_change,
        )  # fmt: skip
