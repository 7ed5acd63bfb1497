"""Cache: the observations that a layer records for its manager, in step with its slots.

========================  ==================================================================================
name                      what ``LayerView.recorded`` holds
========================  ==================================================================================
``attention_sum``         (batch, kv_heads, slots): attention paid to the slot by all queries so far
``attention_spectrum``    (batch, kv_heads, slots, 17): moving average of the attention's spectrogram (NAMM)
``window_attention:W``    (batch, kv_heads, slots): mean attention of the row's last W queries, over the slots held
                          now (fewer queries while fewer were read)
``window_statistics:W``   (batch, kv_heads, slots, 4): of the same attention the maximum, the minimum, the sum, and the
                          sum in which the n-th query from the end (n = 0 is the last) counts 0.9^n
``window_peak:W``         (batch, kv_heads, slots): the same queries, but of each the *largest* attention that a query
                          head of the group pays, summed over the queries (KVP, arXiv 2602.10238)
``window_next_use:W``     (batch, kv_heads, slots) fp32: which of the same queries (0 is the first) is the
                          first in which a query head of the group pays the slot at least `USED`; W if none does
``query_statistics``      ``query_mean`` (batch, query_heads, head_dim), ``query_covariance`` (…, head_dim, head_dim) of
                          the queries before rotation, without a row's first 4; ``future_rotation`` (batch, head_dim,
                          head_dim), the mean rotation of the next 512 positions
========================  ==================================================================================

Attention is post-softmax, fp32, and, where nothing else is said, a mean over the query heads of the KV head's group. It
is computed in blocks of queries; a (heads, tokens, tokens) tensor never exists.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from evomem.errors import ConfigError
from evomem.memory.kv.attention import attention_probabilities
from evomem.memory.kv.masks import Visibility, causal_rows, joined_rows, slot_mask
from evomem.memory.kv.rotary import Rotary, future_rotation, unrotate
from evomem.memory.spectrum import BINS, HOP, advance

OBSERVATIONS = (
    "attention_sum", "attention_spectrum", "window_attention:W", "window_statistics:W", "window_peak:W",
    "window_next_use:W", "query_statistics",
)  # fmt: skip
FADING = 0.9
"""Weight of a query against the next one in the last of the window's statistics."""
USED = 1 / 64
"""Share of a query's attention from which on a slot counts as used by it; well above an even share."""
SINKS, FUTURE = 4, 512
"""Queries left out of the statistics, and positions ahead, of Expected Attention (arXiv 2510.00636)."""


@dataclass(frozen=True)
class Wanted:
    """Which observations a manager asked for, parsed from their names."""

    attention_sum: bool = False
    attention_spectrum: bool = False
    query_statistics: bool = False
    windows: tuple[int, ...] = ()
    statistics: tuple[int, ...] = ()
    peaks: tuple[int, ...] = ()
    next_uses: tuple[int, ...] = ()

    @classmethod
    def parse(cls, names: frozenset[str]) -> Wanted:
        """Parse names; raise `ConfigError` for one that does not exist."""
        kinds = ("window_attention", "window_statistics", "window_peak", "window_next_use")
        windows: dict[str, list[int]] = {kind: [] for kind in kinds}
        for name in names:
            head, _, width = name.partition(":")
            if head in windows and width.isascii() and width.isdigit() and len(width) < 10 and int(width) > 0:
                windows[head].append(int(width))
            elif name not in OBSERVATIONS or head in windows:
                raise ConfigError(f"unknown observation {name!r}; the cache records {', '.join(OBSERVATIONS)} (W >= 1)")
        return cls(
            "attention_sum" in names,
            "attention_spectrum" in names,
            "query_statistics" in names,
            *(tuple(sorted(windows[kind])) for kind in kinds),
        )

    @property
    def widths(self) -> list[int]:
        """Numbers of newest queries that something is wanted of, ascending."""
        return sorted({*self.windows, *self.statistics, *self.peaks, *self.next_uses})

    @property
    def queries(self) -> int:
        """How many of the newest queries must be held."""
        return max(self.widths, default=0)

    @property
    def every_query(self) -> bool:
        """Whether the attention of all queries is needed, not only of the last few."""
        return self.attention_sum or self.attention_spectrum

    @property
    def looks_back(self) -> bool:
        """Whether what a query added cannot be told apart afterwards from what other queries added."""
        return self.attention_spectrum or self.query_statistics or bool(self.queries)


