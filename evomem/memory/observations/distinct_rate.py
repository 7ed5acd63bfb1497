"""Memory: how many of the keys that are read are new: the distinct-key rate, by which a memory's size may go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from evomem.memory.kv.rotary import Rotary
from evomem.memory.observations.base import (
    Axes,
    Moment,
    Observation,
    Sizes,
    State,
    Window,
    register_observation,
)

if TYPE_CHECKING:
    from evomem.memory.observations.recorder import Recorder

SHARPNESS = 32
"""Power of a cosine: keys with .7 in common are .00001 alike, a key and itself blurred to .99 are .72 alike."""


@register_observation("distinct_rate")
class DistinctRate(Observation):
    """Share of reads whose key is among none of the W reads before, lately: what an LRU cache of W slots would miss.

    A read with query q is new by 1 - max_j max(0, cos(q, q_j))^32 over the W reads before it (Leinster & Cobbold 2012
    soften the count of distinct things by a similarity likewise), and the n-th read from the end counts (1 - 1/W)^n.
    Tokens that do not read (a query of zeros) have no part in it, so writes that nobody asks for do not move it.

    In a KV cache queries are turned to their positions: the same query at two positions is two, so there it is refused.
    """

    takes: ClassVar[str] = "W"
    needs: ClassVar[frozenset[str]] = frozenset({"queries without positions"})
    needs_past: ClassVar[bool] = True
    looks_back: ClassVar[bool] = True

    def axes(self) -> dict[str, Axes]:
        """One number a head."""
        return {self.spec: ("batch", "kv_heads")}

    def queried(
        self, recorder: Recorder, query: Tensor, positions: Tensor | None, real: Tensor | None, rotary: Rotary | None,
        start: Tensor | None,
    ) -> None:  # fmt: skip
        """Weigh the new reads in: query (batch, query_heads, queries, head_dim), zeros where a token does not read."""
        width, fade, state = self.argument, 1 - 1 / self.argument, recorder.rowwise
        batch, heads, count, size = query.shape
        query = query.float() if real is None else query.float() * real[:, None, :, None]
        before, sums = state.get(f"{self.spec}.reads"), state.get(f"{self.spec}.sums")
        if before is None or sums is None:
            before, sums = query.new_zeros(batch, heads, width, size), query.new_zeros(batch, heads, 2)
        joined = torch.cat((before, F.normalize(query, dim=-1)), 2)
        # What does not read goes to the front, so that the W places before a read hold the W reads before it.
        order = torch.sort((joined != 0).any(-1).byte(), dim=-1, stable=True).indices
        joined = joined.gather(2, order[..., None].expand(joined.shape))
        place = torch.arange(width, width + count, device=query.device)
        distance = place[:, None] - torch.arange(width + count, device=query.device)
        cosine = torch.matmul(joined[:, :, width:], joined.transpose(-1, -2)).clamp(min=0)
        likeness = torch.where((distance >= 1) & (distance <= width), cosine, 0.0).amax(-1) ** SHARPNESS
        reads = (query != 0).any(-1).sum(-1)  # (batch, query_heads): the new reads are the last of them all
        from_end = width + count - 1 - place
        weight = torch.where(from_end < reads[..., None], fade ** from_end.float(), 0.0)
        total = torch.stack((((1 - likeness) * weight).sum(-1), weight.sum(-1)), -1)
        state[f"{self.spec}.sums"] = sums * (fade ** reads.float())[..., None] + total
        state[f"{self.spec}.reads"] = joined[:, :, count:].clone()

    def recorded(self, recorder: Recorder, moment: Moment, window: Callable[[int], Window]) -> dict[str, Tensor]:
        """Return (batch, kv_heads) fp32 in [0, 1], the mean of a group's query heads; 1 before the first read."""
        new, weight = recorder.rowwise[f"{self.spec}.sums"].unbind(-1)
        rate = torch.where(weight > 0, new / weight.clamp(min=1e-9), 1.0)
        kv_heads = moment.keys.shape[1]
        return {self.spec: rate.view(rate.shape[0], kv_heads, -1).mean(-1)}

    def state(self, tensors: Mapping[str, Tensor], sizes: Sizes) -> dict[str, State]:
        """The directions of the last W reads, and two sums."""
        held = tensors.get(f"rowwise.{self.spec}.reads")
        known = held is not None and held.dim() == 4
        heads, size = (held.shape[1], held.shape[3]) if known and held is not None else (sizes.kv_heads, sizes.head_dim)
        return {
            f"rowwise.{self.spec}.reads": ((sizes.batch, heads, self.argument, size), torch.float32),
            f"rowwise.{self.spec}.sums": ((sizes.batch, heads, 2), torch.float32),
        }
