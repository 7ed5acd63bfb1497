"""Memory: attention that the model's mean query will pay from some distances on (TriAttention, arXiv 2604.04921)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from evomem.errors import CacheError
from evomem.memory.kv.rotary import Rotary, frequencies, pair_lengths, rotate_half
from evomem.memory.observations.base import Moment, Observation, Sizes, State, Window, register_observation
from evomem.memory.observations.recorder import Recorder

OFFSETS = tuple(2**power for power in range(17))
"""Tokens after the newest at which the queries to come are thought to stand: 1, 2, 4, ..., 65,536."""


@register_observation("tri_attention")
class TriAttentionScore(Observation):
    """What a slot is worth to the model's mean query; no query of the text is looked at.

    With the pairs f of numbers that are rotated together as complex numbers, q̄ the mean query and |q| the mean length
    of a query before rotation (`evomem.memory.kv.query_centres`), k the key before rotation, Δ the tokens since, ω the
    frequencies and c the factor that some rotary types scale both by,

        s = Σ_f |q̄_f||k_f| c² cos(ω_f (Δ + o) + arg(q̄_f k̄_f*)) + Σ_f (|q|_f - |q̄_f|) |k_f| c²,

    a mean over the offsets o of `OFFSETS`. The first sum is the logit of the mean query at the offset; the second
    counts what varies about it. Of the query heads of a group, whose scores are standardised over the slots held, the
    largest counts. Dimensions that are not rotated add q̄ k; a model without rotary positions has only these.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"queries at positions"})
    before_rotation: ClassVar[bool] = True
    looks_back: ClassVar[bool] = True

    def queried(
        self, recorder: Recorder, query: Tensor, positions: Tensor | None, real: Tensor | None, rotary: Rotary | None,
        start: Tensor | None,
    ) -> None:  # fmt: skip
        """Note at which position the newest query stands; the query itself is not read."""
        batch, queries = query.shape[0], query.shape[2]
        if positions is not None:
            newest = positions.expand(batch, queries)[:, -1].to(torch.int64)
        else:
            before = recorder.rowwise.get("newest_position")
            if before is None:
                read = (recorder.begin - start).clamp(min=0) if recorder.begin and start is not None else 0
                before = torch.zeros(batch, dtype=torch.int64, device=query.device) + read - 1
            newest = before + (queries if real is None else real.sum(1))
        recorder.rowwise["newest_position"] = newest

    def recorded(self, recorder: Recorder, moment: Moment, window: Callable[[int], Window]) -> dict[str, Tensor]:
        """Return the scores: (batch, kv_heads, slots) fp32.

        Raises
        ------
        CacheError : the memory does not know the model, so not its mean queries either.
        """
        if moment.centre is None:
            raise CacheError(
                "tri_attention goes by the model's mean queries, and here no model is known; read with the model's own "
                "cache (manager.attach), or take a manager that observes something else"
            )
        keys = moment.keys.float()
        batch, kv_heads, _, size = keys.shape
        mean, length = (part.to(keys.device) for part in (moment.centre.mean, moment.centre.length))
        turned = mean.expand(batch, *mean.shape)
        varies = keys.new_zeros(mean.shape)
        width = 0
        if moment.rotary is not None:
            speed, factor = frequencies(moment.rotary)
            speed, width = speed.to(keys.device), 2 * len(speed)
            offsets = torch.tensor(OFFSETS, dtype=torch.float64, device=keys.device)
            # In fp64: fp32 is wrong by whole radians at the farthest positions.
            angles = (recorder.rowwise["newest_position"][:, None].double() + offsets)[..., None] * speed
            cos, sin = (part.mean(1).float().repeat(1, 2)[:, None] * factor for part in (angles.cos(), angles.sin()))
            first, rest = turned[..., :width], turned[..., width:]
            turned = torch.cat((first * cos + rotate_half(first) * sin, rest), -1)
            varies = 0.5 * factor * (length - pair_lengths(mean, width))  # both numbers of a pair have its length
        at_offsets = turned.reshape(batch, kv_heads, -1, size) @ keys.mT
        about = varies.reshape(kv_heads, -1, size) @ pair_lengths(keys, width).mT
        return {self.spec: _largest(at_offsets + about, moment.slots >= 0)}

    def state(self, tensors: Mapping[str, Tensor], sizes: Sizes) -> dict[str, State]:
        """The newest query's position."""
        return {"rowwise.newest_position": ((sizes.batch,), torch.int64)}


def _largest(scores: Tensor, valid: Tensor) -> Tensor:
    """Return the largest standardised score of a group's query heads: (batch, kv_heads, slots).

    scores : (batch, kv_heads, group, slots). valid : (batch, kv_heads, slots) bool, slots that hold a token.
    """
    held = valid[:, :, None]
    count = held.sum(-1, keepdim=True).clamp(min=1)
    centred = scores - torch.where(held, scores, 0.0).sum(-1, keepdim=True) / count
    deviation = (torch.where(held, centred, 0.0).square().sum(-1, keepdim=True) / count).sqrt()
    return (centred / deviation.clamp(min=1e-6)).amax(2)
