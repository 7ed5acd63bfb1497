"""Evaluation: objective ``exact``, the task's metric of the text that the model writes."""

from __future__ import annotations

import math

from evomem.evaluation.measurement import EXACT, Evaluation, Measurement
from evomem.evaluation.objectives.base import ROLLOUT, Objective, register_objective


@register_objective("exact")
class Exact(Objective):
    """The task's exact metric of the greedily generated answer, in [0, 1]."""

    measurement = EXACT
    rollout_measurement = EXACT.also(Measurement.of(ROLLOUT))
    unit = "share of answers that are right"
    against_full = "divide"

    def value(self, evaluation: Evaluation) -> float:
        """Return the score."""
        return math.nan if evaluation.exact is None else evaluation.exact
