"""Evaluation: objective ``trace_cost``, what a manager's ranking costs: KVP's trace reward."""

from __future__ import annotations

from evomem.evaluation.measurement import Measurement, Quantity
from evomem.evaluation.objectives.base import PerHeadMean, register_objective


@register_objective("trace_cost")
class TraceCost(PerHeadMean):
    """Minus what the ranking in the order of the manager's scores costs against the attention to come."""

    measurement = Measurement.of(Quantity.of("ranking_cost", how="sorted"))
    rollout_measurement = Measurement.of(Quantity.of("ranking_cost", how="drawn", gradient=True))
    compares_draws = True
    per_head_value = "head_cost"
    per_head_sign = -1
    unit = "places a slot, relative to the best ranking"
    against_full = "nothing"
    protocols = frozenset({"compress_once"})
