"""Evaluation: requests of streams as tensors, row by row, and what reads of a memory come to.

A read is right where the memory gives back the item's newest value; see `evomem.evaluation.streams`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evomem.memory.explicit import ExplicitCache
from evomem.tasks.base import Sample
from evomem.tasks.streams.base import Stream

DOUBT = 0.01
"""ε: how often a reader takes what the memory says for wrong."""


@dataclass
class Score:
    """What reads have come to so far, for every row.

    Attributes
    ----------
    right, loglik, reads : (rows,) float64, sums over the reads: those that were right, their log-likelihood, 1.
    """

    right: Tensor
    loglik: Tensor
    reads: Tensor

    @classmethod
    def of(cls, rows: int, device: torch.device) -> Score:
        """Return the score before the first read."""
        nothing = torch.zeros(rows, dtype=torch.float64, device=device)
        return cls(nothing, nothing, nothing)

    def add(self, right: Tensor, probability: Tensor, reads: Tensor) -> None:
        """Add the reads among some requests: right, probability and reads (rows, requests)."""
        self.right = self.right + (right & reads).sum(-1).double()
        self.loglik = self.loglik + torch.where(reads, probability, 1.0).double().log().sum(-1)
        self.reads = self.reads + reads.sum(-1).double()


def items_of(sample: Sample) -> int:
    """Return how many items a stream's reader chooses among when it guesses; at least 2."""
    return max(2, int(sample.meta["items"]))


@dataclass(frozen=True)
class Requests:
    """Streams of equal length as tensors, and which of them every row of a memory reads.

    Attributes
    ----------
    keys, values : (streams, requests, dim). names, marks : (streams, requests) int64.
    reads, writes : (streams, sets, requests) bool. items : (streams,) float32.
    stream_of_row : (rows,) int64.
    """

    keys: Tensor
    values: Tensor
    names: Tensor
    marks: Tensor
    reads: Tensor
    writes: Tensor
    items: Tensor
    stream_of_row: Tensor

    @classmethod
    def of(cls, streams: Sequence[Stream], samples: Sequence[Sample], model: Any, rows_each: int) -> Requests:
        """Return the requests of streams for the sets of a memory that has ``rows_each`` rows a stream."""
        device, dtype = model.device, model.dtype

        def stacked(name: str) -> Tensor:
            return torch.from_numpy(np.stack([getattr(stream, name) for stream in streams])).to(device)

        names = stacked("ids")
        vectors = [torch.from_numpy(stream.value_vectors[stream.values]) for stream in streams]
        sets = torch.stack([model.sets(one) for one in names])
        rows = torch.arange(len(streams), device=device).repeat_interleave(rows_each)
        return cls(
            stacked("keys").to(dtype), torch.stack(vectors).to(device, dtype), names, stacked("values"),
            sets & stacked("reads")[:, None], sets & stacked("writes")[:, None],
            torch.tensor([float(items_of(sample)) for sample in samples], device=device), rows,
        )  # fmt: skip

    def feed(self, cache: ExplicitCache, part: slice, score: Score) -> None:
        """Let a memory read some requests, and add what came back to the score."""
        memory: Any = cache.layers[0]
        rows, sets = self.stream_of_row, self.reads.shape[1]

        def wide(tensor: Tensor) -> Tensor:
            chosen = tensor[:, part].index_select(0, rows)[:, None]
            return chosen.expand(-1, sets, *chosen.shape[2:])

        names, marks = wide(self.names), wide(self.marks)
        reads, writes = (tensor[:, :, part].index_select(0, rows) for tensor in (self.reads, self.writes))
        soft = memory.beta is not None
        read = memory.feed(
            wide(self.keys), wide(self.values), names,
            marks=marks, reads=reads, writes=writes, absent=True, wants_values=soft,
        )  # fmt: skip
        if soft:
            same = read.marks[:, :, None] == marks[..., None]
            weight, total = (read.weights * same).sum((1, 3)), read.weights.sum((1, 3))
            right = heaviest_mark(read.weights, read.marks).eq(marks).logical_and(reads).any(1)
        else:
            right = (read.mark == marks).logical_and(read.hit).any(1)
            weight, total = right.float(), read.hit.any(1).float()
        items = self.items.index_select(0, rows)[:, None]
        probability = (1 - DOUBT) * (weight + (1 - total).clamp(min=0) / items) + DOUBT / items
        score.add(right, probability, reads.any(1))


def heaviest_mark(weights: Tensor, marks: Tensor) -> Tensor:
    """Return the mark whose slots weigh most together: weights (..., requests, slots), marks (..., slots).

    (..., requests) int64; -1 where nothing was read.
    """
    together = (marks[..., :, None] == marks[..., None, :]).float()
    by_mark = torch.matmul(weights, together)
    best = by_mark.max(-1)
    return torch.where(
        best.values > 0, marks[..., None, :].expand(by_mark.shape).gather(-1, best.indices[..., None])[..., 0], -1
    )
