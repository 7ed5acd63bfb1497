"""Evaluation: objectives ``evolkv`` and ``evolkv_loglik``, the task's score times a bonus for keeping to the budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomem.evaluation.measurement import EXACT, LOGLIK, Evaluation, Measurement
from evomem.evaluation.measures import Draws, Measure, register_measure
from evomem.evaluation.objectives.base import Objective, register_objective
from evomem.managers.base import MemoryManager
from evomem.tasks.base import Sample, Task

if TYPE_CHECKING:
    from evomem.evaluation.evaluator import Evaluator

WEIGHT = 0.3
"""Weight of the bonus (lambda)."""
DISCOUNT = 0.2
"""What of the bonus is lost for budget that is not used (gamma)."""

_TARGET = Measurement.of("target_slots")


def cache_score(mean: float, target: float) -> float:
    """Return how well a mean budget keeps to a target, in [0, 1] (EvolKV, Yu and Chai, arXiv 2509.08315).

    max(0, 1 - (k - c) / c) where the mean k is above the target c, else 1 - γ (1 - k / c).
    """
    if mean > target:
        return max(0.0, 1 - (mean - target) / target)
    return 1 - DISCOUNT * (1 - mean / target)


def evolkv_fitness(score: float | None, evaluation: Evaluation) -> float:
    """Return f (1 + λ CacheScore) of an evaluation with score f >= 0; NaN without a result.

    The mean budget is the measured one: slots per head that the decision left.
    """
    target = evaluation.number("target_slots")
    if score is None or target is None or evaluation.slots is None:
        return math.nan
    return score * (1 + WEIGHT * cache_score(evaluation.slots, target))


@register_objective("evolkv")
class EvolKVScore(Objective):
    """EvolKV's fitness f (1 + λ CacheScore), with f the task's exact metric of the text that the model writes."""

    measurement = EXACT.also(_TARGET)
    unit = "share of answers that are right, times up to 1.3"
    against_full = "nothing"

    def value(self, evaluation: Evaluation) -> float:
        """Return the fitness."""
        return evolkv_fitness(evaluation.exact, evaluation)


@register_objective("evolkv_loglik")
class EvolKVLikelihood(Objective):
    """EvolKV's fitness with f the answer's probability per token, exp(log-likelihood): finer than the exact metric."""

    measurement = LOGLIK.also(_TARGET)
    unit = "probability per answer token, times up to 1.3"
    against_full = "nothing"

    def value(self, evaluation: Evaluation) -> float:
        """Return the fitness."""
        score = None if evaluation.loglik is None else math.exp(evaluation.loglik)
        return evolkv_fitness(score, evaluation)


@register_measure("target_slots")
class TargetSlots(Measure):
    """Gives ``target_slots``, the slots per head that the manager's budget allows on this sample."""

    def evaluations(
        self,
        evaluator: Evaluator,
        managers: Sequence[MemoryManager],
        sample: Sample,
        task: Task,
        measurement: Measurement,
        draws: Draws,
    ) -> list[Evaluation]:
        """Return the evaluations; see `Measure.evaluations`."""
        read = evaluator.tokens(sample).read.shape[1]
        return [Evaluation(sample.id, {"target_slots": _target(one.options.budget, read)}) for one in managers]


def _target(budget: int | float | None, read: int) -> float:
    """Return what `slots_of_budget` gives a row of ``read`` tokens, at most these."""
    if budget is None:
        return float(read)
    return float(min(read, budget if isinstance(budget, int) else max(1, math.ceil(read * budget - 1e-6))))
