"""Memory: the state of one layer's observations, kept in step with its slots and rows.

Attention is post-softmax, fp32, and, where nothing else is said, a mean over the query heads of the KV head's group. It
is computed in blocks of queries; a (heads, tokens, tokens) tensor never exists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from evomem.memory.kv.attention import attention_probabilities
from evomem.memory.kv.masks import Visibility, causal_rows, joined_rows, slot_mask
from evomem.memory.kv.rotary import Rotary
from evomem.memory.observations.base import Moment, Wanted, Window

if TYPE_CHECKING:
    from evomem.memory.kv.query_centres import QueryCentre
    from evomem.memory.kv.ragged import RaggedLayout


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
    flat: dict[str, Tensor] = field(default_factory=dict)
    """What of ``slotwise`` belongs to older slots of heads that hold differently many (`evomem.memory.kv.storage`)."""

    def append(self, batch: int, kv_heads: int, count: int, like: Tensor) -> None:
        """Make room for ``count`` new slots: nobody has looked at them yet."""
        for one in self.wanted.observations:
            one.append(self, (batch, kv_heads, count), like)

    def extend(self, name: str, new: Tensor) -> None:
        """Put the state of new slots, on axis 2, after that of the slots held."""
        old = self.slotwise.get(name)
        self.slotwise[name] = new if old is None else torch.cat((old, new), dim=2)

    def attended(self, attention: Tensor, first: int, starts: tuple[int, ...]) -> None:
        """Learn from the attention of a block of queries.

        attention : (batch, kv_heads, queries, slots held so far), zero for padded queries.
        first : token index of the block's first query. starts : first real token of every row.
        """
        for one in self.wanted.observations:
            if one.every_query:
                one.attended(self, attention, first, starts)

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
            kept = self.rowwise["queries"].shape[2] if "queries" in self.rowwise else 0
            old = causal_rows(first - kept, kept, window, device).expand(batch, -1, -1, -1)
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
        for one in self.wanted.observations:
            one.queried(self, query, positions, real, rotary, start)

    def predicted(self, error: Tensor) -> None:
        """Learn how badly the newest slots' values were predicted: error (batch, kv_heads, new slots) >= 0."""
        for one in self.wanted.observations:
            one.predicted(self, error)

    def gated(self, logits: Tensor, ratio: Tensor) -> None:
        """Learn of the newest slots' gates (batch, kv_heads, new slots, 3) and relative surprise (…, new slots)."""
        for one in self.wanted.observations:
            one.gated(self, logits, ratio)

    def updated(self, old: Tensor, new: Tensor) -> None:
        """Learn of an update of all slots: what they held and would hold, (batch, kv_heads, slots, size)."""
        for one in self.wanted.observations:
            one.updated(self, old, new)

    def recorded(
        self, keys: Tensor, slots: Tensor, start: Tensor, seen: int, *,
        scale: float, decays: Tensor | None, window: int | None, softcap: float | None, rotary: Rotary | None,
        centre: QueryCentre | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Return everything wanted, as in ``LayerView.recorded``; arguments as in `Moment`."""
        moment = Moment(keys, slots, start, seen, scale, decays, window, softcap, rotary, centre)
        newest = lru_cache(maxsize=1)(lambda width: self._window(width, moment))
        recorded: dict[str, Tensor] = {}
        # Those of one width side by side, so that one window is computed, and held, at a time.
        for one in sorted(self.wanted.observations, key=lambda one: one.newest_queries):
            recorded.update(one.recorded(self, moment, newest))
        return recorded

    def _window(self, width: int, moment: Moment) -> Window:
        """Return the attention of each row's last queries over the slots held now."""
        query = self.rowwise["queries"][:, :, -width:]
        indices = torch.arange(moment.seen - query.shape[2], moment.seen, device=query.device)
        real = indices >= moment.start[:, None]
        visible = self.rowwise.get("visible")
        visible = None if visible is None else visible[:, :, -query.shape[2] :]
        mask = slot_mask(moment.slots, indices, decays=moment.decays, window=moment.window, explicit=visible)
        return Window(attention_probabilities(query, moment.keys, moment.scale, mask, moment.softcap), real, width)

    def change(self, change: Callable[[Tensor | None, Tensor], tuple[Tensor | None, Tensor]]) -> None:
        """Follow what becomes of the slots: replace the flat part (None: there is none) and the even part of states."""
        for name in list(self.slotwise):
            flat, self.slotwise[name] = change(self.flat.pop(name, None), self.slotwise[name])
            if flat is not None:
                self.flat[name] = flat

    def whole(self, layout: RaggedLayout | None) -> Recorder:
        """Return a recorder whose ``slotwise`` states are of all slots, padded; this one where all slots are even.

        ``rowwise`` is shared. What the recorder learns of slots is taken over by `take_over`.
        """
        if layout is None:
            return self
        joined = {name: torch.cat((layout.pad(self.flat[name]), state), 2) for name, state in self.slotwise.items()}
        return replace(self, slotwise=joined, flat={})

    def take_over(self, whole: Recorder, layout: RaggedLayout | None) -> None:
        """Hold what `whole` returned, or another recorder of all slots, in a flat and an even part."""
        if layout is None:
            self.slotwise = whole.slotwise
            return
        older = slice(layout.longest)
        self.flat = {name: layout.flatten(state[:, :, older]) for name, state in whole.slotwise.items()}
        self.slotwise = {name: state[:, :, layout.longest :].clone() for name, state in whole.slotwise.items()}

    def rows(self, index: Tensor) -> None:
        """Follow a selection, repetition or reordering of the rows; slot-aligned states follow by `change`."""
        for name, state in self.rowwise.items():
            self.rowwise[name] = state.index_select(0, index.to(state.device))

    def stop(self) -> None:
        """Record nothing more, and let go of everything recorded."""
        self.wanted, self.slotwise, self.rowwise, self.flat = Wanted(), {}, {}, {}

    def tensors(self) -> list[Tensor]:
        """Everything held, for counting bytes."""
        return [*self.slotwise.values(), *self.rowwise.values(), *self.flat.values()]


def writable(state: Tensor) -> Tensor:
    """Return ``state``, copied if it was made in inference mode and that has ended: then it cannot be written to."""
    return state.clone() if state.is_inference() and not torch.is_inference_mode_enabled() else state
