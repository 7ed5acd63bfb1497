"""Evaluation: what an evaluation is worth. One objective is one registered class in one file of this folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from evomem.errors import ConfigError
from evomem.evaluation.measurement import Evaluation, Measurement, Quantity
from evomem.registry import Registry

Array = NDArray[np.float64]

ROLLOUT = Quantity("rollout")
"""Decisions drawn at random, with the gradient of their likelihood."""


class Objective(ABC):
    """What one evaluation is worth, and what has to be measured for it.

    A subclass sets `measurement` and implements `value`; the rest is for objectives that can do more.

    Attributes
    ----------
    measurement : what the evaluator measures.
    rollout_measurement : what the evaluator measures for a policy gradient; None: the objective is for evolution only.
    exact_gradient : ``rollout_measurement`` gives the gradient itself, so that nothing need be drawn.
    compares_draws : the rollouts on a sample are compared where they are drawn, and must be one unit of work.
    per_head_value : the name of the value that every KV head has of its own; None: there is none.
    per_head_sign : 1 if more of it is better, -1 if less is.
    unit : of the fitness, for people.
    against_full : how a value is set against the full cache's (``fitness.normalise: full``): by a difference, by a
        ratio, or not at all.
    without_context : the quantity that is the same value of a reader who has read nothing (``fitness.normalise:
        range``); None: there is none.
    protocols : under which it can be measured.
    """

    measurement: ClassVar[Measurement]
    rollout_measurement: ClassVar[Measurement | None] = None
    exact_gradient: ClassVar[bool] = False
    compares_draws: ClassVar[bool] = False
    per_head_value: ClassVar[str | None] = None
    per_head_sign: ClassVar[Literal[1, -1]] = 1
    unit: ClassVar[str] = ""
    against_full: ClassVar[Literal["subtract", "divide", "nothing"]] = "subtract"
    without_context: ClassVar[str | None] = None
    protocols: ClassVar[frozenset[str]] = frozenset({"compress_once", "streaming"})

    @abstractmethod
    def value(self, evaluation: Evaluation) -> float:
        """Return what an evaluation is worth, larger is better; NaN if it has no result."""

    def per_head(self, evaluation: Evaluation) -> Array | None:
        """Return what every head's decision is worth (layers * kv_heads,), larger is better; None without a result."""
        if self.per_head_value is None:
            return None
        table = evaluation.table(self.per_head_value)
        return None if table is None else self.per_head_sign * np.ravel(np.asarray(table, dtype=np.float64))

    def variance(self, values: Array) -> Array:
        """Return how much every candidate's values vary from sample to sample, relative to the others': (candidates,).

        It is what common random numbers leave: with v the values and d = v - (mean over candidates) the paired
        differences, var_s(d); NaN with one sample.

        Parameters
        ----------
        values : (candidates, samples), NaN where there is no result.
        """
        samples = values.shape[1]
        good = values[np.isfinite(values).all(axis=1)]
        paired = values - (good.mean(axis=0) if len(good) else np.nan)
        spread = paired.var(axis=1, ddof=1) if samples > 1 else np.full(len(values), np.nan)
        return np.asarray(spread, dtype=np.float64)

    @property
    def headwise(self) -> bool:
        """Whether every KV head has a fitness of its own."""
        return self.per_head_value is not None

    @property
    def feeds(self) -> frozenset[str]:
        """Parts of `evomem.drivers.base.Fitness` that the objective gives besides the values; always the costs."""
        parts = {"per_head": self.headwise, "rollouts": self.rollout_measurement is not None}
        return frozenset({"costs", *(name for name, available in parts.items() if available)})


class PerHeadMean(Objective):
    """The mean over all layers and heads of a value that every head has."""

    def value(self, evaluation: Evaluation) -> float:
        """Return the mean of the table, with its sign."""
        table = evaluation.table(str(self.per_head_value))
        return float("nan") if table is None else self.per_head_sign * float(np.mean(table))


objectives: Registry[type[Objective]] = Registry("objective", "evomem.objectives")
"""Registry of objectives; ``fitness.objective`` of an experiment names one."""

register_objective = objectives.register


def make(name: str) -> Objective:
    """Return the objective called ``name``.

    Raises
    ------
    UnknownNameError : no objective has that name.
    ConfigError : its class does not say what it measures.
    """
    kind = objectives.get(name)
    if not isinstance(getattr(kind, "measurement", None), Measurement):
        raise ConfigError(f"objective {name!r}: {kind.__qualname__} has no measurement; say what has to be measured")
    return kind()
