"""Evaluation: objective ``expected_cost``, what rankings cost on average, whose gradient is exact."""

from __future__ import annotations

from evomem.evaluation.measurement import Measurement, Quantity
from evomem.evaluation.objectives.base import PerHeadMean, register_objective


@register_objective("expected_cost")
class ExpectedCost(PerHeadMean):
    """Minus what rankings drawn by the manager's scores cost on average against the attention to come."""

    measurement = Measurement.of(Quantity.of("ranking_cost", how="expected"))
    rollout_measurement = Measurement.of(Quantity.of("ranking_cost", how="expected", gradient=True))
    exact_gradient = True
    per_head_value = "head_cost"
    per_head_sign = -1
    unit = "places a slot, relative to the best ranking"
    against_full = "nothing"
    protocols = frozenset({"compress_once"})
