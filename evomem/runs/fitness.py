"""Run: from evaluations to a fitness per candidate, and how much of its spread is noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from evomem.drivers.base import Fitness
from evomem.drivers.estimators import Rollouts, rewards_to_go
from evomem.errors import ConfigError
from evomem.evaluation.measurement import Evaluation, Measurement
from evomem.evaluation.objectives.base import Objective, make
from evomem.runs.experiment_parts import FitnessConfig

Array = NDArray[np.float64]


# A task at which the full cache itself almost always fails would rule a sum of ratios (specification of NAMM, faults).
_SMALLEST_BASELINE = 0.1

_PLAIN = make("loglik")
"""Reckons noise as most objectives do."""


def mean_of_finite(values: Array) -> float:
    """Return the mean of what is finite, NaN if nothing is."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan


def weighted_mean(pairs: Sequence[tuple[float, float]]) -> float:
    """Return the mean of (value, weight) pairs; NaN if a value is."""
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)


def objective_of(config: FitnessConfig) -> Objective:
    """Return the objective that an experiment names; raise `UnknownNameError` otherwise."""
    return make(config.objective)


def measurement_of(config: FitnessConfig, *, drawn: bool = False) -> Measurement:
    """Return what has to be measured for a fitness.

    drawn : of rollouts, for a policy gradient.

    Raises
    ------
    ConfigError : rollouts of an objective that is for evolution only.
    """
    objective = objective_of(config)
    if not drawn:
        return objective.measurement
    if objective.rollout_measurement is None:
        raise ConfigError(f"fitness.objective {config.objective!r} has no rollouts to learn from; it is for evolution")
    rollouts = objective.rollout_measurement
    return rollouts.with_options("rollout", listens=True) if config.reading else rollouts


@dataclass(frozen=True)
class TaskValues:
    """Values of one task.

    Attributes
    ----------
    weight : of the task in the fitness.
    values : (candidates, samples), the mean over budgets; not finite where an evaluation failed.
    """

    weight: float
    values: Array


@dataclass(frozen=True)
class MeasuredFitness(Fitness):
    """The fitness of some candidates on the same samples, and how sure it is.

    Attributes
    ----------
    values : (candidates,) weighted mean over tasks of the mean over samples; NaN where any value was not finite.
    noise : standard error of a candidate's fitness relative to the others', from the samples' paired differences, root
        mean square over candidates; NaN when a task has one sample only.
    by_budget : the candidates' mean at each budget, as ``mean_at_32``, where they are measured at several.
    """

    noise: float = math.nan
    by_budget: Mapping[str, float] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        """How many values are NaN or infinite."""
        return int((~np.isfinite(self.values)).sum())

    @property
    def best(self) -> float:
        """Largest fitness, NaN if all failed."""
        return float(np.nanmax(self.values)) if self.failed < len(self.values) else math.nan

    @property
    def mean(self) -> float:
        """Mean of those that did not fail."""
        return float(np.nanmean(self.values)) if self.failed < len(self.values) else math.nan

    @property
    def spread(self) -> float:
        """Standard deviation (unbiased) over the candidates that did not fail."""
        return float(np.nanstd(self.values, ddof=1)) if len(self.values) - self.failed > 1 else math.nan


def worth(
    evaluations: Sequence[Evaluation], config: FitnessConfig, baseline: float | None = None, scale: float = 1.0
) -> Array:
    """Return what evaluations on one sample are worth (candidates,).

    Parameters
    ----------
    baseline : value of the full cache, or of one who has read nothing, on this sample, taken off; None: nothing is.
    scale : mean value of the full cache on the samples, or how far it is from having read nothing, by which the value
        is divided.
    """
    objective = objective_of(config)
    values = np.array([objective.value(evaluation) for evaluation in evaluations], dtype=np.float64)
    values = (values if baseline is None else values - baseline) / scale
    if config.reading:
        values = values + read_between(evaluations, config).sum(axis=1)
    price = config.price_per_megabyte
    if price:
        sizes = [math.nan if evaluation.bytes_mean is None else evaluation.bytes_mean for evaluation in evaluations]
        values = values - price * np.array([number / 1e6 for number in sizes])
    return values


