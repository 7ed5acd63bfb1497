"""Driver: what all drivers share: options, generators that can be saved, fitness without holes."""

from __future__ import annotations

from importlib import import_module
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from evomem.bounds import LARGE, POPULATION, SMALL
from evomem.errors import ConfigError, FitnessError
from evomem.installing import pip_install
from evomem.validation import Settings, faults

Array = NDArray[np.float64]


class DriverOptions(Settings):
    """Options that every driver has.

    Attributes
    ----------
    sigma : first step size, in units of the vector.
    popsize : candidates of a generation; by default 4 + 3 ln(dim), pycma's.
    """

    sigma: float = Field(default=0.3, ge=SMALL, le=LARGE)
    popsize: int | None = Field(default=None, ge=2, le=POPULATION)


O = TypeVar("O", bound=DriverOptions)  # noqa: E741


def parse_options(model: type[O], driver: str, options: dict[str, Any]) -> O:
    """Return validated options; None stands for the default. Raise `ConfigError` with one line per fault."""
    try:
        return model(**{key: value for key, value in options.items() if value is not None})
    except ValidationError as error:
        known = ", ".join(model.model_fields)
        lines = "; ".join(_named(fault) for fault in faults(error, model))
        raise ConfigError(f"driver {driver!r}: {lines}. Its options: {known}") from None


def _named(fault: str) -> str:
    """Return a fault with its option as users know it: two of them stand beside the driver's name."""
    name, _, rest = fault.partition(": ")
    return {"popsize": "popsize (driver.population)", "sigma": "sigma (driver.sigma)"}.get(name, name) + f": {rest}"


def library(module: str, driver: str, extra: str = "search") -> Any:
    """Return an optional library's module; raise `ConfigError` that says how to install it if it is missing."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"driver {driver!r} needs the package {error.name}, which is not installed: {pip_install(extra)}"
        ) from None


def checked_start(dim: int, start: Array) -> Array:
    """Return the start vector as float64 (dim,); raise `ConfigError` for another shape or numbers not finite."""
    start = np.array(start, dtype=np.float64)
    if start.shape != (dim,) or not np.isfinite(start).all():
        raise ConfigError(f"driver: a start of {dim} finite numbers is expected, this has shape {start.shape}")
    return start


def default_popsize(dim: int) -> int:
    """Return CMA-ES's default population: 4 + floor(3 ln dim) (Hansen, arXiv 1604.00772, eq. 48)."""
    return 4 + int(3 * np.log(dim))


def sampling_seeds(seed: int, generation: int, count: int) -> NDArray[np.int64]:
    """Return one sampling seed per candidate: a pure function of (search seed, generation, candidate)."""
    return np.random.default_rng([seed, generation, 1]).integers(0, 2**62, count, dtype=np.int64)


def filled(fitness: Array, count: int) -> Array:
    """Return fitness (candidates,) with every NaN and infinity replaced by the worst finite value.

    Raises
    ------
    ConfigError : another number of values than candidates.
    FitnessError : no value is finite.
    """
    fitness = np.array(fitness, dtype=np.float64)
    if fitness.shape != (count,):
        raise ConfigError(f"driver: {count} fitness values are expected, this has shape {fitness.shape}")
    finite = np.isfinite(fitness)
    if not finite.any():
        raise FitnessError("all candidates of the generation failed (their fitness is NaN or infinite)")
    return np.where(finite, fitness, fitness[finite].min())


class Gaussian:
    """Standard normal numbers from a generator of its own, which is saved; pycma's default is numpy's global one."""

    def __init__(self, *seed: int) -> None:
        self._generator = np.random.default_rng(list(seed))

    def __call__(self, *shape: int) -> Array:
        """Return numbers of the given shape."""
        return self._generator.standard_normal(shape)
