"""Task: three moons: series of bodies that go round, to be continued from what was seen.

Source: Zhang et al. 2024, "Memory Mosaics" (arXiv 2405.06394), section on three moons and its published code: a network
trained on some triples of periods must predict moons with other periods, once it has seen them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import lcm

import numpy as np
from numpy.typing import NDArray

from evomem.errors import TaskError
from evomem.tasks.base import Split

PERIODS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5)
MOONS = 3
PHASE = 0.3
"""Angle of every moon at time 0, in radians."""
SHARE = 4
"""The published triples are the quarter (and one more) of all whose bodies meet again the soonest."""

Complex = NDArray[np.complex64]


@dataclass(frozen=True)
class Orbits:
    """Moons, and how often they are observed.

    Attributes
    ----------
    periods : of each moon, multiples of one half.
    rate : observations in a unit of time.
    planet : the last body is where one observes from, and its own path is seen from the sun; else all are.
    """

    periods: tuple[float, ...]
    rate: float
    planet: bool = False

    @property
    def longest(self) -> float:
        """The longest period, in observations: after it, every moon by itself has been seen once around."""
        return max(self.periods) * self.rate

    @property
    def together(self) -> float:
        """Observations until all moons stand as they did, the least common multiple of their periods."""
        return common_multiple(self.periods) * self.rate

    def series(self, length: int, start: int = 0) -> Complex:
        """Return places (length, moons) on the unit circle as complex numbers, from observation ``start`` on."""
        time = (np.arange(length) + start)[:, None] / self.rate
        angle = 2 * np.pi * time / np.array(self.periods) + PHASE
        places = np.exp(1j * angle)
        if self.planet:
            places[:, :-1] -= places[:, -1:]
        series: Complex = places.astype(np.complex64)
        return series


def common_multiple(periods: tuple[float, ...]) -> float:
    """Return the least common multiple of periods that are multiples of one half."""
    return lcm(*(round(2 * period) for period in periods)) / 2


def triples(split: Split) -> list[tuple[float, ...]]:
    """Return a split's triples of periods: the one with the largest common multiple is sealed, the next selects.

    The published code trains on the eight that are not sealed here.
    """
    ranked = sorted(combinations(PERIODS, MOONS), key=lambda triple: (common_multiple(triple), triple))
    chosen = ranked[: len(ranked) // SHARE + 1]
    return {Split.TRAIN: chosen[:-2], Split.SELECT: chosen[-2:-1], Split.SEALED: chosen[-1:]}[Split(split)]


def orbits(
    split: Split, length: int = 800, repeats: int = 3, whole: bool = False, planet: bool = False
) -> list[Orbits]:
    """Return a split's moons, observed so often that in ``length`` observations all come back ``repeats`` times.

    Parameters
    ----------
    whole : every period is a whole number of observations, so that what was seen comes back exactly.

    Raises
    ------
    TaskError : too short to tell the shortest period's observations apart.
    """
    slowest = max(common_multiple(triple) for part in Split for triple in triples(part))
    rate = length / slowest / repeats
    if whole:
        rate = 2.0 * int(rate / 2)
    if min(PERIODS) * rate < 2:
        raise TaskError(
            f"three moons: {length} observations for {repeats} times {slowest:g} units of time leave "
            f"{min(PERIODS) * rate:.2g} observations for the shortest period; ask for more, or for fewer repeats"
        )
    return [Orbits(triple, rate, planet) for triple in triples(split)]
