"""Driver: proposes candidates and learns from their fitness; all drivers, by name."""

from __future__ import annotations

from typing import Any

from evomem.drivers.base import Array, Driver, Fitness, Population, Stage, drivers, uses
from evomem.drivers.block_cmaes import BlockCMAES
from evomem.drivers.cmaes import CMAES
from evomem.drivers.cmaes_library import LRACMA, CatCMA
from evomem.drivers.evolkv import EvolKV
from evomem.drivers.evotorch_searchers import CEM, PGPE, SNES, XNES, EvoTorchCMAES
from evomem.drivers.nsga2 import NSGA2
from evomem.drivers.policy_gradient import PolicyGradient
from evomem.drivers.random_search import RandomSearch
from evomem.drivers.subspace import SubspaceDriver
from evomem.drivers.warm import WarmStart

__all__ = [
    "CEM",
    "CMAES",
    "LRACMA",
    "NSGA2",
    "PGPE",
    "SNES",
    "XNES",
    "Array",
    "BlockCMAES",
    "CatCMA",
    "Driver",
    "EvoTorchCMAES",
    "EvolKV",
    "Fitness",
    "PolicyGradient",
    "Population",
    "RandomSearch",
    "Stage",
    "SubspaceDriver",
    "WarmStart",
    "build",
    "drivers",
    "uses",
]


def build(name: str, dim: int, start: Array, seed: int, **options: Any) -> Driver:
    """Return a new driver by name; raise `UnknownNameError`, or `ConfigError` for options that it does not have."""
    driver: Driver = drivers.get(name)(dim, start, seed, **options)
    return driver
