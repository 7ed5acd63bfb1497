"""Memory: mean and covariance of the queries, from which attention to come is estimated (arXiv 2510.00636)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from evomem.errors import CacheError
from evomem.memory.kv.rotary import Rotary, future_rotation, unrotate
from evomem.memory.observations.base import Axes, Moment, Observation, Sizes, State, Window, register_observation
from evomem.memory.observations.recorder import Recorder

SINKS, FUTURE = 4, 512
"""Queries left out of the statistics, and positions ahead, of Expected Attention (arXiv 2510.00636)."""


@register_observation("query_statistics")
class QueryStatistics(Observation):
    """Mean and covariance of the queries before rotation, without a row's first 4; mean of the next 512 rotations."""

    needs: ClassVar[frozenset[str]] = frozenset({"queries at positions"})
    before_rotation: ClassVar[bool] = True
    needs_past: ClassVar[bool] = True
    looks_back: ClassVar[bool] = True

    def axes(self) -> dict[str, Axes]:
        """Three tensors, of which none has slots."""
        return {
            "query_mean": ("batch", "query_heads", "head_dim"),
            "query_covariance": ("batch", "query_heads", "head_dim", "head_dim"),
            "future_rotation": ("batch", "head_dim", "head_dim"),
        }

    def queried(
        self, recorder: Recorder, query: Tensor, positions: Tensor | None, real: Tensor | None, rotary: Rotary | None,
        start: Tensor | None,
    ) -> None:  # fmt: skip
        """Add the queries, turned back, to their sum and to the sum of their products."""
        state = recorder.rowwise
        batch, heads, queries, size = query.shape
        read = state.get("read")
        if read is None:
            read = torch.zeros(batch, dtype=torch.int64, device=query.device)
            state["query_sum"] = torch.zeros(batch, heads, size, device=query.device, dtype=torch.float32)
            state["query_square"] = state["query_sum"].new_zeros(batch, heads, size, size)
        if real is None:
            real = torch.ones(batch, queries, dtype=torch.bool, device=query.device)
        index = (_before(recorder, start) + read)[:, None] + real.cumsum(1) - 1
        if positions is None:
            positions = index.clamp(min=0)
        weight = (real & (index >= SINKS)).float()
        plain = unrotate(query, rotary, positions.expand(batch, queries)).float() * weight[:, None, :, None]
        # Not in place: what was read in inference mode cannot be written to outside of it.
        state["query_sum"] = state["query_sum"] + plain.sum(2)
        state["query_square"] = state["query_square"] + torch.einsum("bhqd,bhqe->bhde", plain, plain)
        state["read"] = read + real.sum(1)
        state["newest"] = positions.expand(batch, queries)[:, -1]

    def recorded(self, recorder: Recorder, moment: Moment, window: Callable[[int], Window]) -> dict[str, Tensor]:
        """Return mean, covariance and future rotation."""
        state = recorder.rowwise
        total, square = state["query_sum"], state["query_square"]
        before = _before(recorder, moment.start)
        last = (before + state["read"] - SINKS).clamp(min=0)
        first = (before - SINKS).clamp(min=0) if isinstance(before, Tensor) else 0
        count = (last - first).clamp(min=1).float()[:, None, None]
        mean = total / count
        covariance = square / count[..., None] - mean[..., :, None] * mean[..., None, :]
        rotation = future_rotation(moment.rotary, state["newest"], total.shape[-1], FUTURE, total)
        return {"query_mean": mean, "query_covariance": covariance, "future_rotation": rotation}

    def state(self, tensors: Mapping[str, Tensor], sizes: Sizes) -> dict[str, State]:
        """The two sums, how many queries they are of, and the newest one's position.

        Raises
        ------
        CacheError : the saved sum is missing, or none of queries.
        """
        total = tensors.get("rowwise.query_sum")
        heads = total.shape[1] if total is not None and total.dim() == 3 else 0
        if heads <= 0 or heads % sizes.kv_heads:
            raise CacheError("rowwise.query_sum: is missing, or no sum of queries")
        size = sizes.head_dim
        return {
            "rowwise.query_sum": ((sizes.batch, heads, size), torch.float32),
            "rowwise.query_square": ((sizes.batch, heads, size, size), torch.float32),
            "rowwise.read": ((sizes.batch,), torch.int64),
            "rowwise.newest": ((sizes.batch,), torch.int64),
        }

    def example(self, sizes: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
        """Return random statistics with a covariance that is one, and no rotation."""
        batch, heads, size = sizes["batch"], sizes["query_heads"], sizes["head_dim"]
        half = torch.randn(batch, heads, size, size, generator=generator) / size**0.5
        mean = torch.randn(batch, heads, size, generator=generator)
        rotation = torch.eye(size).expand(batch, size, size)
        return {"query_mean": mean, "query_covariance": half @ half.mT, "future_rotation": rotation}


def _before(recorder: Recorder, start: Tensor | None) -> Tensor | int:
    """Real tokens that every row (batch,) had read when recording began."""
    return (recorder.begin - start).clamp(min=0) if recorder.begin and start is not None else 0
