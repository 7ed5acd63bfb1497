"""Driver: those that learn from more than one fitness a candidate, and how to tell them apart."""

from __future__ import annotations

from typing import Protocol, TypeGuard

from evomem.drivers.base import Driver


class PolicyDriver(Driver, Protocol):
    """Learns from rollouts of one policy, which hold gradients (`PolicyGradient`)."""

    takes_rollouts: bool

    def enter(self, *, begin: int, end: int, exact: bool) -> None:
        """Begin, or go on with, the stage of generations ``begin`` to ``end``."""
        ...


class HeadwiseDriver(Driver, Protocol):
    """Searches every KV head's part of the vector by itself, where the objective allows it (`BlockCMAES`)."""

    def enter(self, *, headwise: bool) -> None:
        """Begin, or go on with, a stage whose objective has a fitness per head, or has none."""
        ...


def is_policy_driver(driver: object) -> TypeGuard[PolicyDriver]:
    """Return whether a driver, or a class of drivers, learns from rollouts."""
    return bool(getattr(driver, "takes_rollouts", False))


def is_headwise_driver(driver: object) -> TypeGuard[HeadwiseDriver]:
    """Return whether a driver, or a class of drivers, can search head by head."""
    return hasattr(driver, "enter") and not is_policy_driver(driver)
