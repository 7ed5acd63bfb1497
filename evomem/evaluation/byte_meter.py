"""Evaluation: bytes that every candidate's row holds while tokens arrive."""

from __future__ import annotations

import torch
from torch import Tensor

from evomem.evaluation.measurement import Table
from evomem.evaluation.population import Deciding
from evomem.memory import SlotCache
from evomem.memory.explicit import ExplicitCache


class Meter:
    """Peak and mean of the bytes of every row, as a cache of its own would measure them.

    Parameters
    ----------
    policy : the population that decides about the rows.

    Attributes
    ----------
    peak : (rows,) float64, largest number of bytes held so far.
    """

    def __init__(self, policy: Deciding) -> None:
        self._policy = policy
        self.peak = torch.zeros(policy.size, dtype=torch.float64)
        self._total = torch.zeros(policy.size, dtype=torch.float64)
        self._tokens = 0

    def bytes_by_row(self, cache: SlotCache | ExplicitCache) -> Tensor:
        """Return the bytes of every row now: (rows,) float64, or (1,) while one row still stands for all.

        A candidate that lets nothing fade does not pay for the decays that others brought into the batch.
        """
        by_row = cache.bytes_by_row().double().cpu()
        for layer in cache.layers:
            if layer.fades:
                cost = layer.counts().sum(-1).cpu() * torch.float32.itemsize
                by_row = by_row - torch.where(self._policy.fades(layer.index), 0, cost)
        return by_row

    def bytes_by_head(self, cache: SlotCache | ExplicitCache) -> list[Tensor]:
        """Return per layer the bytes of every row's KV heads now: (rows, kv_heads) float64.

        They are those of `bytes_by_row`, without the observations that belong to a row and to none of its slots.
        """
        by_layer = []
        for layer in cache.layers:
            sizes = layer.bytes_by_head().double().cpu()
            if layer.fades:
                cost = layer.counts().cpu() * torch.float32.itemsize
                sizes = sizes - torch.where(self._policy.fades(layer.index)[:, None], 0, cost)
            by_layer.append(sizes)
        return by_layer

    def add(self, before: Tensor, after: Tensor, tokens: int) -> None:
        """Add ``tokens`` tokens during which the rows grew evenly from ``before`` to ``after`` bytes."""
        self.peak = torch.maximum(self.peak, after)
        self._total = self._total + (before + after) / 2 * tokens
        self._tokens += tokens

    @property
    def mean(self) -> Tensor:
        """(rows,) float64, mean over the tokens that arrived; NaN before the first."""
        return self._total / self._tokens if self._tokens else torch.full_like(self._total, torch.nan)


def head_memory(cache: SlotCache | ExplicitCache, meter: Meter) -> list[dict[str, float | Table]]:
    """Return what every row holds now by layer and KV head: its values ``head_slots`` and ``head_bytes``."""
    slots = [layer.tolist() for layer in cache.slots_held()]
    sizes = [layer.tolist() for layer in meter.bytes_by_head(cache)]
    return [{"head_slots": _of_row(slots, row), "head_bytes": _of_row(sizes, row)} for row in range(len(slots[0]))]


def _of_row(by_layer: list[list[list[float]]], row: int) -> Table:
    return tuple(tuple(map(float, layer[row])) for layer in by_layer)
