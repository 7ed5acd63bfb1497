"""Memory: one layer of a cache: what it has read, when its slots are decided about, and what they cost."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evomem.errors import CacheError
from evomem.memory.kv.attention import full_precision, handover, refuse_tracing, uncompiled
from evomem.memory.kv.due import check_heads, turns
from evomem.memory.kv.layer_memory import LayerMemory
from evomem.memory.kv.masks import Visibility
from evomem.memory.kv.slot_attention import Queries, attend
from evomem.memory.kv.storage import SlotStorage
from evomem.memory.observations import Recorder
from evomem.memory.view import Decision, LayerView, refuse_gates

if TYPE_CHECKING:
    from evomem.memory.kv.cache import SlotCache


class SlotLayer(LayerMemory):  # type: ignore[no-untyped-call]
    """One layer of a `SlotCache`."""

    is_sliding = False

    def __init__(self, index: int, cache: SlotCache) -> None:
        # The base class would set keys and values, which are the storage's.
        self.index = index
        # Weak, because the cache holds its layers: a ring would keep all slots in memory until a garbage collection.
        self._cache = weakref.ref(cache)
        self.reset()

    @property
    def cache(self) -> SlotCache:
        """The cache that this layer is part of; it must be alive."""
        cache = self._cache()
        if cache is None:
            raise CacheError("this layer's cache is gone: keep the cache, not only its layers")
        return cache

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise CacheError(
            "a layer belongs to its cache and is not copied or pickled by itself: cache.clone() copies all"
        )

    # ---- what transformers calls ----------------------------------------------------------------------------------

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether `crop` can be exact."""
        return not self.recorder.wanted.looks_back

    def reset(self) -> None:
        """Forget everything; the layer is as new."""
        self.storage = SlotStorage()
        self.start: Tensor = None  # type: ignore[assignment]
        self.starts: tuple[int, ...] = ()
        self.evicted: Tensor | None = None
        self.turned: Tensor | None = None  # tokens read at every row's last decision, where rows had different turns
        self.seen = 0
        self.ahead = 0  # tokens stored after the one that was read last, while a long input is cut
        self.decided = 0  # tokens that had been read at the last decision about all rows
        self.pending: tuple[Tensor, Tensor] | None = None
        self.recorder = Recorder(self.cache.wanted)
        self.scale = 1.0  # this and the next two are the model's, known from the first attention on
        self.softcap: float | None = None
        self.window: int | None = None
        self.is_initialized = False
        self.bytes_peak, self._byte_tokens, self._read = 0, 0.0, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note that tensors exist from now on; nothing is allocated ahead."""
        self.is_initialized = True

    @uncompiled
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the new tokens' keys and values (batch, kv_heads, tokens, head_dim); attention follows at once."""
        refuse_tracing()
        if self.index == 0:  # every pass begins here, and what holds now holds for its other layers
            self.cache.require_attached()
            self.cache.require_whole()
            self.cache.begin_pass(key_states.shape[2])
            self.cache.note_position(self.seen + key_states.shape[2] - min(self.starts, default=0))
        self.cache.require_attended()
        self.is_initialized = True
        self.pending = (key_states, value_states)
        self.cache.awaiting = self.index
        handover.give(self, key_states, value_states)
        return key_states, value_states

    def length_after_crop(self, max_length: int) -> int:
        """Return how many tokens count as read after ``crop(max_length)``, if that is fewer than were."""
        max_length = int(max_length)  # transformers also gives tensors
        return max(self.seen + max_length, 0) if max_length <= 0 else max_length

    def crop(self, max_length: int) -> None:
        """Forget tokens at the end: -n the last n, 0 none, n all from index n on. What was evicted does not come back.

        A recorded ``attention_sum`` keeps what cropped queries added. Raises `CacheError` while another observation is
        recorded: the windows and frames that cropped queries entered cannot be taken back.
        """
        length = self.length_after_crop(max_length)
        if not self.seen or length >= self.seen:
            return
        if not self.is_croppable:
            raise CacheError(
                f"a cache that records {', '.join(sorted(self.cache.policy.observes))} cannot be cropped: what the "
                "cropped queries added cannot be taken back; read the context again"
            )
        heavier = self.decays is not None and bool((self.decays > 0).any())
        # Values that were refitted say nothing of it themselves; where nothing was evicted there was nothing to refit.
        rewritten = getattr(self.cache.policy, "rewrites", False) and bool(
            (self.counts() < (self.seen - self.start)[:, None]).any()
        )
        if length < self.decided and (heavier or rewritten):
            raise CacheError(
                f"a cache whose slots stand for several tokens, or were rewritten, cannot be cropped to {length}: the "
                f"last decision, after {self.decided} tokens, may have written some of "
                "those that are to go; read the context again"
            )
        if length:
            self.storage.crop(length, self.recorder)
        else:
            self.storage, self.recorder = SlotStorage(), Recorder(self.cache.wanted)
            self.start, self.starts, self.turned = None, (), None  # type: ignore[assignment]
        self.seen, self.decided = length, min(self.decided, length)
        self.recorder.begin = min(self.recorder.begin, length)
        if self.start is not None:
            # A row of which only padding is left begins with what it reads next, as if nothing had been read after it.
            self.start = self.start.clamp(max=length)
            self.starts = tuple(min(start, length) for start in self.starts)
        if self.turned is not None:
            self.turned = self.turned.clamp(max=length)

    # ---- decisions ------------------------------------------------------------------------------------------------

    def view(self) -> LayerView:
        """What a manager sees now."""
        self.cache.require_attended()
        if not self.seen:
            raise CacheError("nothing has been read yet: there is no view of an empty layer")
        self.cache.require_observing(self.recorder)
        keys, values, slots, decays = self.keys, self.values, self.slots, self.decays
        if self.ahead:
            keys, values, slots = (part[:, :, : -self.ahead] for part in (keys, values, slots))
            decays = None if decays is None else decays[:, :, : -self.ahead]
        recorded = self.recorder.whole(self.storage.layout).recorded(
            keys, slots, self.start, self.seen,
            scale=self.scale, decays=decays, window=self.window, softcap=self.softcap,
            rotary=self.cache.rotaries[self.index], centre=self.cache.centres[self.index],
        )  # fmt: skip
        return LayerView(
            keys, values, slots, self.start, self.seen, self._fresh(),
            self.index, self.cache.depth, recorded, evicted=self.evicted, decays=decays,
        )  # fmt: skip

    def _fresh(self) -> int:
        """Tokens since the last decision; a row's own turn was at most ``every`` ago, whatever other rows did."""
        every, since = self.cache.policy.schedule.every, self.seen - self.decided
        if self.cache.whole_model:  # decides when a pass ends, which may be later than a row's turn
            return max(self.since_turn())
        return since if every is None else min(every, since)

    def since_turn(self) -> list[int]:
        """Tokens since every row's last decision, for a manager that decides about all layers at once."""
        if self.turned is None:
            return [self.seen - self.decided] * len(self.starts)
        return (self.seen - self.turned).tolist()

    def restore(self, view: LayerView, rows: int) -> None:
        """Start from a view of one row, repeated ``rows`` times without copying."""
        self.storage = SlotStorage.of_view(view, rows)
        self.start = view.start.expand(rows)
        self.starts = tuple(self.start.tolist())
        self.evicted = None if view.evicted is None else view.evicted.expand(rows, -1)
        self.seen = self.decided = view.seen
        self.is_initialized = True

    def observe_again(self) -> None:
        """Record from now on; nobody has looked at the slots held yet."""
        self.recorder = Recorder(self.cache.wanted, begin=self.seen)
        if self.seen:
            self.recorder.append(*self.storage.shape, self.storage.even["keys"])
            self.recorder.take_over(self.recorder, self.storage.layout)

    def decide(self, rows: Tensor | None = None) -> None:
        """Let the policy decide about this layer now; ``rows`` (batch,) bool limits it to some rows.

        Raises `UnsupportedModelError`, see `check_heads`.
        """
        view = self.view()
        check_heads(self.cache.policy, (layer.slots.shape[1] for layer in self.cache.layers if layer.seen))
        with full_precision(view.keys):
            decision = self.cache.policy.decide(view)
        self.apply(decision, rows)

    def apply(self, decision: Decision, rows: Tensor | None = None) -> None:
        """Carry out a decision about the slots held now; ``rows`` (batch,) bool limits it to some rows."""
        refuse_gates(decision, "a KV cache")
        keep, decay, evicted = decision.keep, decision.decay, decision.evicted
        if self.ahead and keep.shape[2] == self.storage.shape[2] - self.ahead:  # what is not read yet stays
            keep = F.pad(keep, (0, self.ahead), value=True)
            decay = None if decay is None else F.pad(decay, (0, self.ahead))
        if rows is not None:
            keep = torch.where(rows[:, None, None], keep, self.slots >= 0)
        if decay is not None:
            old = self.decays if self.decays is not None else torch.zeros_like(decay)
            new = decay.float() if rows is None else torch.where(rows[:, None, None], decay.float(), old)
            self.storage.set_decays(new)
        if evicted is not None:
            before = self.evicted if self.evicted is not None else torch.zeros_like(evicted)
            self.evicted = evicted if rows is None else torch.where(rows[:, None], evicted, before)
        if decision.keys is not None and decision.values is not None:
            self._rewrite(decision.keys, decision.values, rows)
        self.keep(keep)
        if rows is None:
            self.decided, self.turned = self.seen, None

    def _rewrite(self, keys: Tensor, values: Tensor, rows: Tensor | None) -> None:
        """Let slots of some rows hold other keys and values; what is not read yet stays."""
        ahead = self.storage.shape[2] - keys.shape[2]
        if ahead:
            keys = torch.cat((keys, self.keys[:, :, -ahead:]), 2)
            values = torch.cat((values, self.values[:, :, -ahead:]), 2)
        if rows is not None:
            chosen = rows[:, None, None, None]
            keys, values = torch.where(chosen, keys, self.keys), torch.where(chosen, values, self.values)
        self.storage.rewrite(keys, values)

    def apply_turns(self, decisions: Sequence[Decision], turns: Sequence[Sequence[bool]]) -> None:
        """Carry out decisions about different rows of the slots held now: decision i is about rows ``turns[i]``."""
        if len(decisions) == 1 and all(turns[0]):
            self.apply(decisions[0])
            return
        for decision in decisions:
            refuse_gates(decision, "a KV cache")
        filled, device = self.slots >= 0, self.slots.device
        turned = self.turned if self.turned is not None else torch.full_like(self.start, self.decided)
        rows = [torch.tensor(turn, device=device) for turn in turns]
        keep, decays, evicted = filled, [one.decay for one in decisions], self.evicted
        keys: Tensor | None = None
        values: Tensor | None = None
        if any(one.keys is not None for one in decisions):
            keys, values = self.keys, self.values
        decay = None if all(one is None for one in decays) else self.decays
        if decay is None and any(one is not None for one in decays):
            decay = torch.zeros(filled.shape, device=device, dtype=torch.float32)
        for decision, turn in zip(decisions, rows, strict=True):
            keep = torch.where(turn[:, None, None], decision.keep, keep)
            turned = torch.where(turn, self.seen, turned)
            if decision.evicted is not None:
                before = evicted if evicted is not None else torch.zeros_like(decision.evicted)
                evicted = torch.where(turn[:, None], decision.evicted, before)
            if keys is not None and decision.keys is not None:
                keys = torch.where(turn[:, None, None, None], decision.keys, keys)
            if values is not None and decision.values is not None:
                values = torch.where(turn[:, None, None, None], decision.values, values)
            if decay is not None and decision.decay is not None:
                decay = torch.where(turn[:, None, None], decision.decay.float(), decay)
        self.apply(Decision(keep, decay, evicted, keys, values))
        if not bool(torch.stack(rows).any(0).all()):
            self.turned = turned

    def keep(self, mask: Tensor) -> None:
        """Evict, physically, every slot where ``mask`` (batch, kv_heads, slots) is False."""
        self.storage.keep(mask, self.recorder)

    # ---- attention ------------------------------------------------------------------------------------------------

    def attend(
        self, query: Tensor, visibility: Visibility, scale: float, softcap: float | None, positions: Tensor | None
    ) -> Tensor:
        """Store the pending tokens, attend, observe, and decide where the schedule says so.

        query : (batch, query_heads, tokens, head_dim).

        A long input is cut where decisions about the layer are due. A layer's output for a token depends on earlier
        tokens only, so cutting inside the layer is the same as feeding the model one piece after the other. Where a
        mask lets tokens look ahead (those of one image see each other), what they look at is stored with them;
        decisions do not see it before it is read.
        """
        if self.pending is None:
            raise CacheError("attention without new keys: update() must come first")
        (keys, values), self.pending = self.pending, None
        self.cache.awaiting = None
        batch, count, begin = query.shape[0], query.shape[2], self.seen
        shape = tuple(self.storage.even["keys"].shape) if begin else ()
        if begin and (*keys.shape[:2], keys.shape[3]) != (*shape[:2], shape[3]):
            raise CacheError(
                f"the input's keys are {tuple(keys.shape)} (rows, KV heads, tokens, size), the cache holds "
                f"{tuple(self.keys.shape)}; for several questions about one context repeat its row in a clone: "
                "other.batch_repeat_interleave(questions)"
            )
        padding, reaches = visibility.padding, visibility.reaches
        self.scale, self.softcap, self.window = scale, softcap, visibility.window
        real = None if padding is None else padding[:, begin : begin + count]
        self._require_hidden(visibility, begin)
        self._find_starts(batch, begin, real, query)
        outputs, at, stored = [], 0, 0
        for end, rows in self._pieces(begin, count):
            piece = slice(at, end)
            part = None if real is None else real[:, piece]
            before = self.nbytes()
            reach = end if reaches is None else reaches[end - 1] - begin
            if reach > stored:
                new = slice(stored, reach)
                self.storage.append(
                    keys[:, :, new], values[:, :, new], begin + stored, None if real is None else real[:, new],
                    self.recorder,
                )  # fmt: skip
                stored = reach
            self.seen, self.ahead = begin + end, stored - end
            self._read += end - at
            here = visibility.rows(piece)
            queries = Queries(query[:, :, piece], begin + at, part, self.starts, here, scale, softcap)
            outputs.append(attend(self.storage, queries, self.recorder))
            self.recorder.looked(here, begin + at, end - at, batch)
            with full_precision(query):
                self.recorder.queried(
                    query[:, :, piece].detach(), None if positions is None else positions[:, piece], part,
                    self.cache.rotaries[self.index], self.start,
                )  # fmt: skip
            self.cache.account(self.index, self.seen, self.note_bytes(before, end - at))
            if rows is not None:
                self.decide(None if bool(rows.all()) else rows)
                if self.cache.policy.schedule.every is None:
                    self.recorder.stop()  # until the next reading
            at = end
        self.storage.settle(self.recorder)
        if self.cache.whole_model and self.index == self.cache.depth - 1:
            self.cache.end_pass(count)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _require_hidden(self, visibility: Visibility, begin: int) -> None:
        """Raise `CacheError` if padding that was read before is to be seen now: it has no slots to be seen in."""
        if self.index or not begin or visibility.explicit is not None or not any(self.starts):
            return
        padding = visibility.padding
        shown = padding is None
        if padding is not None:
            before = torch.arange(begin, device=padding.device) < self.start[:, None].to(padding.device)
            shown = bool((padding[:, :begin] & before).any())
        if shown:
            raise CacheError(
                "this batch was read with padding on the left, and the attention_mask of this call "
                + ("is missing or all ones" if padding is None else "shows some of it")
                + ": padding has no slots; give the mask that covers every token ever read, padding as 0"
            )

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
        """Cut ``count`` new tokens at decisions about this layer: (end of the piece, rows that decide there)."""
        if self.cache.whole_model:  # decides when all layers have read
            yield count, None
            return
        every, rows = self.cache.policy.schedule.every, len(self.starts)
        cuts = [(count, [self.cache.decides_now] * rows)] if every is None else turns(begin, count, self.starts, every)
        for cut, turn in cuts:
            yield cut, torch.tensor(turn, device=self.start.device) if any(turn) else None
