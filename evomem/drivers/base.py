"""Driver: proposes candidates and learns from their fitness."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from evomem.registry import Registry

if TYPE_CHECKING:
    from evomem.drivers.estimators import Rollouts

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Population:
    """The candidates of one generation.

    Attributes
    ----------
    generation : counted from 0.
    vectors : (candidates, dim) float64.
    seeds : (candidates,) int64, the sampling seed of each candidate (only stochastic managers use it).
    draw : number of the minibatch that it is measured on, counted like generations; None: its own generation's.
    behaviour : (dim,) the policy that draws the rollouts, if it is not the candidates' own.
    reference : (dim,) a policy whose distance is measured on the way.
    learns : (learned,) int64, the coordinates that gradients are wanted of; None: all.
    """

    generation: int
    vectors: Array
    seeds: NDArray[np.int64]
    draw: int | None = None
    behaviour: Array | None = None
    reference: Array | None = None
    learns: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Fitness:
    """What came of a generation: all that a driver may learn from.

    Attributes
    ----------
    values : (candidates,) float64, larger is better; NaN or infinite: no result.
    per_head : (candidates, layers * kv_heads) the same of every KV head by itself; None: the objective has none.
    costs : (candidates,) measured bytes, smaller is better; None: not measured.
    rollouts : a group of rollouts per sample and budget, for a policy gradient; empty: none were measured.
    """

    values: Array
    per_head: Array | None = None
    costs: Array | None = None
    rollouts: tuple[Rollouts, ...] = ()


class Driver(Protocol):
    """Ask for candidates, tell their fitness (larger is better).

    ``state_dict`` is taken between ``ask`` and ``tell`` or after ``tell``; a driver that loaded it continues
    bit-exactly. It goes into a file: plain values, arrays, tensors, `Population`, and what
    `evomem.drivers.state.snapshot` takes apart; no pickles. NaN fitness means "no result" and must be survived.
    """

    dim: int

    def ask(self) -> Population:
        """Return the next generation; asking again before ``tell`` returns the same one."""
        ...

    def tell(self, population: Population, fitness: Fitness) -> None:
        """Learn from what came of the population that was asked last."""
        ...

    @property
    def mean(self) -> Array:
        """The distribution's centre (dim,): what the search believes in, as against its luckiest sample."""
        ...

    def stopped(self) -> str | None:
        """Why the driver has nothing more to propose, or None."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact resume needs."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state made by ``state_dict``."""
        ...


drivers: Registry[type] = Registry("driver", "evomem.drivers")
"""Registry of drivers; classes take ``(dim, start, seed, **options)``.

A class may name in ``packages`` (a tuple) what it needs that the plain install does not have.
"""
