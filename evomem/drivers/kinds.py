"""Driver: those that learn from more than one fitness a candidate, and how to tell them apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeGuard

from evomem.drivers.base import Array, Driver, Population
from evomem.drivers.estimators import Rollouts


class PolicyDriver(Driver, Protocol):
    """Learns from rollouts of one policy, which hold gradients (`PolicyGradient`)."""

    takes_rollouts: bool

    def enter(self, *, begin: int, end: int, exact: bool) -> None:
        """Begin, or go on with, the stage of generations ``begin`` to ``end``."""
        ...

    def tell(self, population: Population, fitness: Array, rollouts: Sequence[Rollouts] = ()) -> None:
        """Learn from fitness (candidates,) and a group of rollouts per sample and budget."""
        ...


class HeadwiseDriver(Driver, Protocol):
    """Searches every KV head's part of the vector by itself, where the objective allows it (`BlockCMAES`)."""

    def enter(self, *, headwise: bool) -> None:
        """Begin, or go on with, a stage whose objective has a fitness per head, or has none."""
        ...

    def tell(self, population: Population, fitness: Array, heads: Array | None = None) -> None:
        """Learn from fitness (candidates,) or, in a head-wise stage, heads (candidates, layers * kv_heads)."""
        ...


class FrontDriver(Driver, Protocol):
    """Looks for a front of fitness against bytes (`NSGA2`)."""

    def tell(self, population: Population, fitness: Array, costs: Array | None = None) -> None:
        """Learn from fitness (candidates,), larger is better, and costs (candidates,), smaller is better."""
        ...


def is_policy_driver(driver: object) -> TypeGuard[PolicyDriver]:
    """Return whether a driver, or a class of drivers, learns from rollouts."""
    return bool(getattr(driver, "takes_rollouts", False))


def is_headwise_driver(driver: object) -> TypeGuard[HeadwiseDriver]:
    """Return whether a driver, or a class of drivers, can search head by head."""
    return hasattr(driver, "enter") and not is_policy_driver(driver)
