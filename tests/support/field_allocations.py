"""Slow ways of published allocations: one row, one layer and one head at a time, in Python numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from evomem.memory import LayerView


def before_window(view: LayerView, row: int, head: int, window: int) -> list[int]:
    """Indices of the slots that hold a token older than the row's last ``window`` tokens."""
    return [s for s, token in enumerate(view.slots[row, head].tolist()) if 0 <= token < view.seen - window]


def cake_preference(view: LayerView, row: int, window: int, tau1: float, tau2: float) -> float:
    """P of a layer: entropy and variance of its attention, each to the power of an inverse temperature."""
    total = {"entropy": 0.0, "variance": 0.0}
    heads = view.slots.shape[1]
    for head in range(heads):
        for slot in before_window(view, row, head, window):
            for name in total:
                total[name] += float(view.recorded[f"window_{name}:{window}"][row, head, slot]) / heads
    return float(total["entropy"] ** (1 / tau1) * total["variance"] ** (1 / tau2))


def lava_scores(view: LayerView, row: int, head: int, window: int, kernel: int) -> dict[int, float]:
    """Score of every slot before the window: largest attention around it times the head's largest value."""
    slots = before_window(view, row, head, window)
    paid = {s: float(view.recorded[f"window_group_peak:{window}"][row, head, s]) for s in slots}
    largest = max((sum(abs(x) for x in view.values[row, head, s].tolist()) for s in slots), default=0.0)
    half = kernel // 2
    return {s: largest * max(paid.get(n, 0.0) for n in range(s - half, s + half + 1)) for s in slots}


def lava_entropy(view: LayerView, row: int, window: int, kernel: int) -> float:
    """Entropy of a layer's scores over all its heads and slots, divided by the largest there could be."""
    scores = [x for head in range(view.slots.shape[1]) for x in lava_scores(view, row, head, window, kernel).values()]
    total = sum(scores)
    if len(scores) < 2 or total == 0:
        return 0.0
    return -sum(x / total * math.log(x / total) for x in scores if x > 0) / math.log(len(scores))


def shared(weights: Sequence[float], least: Sequence[int], most: Sequence[int], total: int) -> list[float]:
    """Parts least + λ weight, at most ``most``, that add up to a total; all of it and more where it is too little."""
    if sum(most) < total:
        least, most = most, [total] * len(most)
    weights = [max(w, 1e-200) for w in weights]
    begin, end = 0.0, 1e300
    for _ in range(2000):
        middle = math.sqrt(max(begin, 1e-300)) * math.sqrt(end)
        parts = [min(low + middle * w, high) for w, low, high in zip(weights, least, most, strict=True)]
        begin, end = (middle, end) if sum(parts) < total else (begin, middle)
        if end / max(begin, 1e-300) < 1 + 1e-12:
            break
    return [min(low + end * w, high) for w, low, high in zip(weights, least, most, strict=True)]


def first(values: Sequence[float], share: float) -> list[int]:
    """Indices of the largest values: a share of them all, rounded up; of equal ones the first."""
    return sorted(range(len(values)), key=lambda index: (-values[index], index))[
        : math.ceil(share * len(values) - 1e-9)
    ]
