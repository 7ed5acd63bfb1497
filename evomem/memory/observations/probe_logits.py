"""Memory: what queries of the whole text would pay the slots held now, if they were asked again behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from evomem.errors import CacheError
from evomem.memory.kv.attention import attention_logits
from evomem.memory.kv.masks import slot_mask
from evomem.memory.kv.rotary import Rotary, rotate, unrotate
from evomem.memory.observations.base import Axes, Moment, Observation, Sizes, State, Window, register_observation
from evomem.memory.observations.recorder import Recorder

NEAR = 8
"""Tokens around a probe's own that it does not see: asked again behind the text it would look at itself, as no query to
come does (a refit to probes that do has an error of .42 for the queries to come, without it .40)."""
QUERIES, INDEX, READ = "probe_queries", "probe_index", "probe_read"


@register_observation("probe_logits")
class ProbeLogits(Observation):
    """Attention logits of at most W queries that lie evenly in the text so far, asked again right behind it.

    Of every row each s-th query is kept before rotation, s being the smallest power of two for which they are at most
    W. At a decision they are rotated to the positions that come next, one after the other, and look at all that is
    held but the tokens less than `NEAR` from their own.
    """

    takes: ClassVar[str] = "W"
    needs: ClassVar[frozenset[str]] = frozenset({"queries at positions"})
    before_rotation: ClassVar[bool] = True
    needs_past: ClassVar[bool] = True
    looks_back: ClassVar[bool] = True

    def axes(self) -> dict[str, Axes]:
        """A logit for every query head, slot and probe."""
        return {self.spec: ("batch", "query_heads", "slots", self.argument)}

    def queried(
        self, recorder: Recorder, query: Tensor, positions: Tensor | None, real: Tensor | None, rotary: Rotary | None,
        start: Tensor | None,
    ) -> None:  # fmt: skip
        """Keep those of the queries, turned back, whose index in its row is a multiple of the row's stride."""
        state, width = recorder.rowwise, self.argument
        queries, index, read = (self._name(name) for name in (QUERIES, INDEX, READ))
        batch, heads, count, size = query.shape
        if queries not in state:
            state[queries] = torch.zeros(batch, heads, width, size, device=query.device, dtype=torch.float32)
            state[index] = torch.full((batch, width), -1, device=query.device)
            state[read] = torch.zeros(batch, dtype=torch.int64, device=query.device)
        if real is None:
            real = torch.ones(batch, count, dtype=torch.bool, device=query.device)
        new = torch.where(real, state[read][:, None] + real.cumsum(1) - 1, -1)
        at = new.clamp(min=0) if positions is None else positions.expand(batch, count)
        plain = unrotate(query, rotary, at).float()
        total = state[read] + real.sum(1)
        both = torch.cat((state[index], new), 1)
        kept = (both >= 0) & (both % self._stride(total)[:, None] == 0)
        # Those that are kept come first, in their order; there are never more than W.
        order = torch.sort((~kept).to(torch.int8), dim=1, stable=True).indices[:, :width]
        state[index] = torch.where(kept, both, -1).gather(1, order)
        joined = torch.cat((state[queries], plain), 2)
        state[queries] = joined.gather(2, order[:, None, :, None].expand(batch, heads, width, size))
        state[read] = total
        state[self._name("newest")] = at[:, -1]

    def recorded(self, recorder: Recorder, moment: Moment, window: Callable[[int], Window]) -> dict[str, Tensor]:
        """Return the logits, (batch, query_heads, slots, W) fp32; -inf where a probe may not look, or there is none."""
        state, width = recorder.rowwise, self.argument
        plain, index = state[self._name(QUERIES)], state[self._name(INDEX)]
        ahead = torch.arange(width, device=plain.device)
        positions = state[self._name("newest")][:, None] + 1 + ahead
        asked = rotate(plain, moment.rotary, positions)
        mask = slot_mask(moment.slots, moment.seen + ahead, decays=moment.decays, window=moment.window)
        logits = attention_logits(asked, moment.keys.float(), moment.scale, mask, moment.softcap)
        at = index + moment.start.clamp(min=recorder.begin)[:, None]  # the token that each probe was
        near = (moment.slots[:, :, None] - at[:, None, :, None]).abs() < NEAR
        hidden = near | (index < 0)[:, None, :, None]
        logits = logits.masked_fill(hidden[:, :, None], -torch.inf)
        return {self.spec: logits.flatten(1, 2).transpose(-1, -2)}

    def state(self, tensors: Mapping[str, Tensor], sizes: Sizes) -> dict[str, State]:
        """The queries kept, their index in the row, how many were read, and the newest one's position.

        Raises
        ------
        CacheError : the saved queries are missing, or none.
        """
        saved = tensors.get(f"rowwise.{self._name(QUERIES)}")
        heads = saved.shape[1] if saved is not None and saved.dim() == 4 else 0
        if heads <= 0 or heads % sizes.kv_heads:
            raise CacheError(f"rowwise.{self._name(QUERIES)}: is missing, or holds no queries")
        return {
            f"rowwise.{self._name(QUERIES)}": ((sizes.batch, heads, self.argument, sizes.head_dim), torch.float32),
            f"rowwise.{self._name(INDEX)}": ((sizes.batch, self.argument), torch.int64),
            f"rowwise.{self._name(READ)}": ((sizes.batch,), torch.int64),
            f"rowwise.{self._name('newest')}": ((sizes.batch,), torch.int64),
        }

    def example(self, sizes: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
        """Return random logits."""
        shape = (sizes["batch"], sizes["query_heads"], sizes["slots"], self.argument)
        return {self.spec: torch.randn(shape, generator=generator)}

    def _name(self, part: str) -> str:
        return f"{part}:{self.argument}"

    def _stride(self, total: Tensor) -> Tensor:
        """Return the smallest power of two by which ``total`` (batch,) queries are at most W."""
        ratio = (total + self.argument - 1) // self.argument  # at least this stride
        powers = 1 << torch.arange(40, device=total.device)
        return powers[torch.searchsorted(powers, ratio.clamp(min=1))]
