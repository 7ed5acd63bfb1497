"""Driver: one CMA-ES per head, side by side, and one for what all heads share.

Where the objective gives every KV head a fitness of its own, and a part of the vector acts on one head only, the search
in thousands of dimensions falls apart into many in a few dozen, all of which learn from the same evaluations. A
generation of such a *head-wise* stage moves all heads' parts and leaves the shared part where it is; in any other stage
the shared part moves, by the one fitness that there is, and the heads' parts stay.

Block-coordinate search under a fixed partition: Potter and De Jong, "A cooperative coevolutionary approach to function
optimization", PPSN 1994; EvolKV (arXiv 2509.08315) searches groups of layers one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from evomem.bounds import LARGE, SMALL
from evomem.drivers.base import Array, Fitness, Population, drivers
from evomem.drivers.cmaes import SMALLEST, alone, put_together, strategy, taken_apart
from evomem.drivers.common import (
    DriverOptions,
    check_told,
    checked_start,
    default_popsize,
    filled,
    parse_options,
    sampling_seeds,
)
from evomem.drivers.state import overlay
from evomem.errors import ConfigError

Blocks = Sequence[NDArray[np.int64]]


class BlockOptions(DriverOptions):
    """Options of `BlockCMAES`.

    Attributes
    ----------
    block_sigma : first step size of the heads' parts; ``sigma`` by default.
    shared_diagonal : separable covariance for the shared part.
    search : ``cmaes``, or ``random`` for the control: candidates are drawn around the start for ever, and the best
        seen so far (by its own generation's fitness) stands for the distribution's mean.
    """

    block_sigma: float | None = Field(default=None, ge=SMALL, le=LARGE)
    shared_diagonal: bool = True
    search: Literal["cmaes", "random"] = "cmaes"


class _Random:
    """Random search on one part, with the face of a pycma strategy."""

    def __init__(self, mean: Array, sigma: float, popsize: int, *seed: int) -> None:
        self._start, self._sigma, self._popsize = mean, sigma, popsize
        self._generator = np.random.default_rng(list(seed))
        self._best = -np.inf
        self.mean, self.sigma = mean, sigma

    def ask(self) -> list[Array]:
        draws = self._generator.standard_normal((self._popsize, len(self._start)))
        return list(self._start + self._sigma * draws)

    def tell(self, vectors: list[Array], losses: list[float], **_: Any) -> None:
        place = int(np.argmin(losses))
        if -losses[place] > self._best:
            self._best, self.mean = -losses[place], np.array(vectors[place])


@drivers.register("block_cmaes")
class BlockCMAES:
    """CMA-ES on every head's part of the vector and on the shared rest.

    Parameters
    ----------
    dim, start, seed : length of a vector, first mean (dim,), seed of everything random.
    blocks : for every (layer, kv head) in row-major order, the indices of its part of the vector
        (`SearchSpace.blocks`); without any, all is shared.
    options : `BlockOptions`.
    """

    takes_blocks = True
    packages = ("cma", "threadpoolctl")

    def __init__(self, dim: int, start: Array, seed: int, *, blocks: Blocks = (), **options: Any) -> None:
        self.dim = dim
        self.options = parse_options(BlockOptions, "block_cmaes", options)
        start = checked_start(dim, start)
        self._seed, self._generation = seed, 0
        self._blocks = [np.asarray(block, dtype=np.int64) for block in blocks]
        used = np.concatenate(self._blocks) if self._blocks else np.zeros(0, dtype=np.int64)
        if len(np.unique(used)) != len(used):
            raise ConfigError("driver 'block_cmaes': blocks overlap")
        if len(used) and (used.min() < 0 or used.max() >= dim):
            raise ConfigError(f"driver 'block_cmaes': blocks name coordinates outside 0..{dim - 1}")
        if self.options.search == "cmaes" and (self.options.popsize or SMALLEST) < SMALLEST:
            raise ConfigError(
                f"driver 'block_cmaes': popsize (driver.population): CMA-ES needs at least {SMALLEST} candidates (got "
                f"{self.options.popsize}); or use search: random"
            )
        if self.options.search == "cmaes" and any(len(block) < 2 for block in self._blocks):
            raise ConfigError(
                "driver 'block_cmaes': CMA-ES needs at least 2 dimensions, and a head has fewer of its own; give the "
                "manager more features, or use search: random"
            )
        self._shared = np.setdiff1d(np.arange(dim), used)
        largest = max((len(block) for block in [*self._blocks, self._shared]), default=2)
        self.popsize = self.options.popsize or default_popsize(max(largest, 2))
        spread = self.options.block_sigma or self.options.sigma
        self._strategies = [self._make(start[block], spread, False, n + 1) for n, block in enumerate(self._blocks)]
        self._rest = (
            self._make(start[self._shared], self.options.sigma, self.options.shared_diagonal, 0)
            if len(self._shared) > 1
            else None
        )
        self._fixed = start
        self._headwise = False
        self._asked: Population | None = None

    def _make(self, mean: Array, sigma: float, diagonal: bool, number: int) -> Any:
        if self.options.search == "random":
            return _Random(mean, sigma, self.popsize, self._seed, number)
        return strategy(mean, sigma, self.popsize, (self._seed, number, 7), diagonal=diagonal)

    def enter(self, *, headwise: bool) -> None:
        """Begin (or go on with) a stage whose objective has a fitness per head, or has none."""
        if headwise and not self._blocks:
            raise ConfigError(
                "driver 'block_cmaes': the objective has a fitness per head, but nothing in the search space belongs "
                "to one head; give the manager weights per head (feature_scorer: layers and heads)"
            )
        if not headwise and self._rest is None:
            raise ConfigError("driver 'block_cmaes': nothing in the search space is shared by the heads")
        if headwise != self._headwise and self._asked is not None:
            raise ConfigError("driver 'block_cmaes': a stage cannot change between ask() and tell()")
        self._headwise = headwise

    def ask(self) -> Population:
        """Return the next generation; the same one until it is told."""
        if self._asked is None:
            vectors = np.tile(self.mean, (self.popsize, 1))
            with alone():
                if self._headwise:
                    for block, one in zip(self._blocks, self._strategies, strict=True):
                        vectors[:, block] = np.array(one.ask(), dtype=np.float64)
                elif self._rest is not None:
                    vectors[:, self._shared] = np.array(self._rest.ask(), dtype=np.float64)
            seeds = sampling_seeds(self._seed, self._generation, self.popsize)
            self._asked = Population(self._generation, vectors, seeds)
        return self._asked

    def tell(self, population: Population, fitness: Fitness) -> None:
        """Learn from the fitness per head in a head-wise stage, and from the one fitness elsewhere."""
        check_told(self._asked, population)
        vectors, heads = population.vectors, fitness.per_head
        with alone():
            if self._headwise:
                if heads is None or heads.shape != (len(vectors), len(self._blocks)):
                    shape = None if heads is None else heads.shape
                    raise ConfigError(
                        f"driver 'block_cmaes': fitness of {len(self._blocks)} heads is expected, this has shape "
                        f"{shape}; do layers and heads of the search space fit the model?"
                    )
                # All before the first is told: a head whose fitness is refused must not leave the others a step ahead.
                losses = [-filled(column, len(vectors)) for column in heads.T]
                for block, one, loss in zip(self._blocks, self._strategies, losses, strict=True):
                    one.tell(list(vectors[:, block]), list(loss), check_points=False)
            elif self._rest is not None:
                loss = -filled(fitness.values, len(vectors))
                self._rest.tell(list(vectors[:, self._shared]), list(loss), check_points=False)
        self._asked = None
        self._generation += 1

    @property
    def mean(self) -> Array:
        """Means of all parts, put together (dim,)."""
        mean = self._fixed.copy()
        for block, one in zip(self._blocks, self._strategies, strict=True):
            mean[block] = np.array(one.mean, dtype=np.float64)
        if self._rest is not None:
            mean[self._shared] = np.array(self._rest.mean, dtype=np.float64)
        return mean

    @property
    def sigma(self) -> float:
        """Step size of the part that moves; the heads' median in a head-wise stage."""
        if self._headwise:
            return float(np.median([one.sigma for one in self._strategies]))
        return float(self._rest.sigma) if self._rest is not None else float("nan")

    def stopped(self) -> str | None:
        """None: noisy parts do not converge together; the generations of the experiment end the search."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return everything that an exact resume needs, as plain values and arrays."""
        return {
            "strategies": [taken_apart(one) for one in self._strategies],
            "rest": None if self._rest is None else taken_apart(self._rest),
            "generation": self._generation,
            "headwise": self._headwise,
            "asked": self._asked,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        restored = overlay if self.options.search == "random" else put_together
        pairs = zip(self._strategies, state["strategies"], strict=True)
        self._strategies = [restored(one, tree) for one, tree in pairs]
        if self._rest is not None:
            self._rest = restored(self._rest, state["rest"])
        self._generation, self._headwise = state["generation"], state["headwise"]
        self._asked = state["asked"]
