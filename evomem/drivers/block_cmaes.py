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
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from evomem.bounds import LARGE, SMALL
from evomem.drivers.base import Array, Driver, Fitness, Stage, drivers
from evomem.drivers.cmaes import SMALLEST, restore_strategy, single_threaded, snapshot_strategy, strategy
from evomem.drivers.common import DriverOptions, default_popsize, filled
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
    """Random search on one part, with the methods of a pycma strategy."""

    def __init__(self, mean: Array, sigma: float, popsize: int, *seed: int) -> None:
        self._start, self._sigma, self._popsize = mean, sigma, popsize
        self._generator = np.random.default_rng(list(seed))
        self._best = -np.inf
        self.mean, self.sigma = mean, sigma

    def ask(self) -> list[Array]:
        draws = self._generator.standard_normal((self._popsize, len(self._start)))
        return list(self._start + self._sigma * draws)

    def tell(self, vectors: list[Array], losses: list[float], **_: Any) -> None:
        best = int(np.argmin(losses))
        if -losses[best] > self._best:
            self._best, self.mean = -losses[best], np.array(vectors[best])


@drivers.register("block_cmaes")
class BlockCMAES(Driver):
    """CMA-ES on every head's part of the vector and on the shared rest.

    Parameters
    ----------
    dim, start, seed : length of a vector, first mean (dim,), seed of everything random.
    blocks : for every (layer, kv head) in row-major order, the indices of its part of the vector
        (`SearchSpace.blocks`); without any, all is shared.
    options : `BlockOptions`.
    """

    Options = BlockOptions
    uses = frozenset({"per_head"})
    takes = frozenset({"blocks"})
    packages = ("cma", "threadpoolctl")
    options: BlockOptions

    def __init__(self, dim: int, start: Array, seed: int, *, blocks: Blocks = (), **options: Any) -> None:
        super().__init__(dim, start, seed, **options)
        start = self.start
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
        self._headwise = False

    def _make(self, mean: Array, sigma: float, diagonal: bool, number: int) -> Any:
        if self.options.search == "random":
            return _Random(mean, sigma, self.popsize, self.seed, number)
        return strategy(mean, sigma, self.popsize, (self.seed, number, 7), diagonal=diagonal)

    def _enter(self, stage: Stage) -> None:
        headwise = stage.per_head
        if headwise and not self._blocks:
            raise ConfigError(
                "driver 'block_cmaes': the objective has a fitness per head, but nothing in the search space belongs "
                "to one head; give the manager weights per head (feature_scorer: layers and heads)"
            )
        if not headwise and self._rest is None:
            raise ConfigError("driver 'block_cmaes': nothing in the search space is shared by the heads")
        self._headwise = headwise

    def _ask(self) -> Array:
        vectors = np.tile(self.mean, (self.popsize, 1))
        with single_threaded():
            if self._headwise:
                for block, one in zip(self._blocks, self._strategies, strict=True):
                    vectors[:, block] = np.array(one.ask(), dtype=np.float64)
            elif self._rest is not None:
                vectors[:, self._shared] = np.array(self._rest.ask(), dtype=np.float64)
        return vectors

    def _without_holes(self, fitness: Fitness, count: int) -> Fitness:
        if not self._headwise or fitness.per_head is None:
            return super()._without_holes(fitness, count)
        heads = fitness.per_head
        if heads.shape[1] != len(self._blocks):
            raise ConfigError(
                f"driver 'block_cmaes': fitness of {len(self._blocks)} heads is expected, this has shape "
                f"{heads.shape}; do layers and heads of the search space fit the model?"
            )
        # All before the first is told: a head whose fitness is refused must not leave the others a step ahead.
        return replace(fitness, per_head=np.stack([filled(column, count) for column in heads.T], axis=1))

    def _tell(self, vectors: Array, fitness: Fitness) -> None:
        with single_threaded():
            if self._headwise and fitness.per_head is not None:
                for block, one, column in zip(self._blocks, self._strategies, fitness.per_head.T, strict=True):
                    one.tell(list(vectors[:, block]), list(-column), check_points=False)
            elif self._rest is not None:
                self._rest.tell(list(vectors[:, self._shared]), list(-fitness.values), check_points=False)

    def _mean(self) -> Array:
        """Return the means of all parts, put together (dim,)."""
        mean = self.start.copy()
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

    def _state(self) -> dict[str, Any]:
        return {
            "strategies": [snapshot_strategy(one) for one in self._strategies],
            "rest": None if self._rest is None else snapshot_strategy(self._rest),
            "headwise": self._headwise,
        }

    def _load(self, state: dict[str, Any]) -> None:
        restored = overlay if self.options.search == "random" else restore_strategy
        pairs = zip(self._strategies, state["strategies"], strict=True)
        self._strategies = [restored(one, tree) for one, tree in pairs]
        if self._rest is not None:
            self._rest = restored(self._rest, state["rest"])
        self._headwise = state["headwise"]
