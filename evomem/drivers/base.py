"""Driver: proposes candidates and learns from their fitness. Public ``ask`` and ``tell`` are written once, here.

A new driver is one class: its algorithm in ``_ask`` and ``_tell``, and nothing else (`RandomSearch` is the shortest).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any, ClassVar, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from evomem.drivers.common import (
    Array,
    DriverOptions,
    checked_start,
    default_popsize,
    filled,
    parse_options,
    sampling_seeds,
)
from evomem.drivers.fitness import Fitness, Part, Stage
from evomem.drivers.state import overlay, snapshot, unsaved_classes
from evomem.errors import ConfigError, RunError
from evomem.registry import Registry

__all__ = ["Array", "Driver", "Fitness", "Part", "Population", "Stage", "drivers", "uses"]

_TAKES = ("blocks", "variables", "warm")
_BASE = frozenset(
    {"dim", "seed", "generation", "options", "start", "popsize", "diagnostics", "rng"}
    | {"_pending", "_stage", "_stopped", "_last_finite_mean", "_best", "_best_fitness"}
)
"""Attributes of the base class: a resume makes them again, or they are saved by `Driver.state_dict`."""


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

    def copy(self) -> Population:
        """Return an independent copy."""
        arrays: dict[str, Any] = {k: v.copy() for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        return replace(self, **arrays)


class Driver(ABC):
    """Ask for candidates, tell their fitness.

    A subclass writes `_ask` and `_tell`. It may write `_mean` (by default the best candidate so far), `_enter`, and
    `_state` and `_load` (by default all of its attributes are saved). It finds ``dim``, ``start`` (dim,), ``seed``,
    ``popsize``, ``options``, ``generation`` (counted from 0) and ``rng`` (a generator of its own) ready.

    Parameters
    ----------
    dim, start, seed : length of a vector, first vector (dim,), seed of everything random.
    options : of ``Options``.

    Attributes
    ----------
    name : in the registry.
    Options : model of the options.
    uses : parts of `Fitness` that it learns from besides the values. It is never told without them: costs and rollouts
        always, per_head in a stage whose objective has it. Parts that it does not use are not looked at.
    takes : what its constructor takes besides the options: ``blocks`` (`SearchSpace.blocks`), ``variables``
        (`SearchSpace.variables`), ``warm`` (a `WarmStart`).
    packages : what it needs that the plain install does not have.
    smallest_dim : dimensions that it needs.
    diagnostics : numbers about the last step, by name, for the journal.
    """

    name: ClassVar[str]
    Options: ClassVar[type[DriverOptions]] = DriverOptions
    uses: ClassVar[frozenset[Part]] = frozenset()
    takes: ClassVar[frozenset[str]] = frozenset()
    packages: ClassVar[tuple[str, ...]] = ()
    smallest_dim: ClassVar[int] = 1

    options: DriverOptions
    diagnostics: Mapping[str, float]

    def __init__(self, dim: int, start: Array, seed: int, **options: Any) -> None:
        if dim < self.smallest_dim:
            raise ConfigError(
                f"driver {self.name!r}: needs at least {self.smallest_dim} dimensions, this space has {dim}; use "
                "random_search"
            )
        self.dim, self.seed, self.generation = dim, seed, 0
        self.options = parse_options(self.Options, self.name, options)
        self.start = checked_start(dim, start)
        self.popsize = self._population_size()
        self.diagnostics = {}
        self._pending: Population | None = None
        self._stage: Stage | None = Stage()
        self._stopped: str | None = None
        self._last_finite_mean: Array | None = None  # of a search that has degenerated
        self._best, self._best_fitness = self.start.copy(), -np.inf
        self.rng = np.random.default_rng([seed, 6])

    # ---- what a subclass writes ---------------------------------------------------------------------------------

    @abstractmethod
    def _ask(self) -> Array:
        """Return the vectors of the next generation (candidates, dim)."""

    @abstractmethod
    def _tell(self, vectors: Array, fitness: Fitness) -> None:
        """Learn from the fitness of the vectors that `_ask` returned; every value is finite (`_without_holes`)."""

    def _mean(self) -> Array:
        """Return the distribution's centre (dim,); by default the best vector so far, at first the start."""
        return self._best

    def _enter(self, stage: Stage) -> None:  # noqa: B027  (most drivers are the same in every stage)
        """Begin, or go on with, a stage; raise `ConfigError` if it cannot be searched."""

    def _population_size(self) -> int:
        return self.options.popsize or default_popsize(self.dim)

    def _population(self, vectors: Array) -> Population:
        seeds = sampling_seeds(self.seed, self.generation, len(vectors))
        return Population(self.generation, vectors, seeds)

    def _without_holes(self, fitness: Fitness, count: int) -> Fitness:
        """Return the fitness that `_tell` gets: a candidate without a finite value counts as the worst.

        Raises
        ------
        FitnessError : no candidate has a finite value.
        """
        return replace(fitness, values=filled(fitness.values, count))

    def _finite(self) -> bool:
        """Return whether the search can go on: its distribution is of finite numbers."""
        return bool(np.isfinite(self._mean()).all())

    def _state(self) -> dict[str, Any]:
        """Return what an exact resume needs of the subclass: all attributes that it has made."""
        tree = snapshot(self._subclass_attributes())
        classes = unsaved_classes(tree)
        if classes:
            raise ConfigError(
                f"driver {self.name!r}: attributes hold what cannot be saved ({', '.join(classes)}); keep plain "
                "values, arrays and generators, or write _state and _load"
            )
        return {"own": tree}

    def _load(self, state: dict[str, Any]) -> None:
        """Continue from `_state`."""
        vars(self).update(overlay(self._subclass_attributes(), state["own"], (Population, Stage)))

    def _subclass_attributes(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _BASE}

    @classmethod
    def _current(cls, state: dict[str, Any]) -> dict[str, Any]:
        """Return a state of an earlier version in the form that `state_dict` gives today."""
        return state

    # ---- what everybody calls -----------------------------------------------------------------------------------

    def enter(self, stage: Stage) -> None:
        """Begin, or go on with, a stage of the search.

        Raises
        ------
        ConfigError : this driver cannot search what the stage measures; or the stage changes between ask and tell.
        """
        if self._pending is not None and self._stage is not None and stage != self._stage:
            raise ConfigError(f"driver {self.name!r}: a stage cannot change between ask() and tell()")
        self._enter(stage)
        self._stage = stage

    def ask(self) -> Population:
        """Return the next generation; asking again before `tell` returns the same one."""
        if self._pending is None:
            vectors = np.array(self._ask(), dtype=np.float64)
            if vectors.ndim != 2 or vectors.shape[1] != self.dim or not len(vectors):
                raise ConfigError(
                    f"driver {self.name!r}: proposes vectors of shape {vectors.shape}; (candidates, {self.dim}) is "
                    "expected"
                )
            if self._stopped is None and not np.isfinite(vectors).all():
                raise ConfigError(f"driver {self.name!r}: proposes vectors that are not finite")
            self._pending = self._population(vectors)
        return self._pending.copy()

    def tell(self, population: Population, fitness: Fitness) -> None:
        """Learn from the fitness of the population that was asked last. A refused call leaves the driver as it was.

        Raises
        ------
        ConfigError : another population than the one last asked, another number of values than candidates, or without
            a part that the driver uses.
        FitnessError : no candidate has a result.
        """
        asked = self._pending
        if asked is None:
            raise ConfigError(f"driver {self.name!r}: tell() without ask()")
        if (
            population.generation != asked.generation
            or not np.array_equal(population.vectors, asked.vectors)
            or not np.array_equal(population.seeds, asked.seeds)
        ):
            raise ConfigError(
                f"driver {self.name!r}: tell() of generation {population.generation}, which is not the population "
                f"last asked (generation {asked.generation}), or was changed since"
            )
        self._check_fitness(fitness, len(asked.vectors))
        fitness, before = self._without_holes(fitness, len(asked.vectors)), self.mean
        self._tell(asked.vectors.copy(), fitness)
        if type(self)._mean is Driver._mean:
            self._remember(asked.vectors, fitness.values)
        self._pending = None
        self.generation += 1
        if not self._finite():
            self._stopped, self._last_finite_mean = "the distribution is no longer finite", before

    def _check_fitness(self, fitness: Fitness, count: int) -> None:
        if not isinstance(fitness, Fitness):
            raise ConfigError(
                f"driver {self.name!r}: tell() takes evomem.drivers.Fitness(values), this is {type(fitness).__name__}"
            )
        fitness.check(self.name, count)
        per_head = self._stage is not None and self._stage.per_head
        missing = [part for part in self.uses if not fitness.has(part) and (per_head or part != "per_head")]
        if missing:
            raise ConfigError(
                f"driver {self.name!r}: learns from {', '.join(sorted(missing))} (`Fitness`), and is told none; take "
                "an objective that measures it, or another driver"
            )

    def _remember(self, vectors: Array, values: Array) -> None:
        """Remember the best vector; the first of equals."""
        best = int(np.argmax(values))
        if values[best] > self._best_fitness:
            self._best, self._best_fitness = vectors[best].copy(), float(values[best])

    @property
    def mean(self) -> Array:
        """The distribution's centre (dim,), always finite: what the search believes in, not its luckiest sample."""
        return np.array(self._mean() if self._last_finite_mean is None else self._last_finite_mean, dtype=np.float64)

    @property
    def sigma(self) -> float:
        """Step size, in units of the vector; by default the first one."""
        return self.options.sigma

    def stopped(self) -> str | None:
        """Why the driver has nothing more to propose, or None."""
        return self._stopped

    def state_dict(self) -> dict[str, Any]:
        """Return everything that an exact resume needs, between ask and tell or after tell.

        It goes into a file: plain values, arrays, `Population`, and what `evomem.drivers.state.snapshot` takes apart.
        """
        state: dict[str, Any] = {
            "driver": self.name,
            "generation": self.generation,
            "asked": None if self._pending is None else self._pending.copy(),
            "stage": None if self._stage is None else list(astuple(self._stage)),
            "stopped": self._stopped,
            "kept": None if self._last_finite_mean is None else self._last_finite_mean.copy(),
            "rng": snapshot(self.rng),
        }
        if type(self)._mean is Driver._mean:
            state |= {"best": self._best.copy(), "best_fitness": self._best_fitness}
        return {**state, **self._state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state made by `state_dict`, of this version or of an earlier one.

        Raises
        ------
        RunError : the state is another driver's, or lacks something.
        """
        if state.get("driver", self.name) != self.name:
            raise RunError(f"the state is of driver {state['driver']!r}, and this is {self.name!r}")
        try:
            state = self._current(state)
            self._load(state)
            self.generation = state["generation"]
            asked, stage, kept = state["asked"], state.get("stage"), state.get("kept")
            if type(self)._mean is Driver._mean:
                self._best = np.array(state["best"], dtype=np.float64)
                self._best_fitness = state["best_fitness"]
        except KeyError as error:
            raise RunError(f"the state of driver {self.name!r} has no {error}: of another version of evomem?") from None
        if "rng" in state:
            self.rng = overlay(self.rng, state["rng"])
        self._stage = None if stage is None else Stage(*stage)
        self._stopped = state.get("stopped")
        self._last_finite_mean = None if kept is None else np.array(kept, dtype=np.float64)
        # Earlier versions kept only whether a population was asked, where it follows from the rest.
        self._pending = asked.copy() if isinstance(asked, Population) else None
        if asked is True:
            self.ask()


D = TypeVar("D", bound=type)


class _Drivers(Registry[type[Driver]]):
    def register(self, name: str) -> Callable[[D], D]:
        """Return a class decorator that files a subclass of `Driver` under ``name``.

        Raises
        ------
        ConfigError : the name is taken, or the class is no driver.
        """
        file = super().register(name)

        def checked(cls: D) -> D:
            if not issubclass(cls, Driver):
                raise ConfigError(f"driver {name!r}: {cls.__qualname__} is no subclass of evomem.drivers.Driver")
            for attribute, known in (("uses", get_args(Part)), ("takes", _TAKES)):
                unknown = sorted(set(getattr(cls, attribute)) - set(known))
                if unknown:
                    raise ConfigError(f"driver {name!r}: {attribute}: {unknown[0]!r} is none of {', '.join(known)}")
            file(cls)
            cls.name = name
            return cls

        return checked


drivers = _Drivers("driver", "evomem.drivers")
"""Registry of drivers; classes take ``(dim, start, seed, **options)``."""


def uses(name: str, part: Part) -> bool:
    """Return whether a driver, by name, learns from a part of `Fitness` besides the values."""
    return part in drivers.get(name).uses