@dataclass
class Recorder:
    """The recorded state of one layer. Slot-aligned tensors have the slots on axis 2.

    ``slotwise`` and ``rowwise`` tensors have the batch on axis 0 and follow the cache's row operations;
    ``slotwise`` tensors also follow its compaction. ``window`` is the sliding window of the last causal mask.
    """

    wanted: Wanted
    slotwise: dict[str, Tensor] = field(default_factory=dict)
    rowwise: dict[str, Tensor] = field(default_factory=dict)
    window: int | None = None
    begin: int = 0
    """Tokens that had been read when recording began."""

    def append(self, batch: int, kv_heads: int, count: int, like: Tensor) -> None:
        """Make room for ``count`` new slots: nobody has looked at them yet."""
        shapes: dict[str, tuple[int, ...]] = {}
        if self.wanted.attention_sum:
            shapes["attention_sum"] = ()
        if self.wanted.attention_spectrum:
            shapes["attention_spectrum"] = (BINS,)
            columns = self.slotwise.get("columns")
            shapes["columns"] = (columns.shape[3] if columns is not None else HOP,)
        for name, tail in shapes.items():
            new = torch.zeros(batch, kv_heads, count, *tail, device=like.device, dtype=torch.float32)
            old = self.slotwise.get(name)
            self.slotwise[name] = new if old is None else torch.cat((old, new), dim=2)

    def attended(self, attention: Tensor, first: int, starts: tuple[int, ...]) -> None:
        """Learn from the attention of a block of queries.

        attention : (batch, kv_heads, queries, slots held so far), zero for padded queries.
        first : token index of the block's first query. starts : first real token of every row.
        """
        held = attention.shape[3]
        if self.wanted.attention_sum:
            total = _writable(self.slotwise["attention_sum"])
            total[:, :, :held] += attention.sum(2)
            self.slotwise["attention_sum"] = total
        if self.wanted.attention_spectrum:
            self._spectrum(attention, first, starts)

    def _spectrum(self, attention: Tensor, first: int, starts: tuple[int, ...]) -> None:
        """Advance the spectrogram row by row group: frames count a row's own tokens, so padding shifts them."""
        starts = tuple(max(start, self.begin) for start in starts)
        columns, held = self.slotwise["columns"], attention.shape[3]
        queries = attention.shape[2]
        last = first + queries
        waiting = max((max(last - start, 0)) % HOP for start in starts)
        grown = columns.new_zeros(*columns.shape[:3], HOP + waiting)
        for start in sorted(set(starts)):
            rows = torch.tensor([s == start for s in starts], device=columns.device)
            whole = bool(rows.all())
            old = columns if whole else columns[rows]
            pending = max(first - start, 0) % HOP
            arrived = attention if whole else attention[rows]
            arrived = arrived[:, :, max(start - first, 0) :]
            tail = old[:, :, :held, :HOP].transpose(2, 3)
            stream = arrived
            if pending:
                stream = torch.cat((old[:, :, :held, HOP : HOP + pending].transpose(2, 3), arrived), dim=2)
            full = stream.shape[2] // HOP * HOP
            if full:
                state = self.slotwise["attention_spectrum"] = _writable(self.slotwise["attention_spectrum"])
                before = state if whole else state[rows]
                after, tail = advance(before[:, :, :held], tail, stream[:, :, :full])
                if whole:
                    state[:, :, :held] = after
                else:
                    before[:, :, :held] = after
                    state[rows] = before
            rest = stream[:, :, full:].transpose(2, 3)
            block = grown if whole else grown[rows]
            block[:, :, :held, :HOP] = tail.transpose(2, 3)
            block[:, :, :held, HOP : HOP + rest.shape[3]] = rest
            if not whole:
                grown[rows] = block
        self.slotwise["columns"] = grown

    def looked(self, visibility: Visibility, first: int, queries: int, batch: int) -> None:
        """Learn what ``queries`` new queries, from token ``first`` on, may look at; called before `queried`.

        Rows of masks are kept for the newest queries from the first explicit mask on.
        """
        width, explicit, old = self.wanted.queries, visibility.explicit, self.rowwise.get("visible")
        window, self.window = self.window, visibility.window if explicit is None else self.window
        if not width or (old is None and explicit is None):
            return
        device = old.device if explicit is None and old is not None else cast(Tensor, explicit).device
        if old is None:
            held = self.rowwise["queries"].shape[2] if "queries" in self.rowwise else 0
            old = causal_rows(first - held, held, window, device).expand(batch, -1, -1, -1)
        new = causal_rows(first, queries, visibility.window, device) if explicit is None else explicit
        self.rowwise["visible"] = joined_rows(old, new.expand(batch, -1, -1, -1))[:, :, -width:].clone()

    def queried(
        self, query: Tensor, positions: Tensor | None, real: Tensor | None, rotary: Rotary | None,
        start: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Learn from the queries themselves.

        query : (batch, query_heads, queries, head_dim). positions : (batch, queries) as rotated.
        real : (batch, queries) bool, None when nothing is padded.
        start : (batch,) first real token of every row; wanted where recording began after the first token.
        """
        width = self.wanted.queries
        if width:
            old = self.rowwise.get("queries")
            joined = query if old is None else torch.cat((old, query), dim=2)
            self.rowwise["queries"] = joined[:, :, -width:].clone() if joined.shape[2] > width else joined
        if self.wanted.query_statistics:
            self._statistics(query, positions, real, rotary, start)

    def _statistics(
        self, query: Tensor, positions: Tensor | None, real: Tensor | None, rotary: Rotary | None, start: Tensor | None
    ) -> None:
        batch, heads, queries, size = query.shape
        read = self.rowwise.get("read")
        if read is None:
            read = torch.zeros(batch, dtype=torch.int64, device=query.device)
            self.rowwise["query_sum"] = torch.zeros(batch, heads, size, device=query.device, dtype=torch.float32)
            self.rowwise["query_square"] = self.rowwise["query_sum"].new_zeros(batch, heads, size, size)
        if real is None:
            real = torch.ones(batch, queries, dtype=torch.bool, device=query.device)
        own = (self._before(start) + read)[:, None] + real.cumsum(1) - 1
        if positions is None:
            positions = own.clamp(min=0)
        weight = (real & (own >= SINKS)).float()
        plain = unrotate(query, rotary, positions.expand(batch, queries)).float() * weight[:, None, :, None]
        # Not in place: what was read in inference mode cannot be written to outside of it.
        self.rowwise["query_sum"] = self.rowwise["query_sum"] + plain.sum(2)
        self.rowwise["query_square"] = self.rowwise["query_square"] + torch.einsum("bhqd,bhqe->bhde", plain, plain)
        self.rowwise["read"] = read + real.sum(1)
        self.rowwise["newest"] = positions.expand(batch, queries)[:, -1]

    def _before(self, start: Tensor | None) -> Tensor | int:
        """Real tokens that every row (batch,) had read when recording began."""
        return (self.begin - start).clamp(min=0) if self.begin and start is not None else 0

    def query_statistics(self, rotary: Rotary | None, start: Tensor | None = None) -> dict[str, Tensor]:
        """Return mean, covariance and future rotation as the module docstring says."""
        total, square = self.rowwise["query_sum"], self.rowwise["query_square"]
        before = self._before(start)
        last = (before + self.rowwise["read"] - SINKS).clamp(min=0)
        first = (before - SINKS).clamp(min=0) if isinstance(before, Tensor) else 0
        count = (last - first).clamp(min=1).float()[:, None, None]
        mean = total / count
        covariance = square / count[..., None] - mean[..., :, None] * mean[..., None, :]
        rotation = future_rotation(rotary, self.rowwise["newest"], total.shape[-1], FUTURE, total)
        return {"query_mean": mean, "query_covariance": covariance, "future_rotation": rotation}

    def window_attention(
        self, keys: Tensor, slots: Tensor, start: Tensor, seen: int,
        scale: float, decays: Tensor | None, window: int | None, softcap: float | None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Return what is wanted of each row's last queries over the slots held now; arguments as in `SlotLayer`."""
        found, wanted = {}, self.wanted
        for width in wanted.widths:
            query = self.rowwise["queries"][:, :, -width:]
            indices = torch.arange(seen - query.shape[2], seen, device=query.device)
            real = indices >= start[:, None]
            visible = self.rowwise.get("visible")
            visible = None if visible is None else visible[:, :, -query.shape[2] :]
            mask = slot_mask(slots, indices, decays=decays, window=window, explicit=visible)
            by_head = attention_probabilities(query, keys, scale, mask, softcap)
            if width in wanted.windows or width in wanted.statistics:
                attention = _of_real(by_head.mean(2), real)
                if width in wanted.windows:
                    found[f"window_attention:{width}"] = attention.sum(2) / real.sum(1).clamp(min=1)[:, None, None]
                if width in wanted.statistics:
                    found[f"window_statistics:{width}"] = window_statistics(attention, real)
            if width in wanted.peaks or width in wanted.next_uses:
                largest = _of_real(by_head.amax(2), real)
                if width in wanted.peaks:
                    found[f"window_peak:{width}"] = largest.sum(2)
                if width in wanted.next_uses:
                    found[f"window_next_use:{width}"] = next_use(largest, real, width)
        return found

    def recorded(
        self, keys: Tensor, slots: Tensor, start: Tensor, seen: int, *,
        scale: float, decays: Tensor | None, window: int | None, softcap: float | None, rotary: Rotary | None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Return everything wanted, as in ``LayerView.recorded``; arguments as in `SlotLayer`."""
        names = ("attention_sum", "attention_spectrum")
        held = slots.shape[2]  # tokens ahead have room already, and are not read yet
        found: dict[str, Tensor] = {name: self.slotwise[name][:, :, :held] for name in names if name in self.slotwise}
        if self.wanted.queries:
            found.update(self.window_attention(keys, slots, start, seen, scale, decays, window, softcap))
        if self.wanted.query_statistics:
            found.update(self.query_statistics(rotary, start))
        return found

    def gather(self, index: Tensor) -> None:
        """Follow a compaction: index (batch, kv_heads, kept) into the slots."""
        for name, state in self.slotwise.items():
            wide = index.view(*index.shape, *([1] * (state.dim() - 3)))
            self.slotwise[name] = state.gather(2, wide.expand(*index.shape, *state.shape[3:]))

    def rows(self, index: Tensor) -> None:
        """Follow a selection, repetition or reordering of the rows."""
        for states in (self.slotwise, self.rowwise):
            for name, state in states.items():
                states[name] = state.index_select(0, index.to(state.device))

    def stop(self) -> None:
        """Record nothing more, and let go of everything recorded."""
        self.wanted, self.slotwise, self.rowwise = Wanted(), {}, {}

    def tensors(self) -> list[Tensor]:
        """Everything held, for counting bytes."""
        return [*self.slotwise.values(), *self.rowwise.values()]


def _writable(state: Tensor) -> Tensor:
    """``state``, copied if it was made in inference mode and that has ended: then it cannot be written to."""
    return state.clone() if state.is_inference() and not torch.is_inference_mode_enabled() else state


def window_statistics(attention: Tensor, real: Tensor) -> Tensor:
    """Return maximum, minimum, sum and fading sum over the queries: (batch, kv_heads, slots, 4).

    attention : (batch, kv_heads, queries, slots), zero for padded queries. real : (batch, queries) bool.
    """
    fading = FADING ** torch.arange(attention.shape[2] - 1, -1, -1, device=attention.device, dtype=attention.dtype)
    smallest = torch.where(real[:, None, :, None], attention, torch.inf).amin(2)
    smallest = torch.where(torch.isfinite(smallest), smallest, 0.0)  # no real query yet
    parts = (attention.amax(2), smallest, attention.sum(2), torch.einsum("bhqs,q->bhs", attention, fading))
    return torch.stack(parts, dim=-1)


def next_use(largest: Tensor, real: Tensor, width: int) -> Tensor:
    """Return which real query is the first to use each slot: (batch, kv_heads, slots) fp32, ``width`` where none does.

    largest : (batch, kv_heads, queries, slots), the largest attention in the group. real : (batch, queries) bool; only
    real queries count, so that padding does not shift the result.
    """
    place = (real.cumsum(1) - 1).to(largest.dtype)[:, None, :, None]
    return torch.where((largest >= USED) & real[:, None, :, None], place, float(width)).amin(2)


def _of_real(attention: Tensor, real: Tensor) -> Tensor:
    """Attention (batch, kv_heads, queries, slots) with 0 for queries that attend to nothing.

    Those are the padded ones, and those that nothing is left for (the softmax of nothing is NaN).
    """
    return torch.where(real[:, None, :, None], attention, 0.0).nan_to_num(nan=0.0)
