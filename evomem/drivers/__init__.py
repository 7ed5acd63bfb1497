"""Driver: proposes candidates and learns from their fitness; all drivers, by name."""

from __future__ import annotations

from typing import Any

from evomem.drivers.base import Array, Driver, Population, drivers
from evomem.drivers.block_cmaes import BlockCMAES
from evomem.drivers.cmaes import CMAES
from evomem.drivers.evotorch_searchers import CEM, PGPE, SNES, XNES, EvoTorchCMAES
from evomem.drivers.random_search import RandomSearch

__all__ = [
    "CEM",
    "CMAES",
    "PGPE",
    "SNES",
    "XNES",
    "Array",
    "BlockCMAES",
    "Driver",
    "EvoTorchCMAES",
    "Population",
    "RandomSearch",
    "build",
    "drivers",
]


def build(name: str, dim: int, start: Array, seed: int, **options: Any) -> Driver:
    """Return a new driver by name; raise `UnknownNameError`, or `ConfigError` for options that it does not have."""
    driver: Driver = drivers.get(name)(dim, start, seed, **options)
    return driver
