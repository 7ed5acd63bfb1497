"""Tracking: the numbers of a generation by the names under which TensorBoard and W&B show them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from evomem.tracking.base import GenerationRecord


def scalars(generation: GenerationRecord, before: GenerationRecord | None) -> dict[str, float]:
    """Return a generation's numbers by name; those that are not finite are left out: they are no measurements.

    ``before`` is the generation before it, None for the first: what a generation has taken is the difference.
    """
    numbers = {
        "fitness/best": generation.best,
        "fitness/mean": generation.mean,
        "fitness/spread": generation.spread,
        "fitness/noise": generation.noise,
        "fitness/failed": generation.failed,
        "driver/sigma": generation.sigma,
        "spent/evaluations": generation.evaluations,
        "spent/tokens": generation.tokens,
        "spent/seconds": generation.seconds,
        "spent/seconds_per_generation": generation.seconds - (before.seconds if before is not None else 0.0),
        **{f"diagnostics/{name}": value for name, value in generation.diagnostics.items()},
    }
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}


def finite_fitness(generation: GenerationRecord) -> list[float]:
    """Return the fitness of the candidates that did not fail."""
    return [value for value in generation.fitness if math.isfinite(value)]


def summary_numbers(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a run ended as a flat mapping: ``status``, ``winner``, ``sealed/fitness``, ..."""
    flat = {key: summary[key] for key in ("status", "error", "winner", "generations", "stopped") if key in summary}
    for split in ("train", "select", "sealed"):
        for name, value in summary.get(split, {}).items():
            if isinstance(value, int | float) and math.isfinite(value):
                flat[f"{split}/{name}"] = value
    return flat
