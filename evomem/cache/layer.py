"""Cache: the slots of one layer, and attention over them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from evomem.cache.attention import attention_probabilities, grouped_attention, handover
from evomem.cache.observe import Recorder, Wanted
from evomem.cache.spectrum import HOP
from evomem.cache.view import LayerView
from evomem.errors import CacheError

if TYPE_CHECKING:
    from evomem.cache.cache import SlotCache

BLOCK_ELEMENTS = 1 << 22
"""Upper bound on the elements of one block of attention probabilities or masks (16 MiB in fp32)."""


class SlotLayer(CacheLayerMixin):
    """One layer of a `SlotCache`.

    Attributes
    ----------
    keys, values : (batch, kv_heads, slots, head_dim), or None before the first token.
    slots : (batch, kv_heads, slots) int64, token index held, ascending, -1 = empty; shorter heads are right-aligned.
    decays : (batch, kv_heads, slots) fp32 log-decay added to attention logits, or None while nothing fades.
    start : (batch,) int64, first real token of every row.
    seen : tokens read, padding included.
    """

    is_sliding = False
    is_croppable = True

    keys: Tensor
    values: Tensor

    def __init__(self, index: int, cache: SlotCache) -> None:
        super().__init__()
        self.index = index
        self.cache = cache
        self.reset()

    # ---- what transformers calls ----------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything; the layer is as new."""
        self.keys = self.values = None  # type: ignore[assignment]
        self.slots: Tensor = None  # type: ignore[assignment]
        self.decays: Tensor | None = None
        self.start: Tensor = None  # type: ignore[assignment]
        self.starts: tuple[int, ...] = ()
        self.seen = 0
        self.decided = 0  # tokens that had been read at the last decision
        self.dense = True  # slots are 0..seen-1 in every head of every row
        self.aligned = True  # no head has an empty slot
        self.pending: tuple[Tensor, Tensor] | None = None
        self.recorder = Recorder(Wanted.parse(self.cache.policy.observes))
        self.is_initialized = False
        self.bytes_peak, self._byte_tokens = 0, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note that tensors exist from now on; nothing is allocated ahead."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the new tokens' keys and values (batch, kv_heads, tokens, head_dim); attention follows at once."""
        self.cache.require_attached()
        self.is_initialized = True
        self.pending = (key_states, value_states)
        handover.key, handover.layer = key_states, self
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens read so far, evicted ones and padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys, offset) of the mask that the model prepares: it covers every token ever read."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder rows for beam search."""
        self.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        if self.seen:
            self.select_rows(torch.arange(len(self.start)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows named, in that order."""
        self.select_rows(indices)

    def select_rows(self, index: Tensor) -> None:
        """Rows ``index`` (new_batch,) of everything held."""
        if not self.seen:
            return
        index = index.to(self.keys.device)
        self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)
        self.slots, self.start = self.slots.index_select(0, index), self.start.index_select(0, index)
        if self.decays is not None:
            self.decays = self.decays.index_select(0, index)
        self.starts = tuple(self.start.tolist())
        self.recorder.rows(index)

    def crop(self, max_length: int) -> None:
        """Forget the tokens from index ``max_length`` on (negative: that many from the end).

        Observations that summed over cropped queries keep what those added.
        """
        length = self.seen + max_length if max_length < 0 else max_length
        if not self.seen or length >= self.seen:
            return
        if self.cache.wanted.windows:
            raise CacheError("a cache that records window attention cannot be cropped: its last queries would be wrong")
        if self.dense:
            self._cut(length)
        else:
            self.keep(self.slots < length)
        self.seen = length
        self.decided = min(self.decided, length)

    def _cut(self, length: int) -> None:
        index = torch.arange(length, device=self.keys.device).expand(*self.keys.shape[:2], length)
        self._gather(index)

    # ---- decisions ------------------------------------------------------------------------------------------------

    def view(self) -> LayerView:
        """What a manager sees now."""
        if not self.seen:
            raise CacheError("nothing has been read yet: there is no view of an empty layer")
        recorder, recorded = self.recorder, {}
        for name in ("attention_sum", "attention_spectrum"):
            if name in recorder.slotwise:
                recorded[name] = recorder.slotwise[name]
        for width in recorder.wanted.windows:
            recorded[f"window_attention:{width}"] = self._window(width)
        if recorder.wanted.query_statistics:
            recorded.update(recorder.query_statistics(self.cache.rotary))
        return LayerView(
            self.keys, self.values, self.slots, self.start, self.seen, self.seen - self.decided,
            self.index, self.cache.depth, recorded,
        )  # fmt: skip

    def _window(self, width: int) -> Tensor:
        """Mean attention of each row's last ``width`` queries over the slots held now: (batch, kv_heads, slots)."""
        query = self.recorder.rowwise["queries"][:, :, -width:]
        indices = torch.arange(self.seen - query.shape[2], self.seen, device=query.device)
        real = indices >= self.start[:, None]
        mask = (self.slots[:, :, None] <= indices[:, None]) & self.slots[:, :, None].ge(0)
        mask = mask | ~mask.any(-1, keepdim=True)
        attention = attention_probabilities(query, self.keys, self.scale, mask, self.softcap).mean(2)
        weight = real[:, None, :, None].float()
        return (attention * weight).sum(2) / weight.sum(2).clamp(min=1) * self.slots.ge(0)

    def decide(self, rows: Tensor | None = None) -> None:
        """Let the policy decide about this layer now; ``rows`` (batch,) bool limits it to some rows."""
        view = self.view()
        decision = self.cache.policy.decide(view)
        keep, decay = decision.keep & view.valid, decision.decay
        if rows is not None:
            keep = torch.where(rows[:, None, None], keep, view.valid)
        if decay is not None:
            old = self.decays if self.decays is not None else torch.zeros_like(decay)
            self.decays = decay.float() if rows is None else torch.where(rows[:, None, None], decay.float(), old)
        self.keep(keep)
        self.decided = self.seen

    def keep(self, mask: Tensor) -> None:
        """Evict, physically, every slot where ``mask`` (batch, kv_heads, slots) is False."""
        if mask.shape != self.slots.shape:
            raise CacheError(f"keep-mask of shape {tuple(mask.shape)} for slots of shape {tuple(self.slots.shape)}")
        mask = mask & (self.slots >= 0)
        if bool(mask.all()):
            return
        counts = mask.sum(-1, keepdim=True)
        longest = int(counts.max())
        # A stable sort of False before True puts the kept slots last, in their order: right-aligned.
        index = torch.sort(mask.to(torch.uint8), dim=-1, stable=True).indices[..., mask.shape[-1] - longest :]
        filled = torch.arange(longest, device=mask.device) >= longest - counts
        self._gather(index)
        self.dense, self.aligned = False, bool(filled.all())
        if not self.aligned:
            self.slots = torch.where(filled, self.slots, -1)
            # What an empty slot holds must not reach the logits, not even as 0 × NaN.
            self.keys = self.keys.masked_fill(~filled[..., None], 0)
            self.values = self.values.masked_fill(~filled[..., None], 0)

    def _gather(self, index: Tensor) -> None:
        wide = index[..., None].expand(*index.shape, self.keys.shape[-1])
        self.keys = self.keys.gather(2, wide)
        self.values = self.values.gather(2, index[..., None].expand(*index.shape, self.values.shape[-1]))
        self.slots = self.slots.gather(2, index)
        if self.decays is not None:
            self.decays = self.decays.gather(2, index)
        self.recorder.gather(index)

    # ---- attention ------------------------------------------------------------------------------------------------

    def attend(
        self, query: Tensor, padding: Tensor | None, scale: float, window: int | None, softcap: float | None,
        positions: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Store the pending tokens, attend, observe, and decide where the schedule says so.

        query : (batch, query_heads, tokens, head_dim). padding : (batch, tokens ever read) bool, True = real, or None.

        A long input is cut where decisions are due. A layer's output for a token depends on earlier tokens only, so
        cutting inside the layer is the same as feeding the model one piece after the other.
        """
        if self.pending is None:
            raise CacheError("attention without new keys: update() must come first")
        (keys, values), self.pending = self.pending, None
        batch, count, begin = query.shape[0], query.shape[2], self.seen
        self.scale, self.softcap = scale, softcap
        real = None if padding is None else padding[:, begin : begin + count]
        self._find_starts(batch, begin, real, query)
        outputs, at = [], 0
        for end, rows in self._pieces(begin, count):
            piece = slice(at, end)
            part = None if real is None else real[:, piece]
            self._append(keys[:, :, piece], values[:, :, piece], part)
            outputs.append(self._attend(query[:, :, piece], part, padding, window))
            self.recorder.queried(
                query[:, :, piece], None if positions is None else positions[:, piece], part, self.cache.rotary
            )
            self._account(end - at)
            if rows is not None:
                self.decide(None if bool(rows.all()) else rows)
                self._account(0)
            at = end
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _find_starts(self, batch: int, begin: int, real: Tensor | None, query: Tensor) -> None:
        """Find each row's first real token; a row that is padding so far starts after what has been read."""
        if begin == 0:
            self.start = torch.zeros(batch, dtype=torch.int64, device=query.device)
            self.starts = (0,) * batch
        if real is None or (begin and max(self.starts) < begin):
            return
        first = begin + torch.where(real.any(1), real.long().argmax(1), real.shape[1])
        self.start = torch.where(self.start >= begin, first, self.start)
        self.starts = tuple(self.start.tolist())

    def _pieces(self, begin: int, count: int) -> Iterator[tuple[int, Tensor | None]]:
        """Cut ``count`` new tokens at decisions: (end of the piece, rows that decide there or None)."""
        every = self.cache.policy.schedule.every
        if every is None:
            once = self.cache.decides_after_forward and begin == 0
            yield count, torch.ones(len(self.starts), dtype=torch.bool, device=self.start.device) if once else None
            return
        offsets = sorted({(start - begin) % every or every for start in set(self.starts)})
        ends = sorted({end for first in offsets for end in range(first, count + 1, every)})
        for end in ends:
            read = begin + end - self.start
            yield end, (read % every == 0) & (read > 0)
        if not ends or ends[-1] < count:
            yield count, None

    def _append(self, keys: Tensor, values: Tensor, real: Tensor | None) -> None:
        batch, kv_heads, count, _ = keys.shape
        index = torch.arange(self.seen, self.seen + count, device=keys.device).expand(batch, kv_heads, count)
        if real is not None and not bool(real.all()):
            index = torch.where(real[:, None], index, -1)
            self.dense = self.aligned = False
        if self.seen == 0:
            self.keys, self.values, self.slots = keys, values, index
        else:
            self.keys, self.values = torch.cat((self.keys, keys), 2), torch.cat((self.values, values), 2)
            self.slots = torch.cat((self.slots, index), 2)
        if self.decays is not None:
            self.decays = torch.cat((self.decays, self.decays.new_zeros(batch, kv_heads, count)), 2)
        self.recorder.append(batch, kv_heads, count, keys)
        self.seen += count

    def _attend(self, query: Tensor, real: Tensor | None, padding: Tensor | None, window: int | None) -> Tensor:
        queries, held = query.shape[2], self.keys.shape[2]
        old = held - queries
        observe = self.recorder.wanted.every_query
        far = window is not None and self.seen > window
        plain = self.aligned and self.decays is None and not far
        if not observe and plain and (queries == 1 or old == 0):
            return grouped_attention(
                query, self.keys, self.values, self.scale, causal=queries > 1, softcap=self.softcap
            )
        if not observe and plain and queries * held <= BLOCK_ELEMENTS:
            triangle = torch.ones(queries, held, dtype=torch.bool, device=query.device).tril(old)[None, None]
            return grouped_attention(query, self.keys, self.values, self.scale, mask=triangle, softcap=self.softcap)
        rows = query.shape[0] * (query.shape[1] if observe else self.keys.shape[1])
        block = max(HOP, min(queries, BLOCK_ELEMENTS // (rows * held) // HOP * HOP))
        outputs = []
        for at in range(0, queries, block):
            end = min(at + block, queries)
            reach = old + end  # later slots belong to later queries
            part = query[:, :, at:end]
            keys, values = self.keys[:, :, :reach], self.values[:, :, :reach]
            mask = self._mask(at, end, queries, reach, None if real is None else real[:, at:end], padding, window)
            if not observe:
                outputs.append(grouped_attention(part, keys, values, self.scale, mask=mask, softcap=self.softcap))
                continue
            attention = attention_probabilities(part, keys, self.scale, mask, self.softcap)
            mixed = torch.matmul(attention.to(values.dtype).flatten(2, 3), values)
            outputs.append(mixed.view(*part.shape[:3], values.shape[-1]))
            observed = attention.mean(2)
            if real is not None:
                observed = observed * real[:, None, at:end, None]
            self.recorder.attended(observed, self.seen - queries + at, self.starts)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _mask(
        self, at: int, end: int, queries: int, reach: int, real: Tensor | None, padding: Tensor | None,
        window: int | None,
    ) -> Tensor:  # fmt: skip
        """Mask (1 or batch, 1 or kv_heads, end - at, reach): allowed slots, with their log-decay where any fades."""
        index = torch.arange(self.seen - queries + at, self.seen - queries + end, device=self.keys.device)[:, None]
        slots = self.slots[:, :, None, :reach]
        if self.aligned and self.dense:
            slots = slots[:1, :1]
        allowed = (slots >= 0) & (slots <= index)
        if window is not None:
            allowed = allowed & (slots > index - window)
        if padding is not None:
            # The caller may hide a token that was visible when it was read.
            held = self.slots[:, :, :reach].clamp(min=0)
            visible = padding[:, None].expand(-1, held.shape[1], -1).gather(2, held)
            allowed = allowed & visible[:, :, None]
            if real is not None:
                # A padded query sees everything: its output is never used, but it must be finite.
                allowed = allowed | ~real[:, None, :, None]
        if self.decays is None:
            return allowed
        decays = self.decays[:, :, None, :reach]
        return torch.where(allowed, decays, -torch.inf)

    # ---- bytes ----------------------------------------------------------------------------------------------------

    def nbytes(self) -> int:
        """Bytes of every tensor held now: keys, values, slot indices, decays, recorded observations."""
        if not self.seen:
            return 0
        held = [self.keys, self.values, self.slots, *self.recorder.tensors()]
        if self.decays is not None:
            held.append(self.decays)
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def _account(self, tokens: int) -> None:
        held = self.nbytes()
        self.bytes_peak = max(self.bytes_peak, held)
        self._byte_tokens += held * tokens
        self.cache.account(self.index, held)

    @property
    def bytes_mean(self) -> float:
        """Mean of the bytes held, over the tokens read."""
        return self._byte_tokens / self.seen if self.seen else 0.0