def read_between(evaluations: Sequence[Evaluation], config: FitnessConfig) -> Array:
    """Return what the tokens read after each decision add to the fitness: (candidates, decisions).

    The mean over decisions of the mean log-likelihood, times ``fitness.reading``. Evaluations without rollouts, or
    without a decision, have none: (candidates, 0) or zeros.
    """
    count = max((len(evaluation.steps or ()) for evaluation in evaluations), default=0)
    rewards = np.zeros((len(evaluations), count))
    for row, evaluation in zip(rewards, evaluations, strict=True):
        for place, step in enumerate(evaluation.steps or ()):
            row[place] = config.reading * step.reward / count
    return rewards


def rollouts_of(evaluations: Sequence[Evaluation], values: Array, config: FitnessConfig, weight: float) -> Rollouts:
    """Return the group that some evaluations on one sample at one budget are.

    values : (candidates,) `worth` of the evaluations.
    """
    reading = read_between(evaluations, config)
    return Rollouts(
        weight, rewards_to_go(values, reading, config.discount), [evaluation.steps or () for evaluation in evaluations]
    )


def baseline_scale(full: Sequence[float]) -> float:
    """Return the divisor for an objective that is a ratio to the full cache, never below a tenth."""
    finite = [value for value in full if math.isfinite(value)]
    return max(_SMALLEST_BASELINE, sum(finite) / len(finite)) if finite else 1.0


def range_scale(full: Sequence[float], nothing: Sequence[float]) -> float:
    """Return how much better the full cache is than having read nothing, mean over samples, never below a tenth."""
    return baseline_scale([kept - guessed for kept, guessed in zip(full, nothing, strict=True)])


def combine(tasks: Sequence[TaskValues], objective: Objective = _PLAIN) -> MeasuredFitness:
    """Return the fitness of candidates from the values of all tasks.

    A candidate's squared standard error is sum_t (w_t / sum w)^2 v_t / samples_t, with v `Objective.variance`.
    """
    if not tasks:
        raise ConfigError("fitness: there is no task")
    total = sum(task.weight for task in tasks)
    fitness = np.zeros(len(tasks[0].values))
    variance = np.zeros(len(fitness))
    for task in tasks:
        values = np.where(np.isfinite(task.values), task.values, np.nan)
        share = task.weight / total
        fitness = fitness + share * values.mean(axis=1)
        variance = variance + share**2 * objective.variance(values) / values.shape[1]
    finite = np.isfinite(fitness)
    usable = variance[finite]
    noise = math.sqrt(usable.mean()) if usable.size and np.isfinite(usable).all() else math.nan
    return MeasuredFitness(fitness, noise=noise)


def preflight(fitness: MeasuredFitness, sigma: float, samples: int) -> str | None:
    """Return a warning if the first population's differences drown in the noise of their samples, else None.

    The spread that is seen is signal and noise together: signal^2 = spread^2 - noise^2. A first generation can tell
    candidates apart when the signal is at least the noise; the signal grows in proportion to sigma near the start, and
    the noise falls with the root of the samples.
    """
    if len(fitness.values) - fitness.failed < 2:
        return None
    if fitness.spread <= 1e-12 * max(1.0, abs(fitness.mean)):
        return (
            f"pre-flight: all candidates of the first generation have the same fitness ({fitness.mean:.4g}); the "
            f"search sees nothing. Try driver.sigma={10 * sigma:.3g}, or check that the budget leaves a choice"
        )
    if math.isnan(fitness.noise):
        return None
    signal = math.sqrt(max(0.0, fitness.spread**2 - fitness.noise**2))
    if signal >= fitness.noise:
        return None
    factor = min(10.0, fitness.noise / signal) if signal > 0 else 10.0
    more = math.ceil(samples * min(16.0, factor**2))
    return (
        f"pre-flight: the first generation's fitness spreads by {fitness.spread:.3g}, of which {fitness.noise:.3g} is "
        f"noise of its {samples} samples: ranks are mostly chance. Try driver.sigma={sigma * factor:.3g} or "
        f"samples_per_generation={more}"
    )
