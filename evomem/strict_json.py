"""Run: numbers as one line of strict JSON, and back."""

from __future__ import annotations

import json
from typing import Any


def to_json(value: Any) -> str:
    """Return one line of strict JSON: numbers that are not finite become the strings NaN, Infinity, -Infinity."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        if value != value:
            return "NaN"
        return value if abs(value) != float("inf") else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value


def as_float(value: Any) -> float:
    """Return the number that `to_json` wrote; None is NaN."""
    return float("nan") if value is None else float(value)
