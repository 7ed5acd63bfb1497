"""Memory: all layers' slots, what the model sees as its `past_key_values`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import ref

from torch import Tensor, nn
from transformers.cache_utils import Cache

from evomem.devices import stacked
from evomem.errors import CacheError, UnsupportedModelError
from evomem.memory.kv.attention import IMPLEMENTATION, full_precision
from evomem.memory.kv.callers import Generating, generating
from evomem.memory.kv.due import decide_all, fell_due, needs_all_layers
from evomem.memory.kv.evicted import count_evicted, rows_cropped
from evomem.memory.kv.layer import SlotLayer
from evomem.memory.kv.policy import CachePolicy, wanted_of
from evomem.memory.kv.positions import beyond, position_limit
from evomem.memory.kv.rotary import Rotary, find_rotaries
from evomem.memory.observations import Recorder
from evomem.memory.view import LayerView

if TYPE_CHECKING:  # seconds to import
    from transformers import PreTrainedModel

    from evomem.memory.kv.query_centres import QueryCentre


class SlotCache(Cache):
    """A cache whose slots can be evicted per layer and head; made by ``manager.attach(model)`` or ``new_cache``.

    A manager with the schedule *once* decides at the end of every *reading*, about all slots held then, by what the
    reading's queries showed. A reading is a forward pass of more than one token: a prompt, a later turn of a chat, each
    pass of a loop of your own. All chunks of ``generate(prefill_chunk_size=...)`` are one reading, and so are all
    passes inside ``with cache.reading():``. A first pass of one token is one too; further single tokens are an answer
    that is generated: they are kept, and cost no observing. So at most the budget and what was generated since is held.

    On a cache that was read inside ``reading()`` only such blocks end with a decision, and what is read outside of them
    (a question, say) is kept whole, too. Passes that verify an assistant's guesses are no readings.

    A manager that decides layer by layer is asked as soon as a layer has read; with ``schedule.every``, in the middle
    of a long input. One that needs all layers (``whole_model``) is asked when the last layer has read: at the end of
    the forward pass in which a decision fell due, until when everything is held. A row whose turn it was in that pass
    is decided about then; the others keep everything.

    Attributes
    ----------
    policy : the manager that decides.
    depth : number of layers.
    decides_after_forward : whether readings outside of ``reading()`` end with a decision; False after such a block,
        in a cache made from views, and where a program decides by itself.
    """

    layers: list[SlotLayer]  # type: ignore[assignment]
    max_cache_len = -1
    """No limit; PEFT asks every cache that is not a `DynamicCache`."""

    def __init__(
        self,
        layers: int,
        policy: CachePolicy,
        *,
        rotaries: tuple[Rotary | None, ...] | None = None,
        centres: tuple[QueryCentre | None, ...] | None = None,
        model: PreTrainedModel | None = None,
    ) -> None:
        self.policy = policy
        self.wanted = wanted_of(policy)
        self.rotaries = rotaries or (None,) * layers
        self.centres = centres or (None,) * layers
        self.depth = layers
        self.decides_after_forward = True
        self.decides_now = False  # the forward pass that runs ends with the manager's decision
        self.undecided = False  # the first chunks of a prompt were read, and no decision about them was made yet
        self.owing = False  # a decision about all layers fell due, and was not made yet
        self.refused = False  # layers have read different tokens, and an error has said so
        self.awaiting: int | None = None  # layer whose new keys no attention has read yet
        self._model = None if model is None else ref(model)
        self._limit = None if model is None else position_limit(model)
        self._attentions: frozenset[int] = frozenset()
        self._sums: dict[int, int] = {}
        self.bytes_peak = 0
        super().__init__(layers=[SlotLayer(index, self) for index in range(layers)])

    @classmethod
    def for_model(cls, model: PreTrainedModel, policy: CachePolicy) -> SlotCache:
        """Return an empty cache for ``model``; raises `UnsupportedModelError`.

        A model with a memory of its own makes it itself. A policy that decides otherwise on another model (a method
        ``for_model``) is asked what it is on this one.
        """
        from evomem.memory.kv.attach import check_supported, has_own_memory

        policy = policy.for_model(model) if hasattr(policy, "for_model") else policy
        if has_own_memory(model):
            return model.decided_cache(policy)  # type: ignore[operator,no-any-return]
        from evomem.memory.kv.parallel import check_parallel

        layers = check_supported(model)
        check_parallel(model, policy, layers)
        centred = "tri_attention" in policy.observes
        rotaries = find_rotaries(model, layers) if wanted_of(policy).before_rotation else None
        centres = None
        if centred:
            from evomem.memory.kv.query_centres import query_centres

            centres = query_centres(lambda all_kept: cls(layers, all_kept, rotaries=rotaries, model=model), model)
        return cls(layers, policy, rotaries=rotaries, centres=centres, model=model)

    def is_for(self, module: nn.Module) -> bool:
        """Whether an attention module is one of the model that the cache was made for; True where that is unknown."""
        from evomem.memory.kv.attach import attention_modules

        model = self.model
        if model is None:
            return True
        if id(module) not in self._attentions:  # also where a model's attention was exchanged
            self._attentions = frozenset(id(part) for part in attention_modules(model))
        return id(module) in self._attentions

    def require_attached(self) -> None:
        """Raise `CacheError` when the model would run stock attention over this cache."""
        model = self.model
        if model is not None and model.config.get_text_config(decoder=True)._attn_implementation != IMPLEMENTATION:
            raise CacheError(
                "this cache belongs to a model that is not attached; use it inside `with manager.attach(model):`"
            )

    def note_position(self, tokens: int) -> None:
        """Warn, once a process, when a model with rotary positions reads more tokens than it was made for."""
        limit, model = self._limit, None if self._model is None else self._model()
        if limit is not None and not limit.learned and tokens > limit.tokens and model is not None:
            self._limit = None
            warnings.warn(f"evomem: {beyond(model, limit)}", stacklevel=2)

    @property
    def whole_model(self) -> bool:
        """Whether the manager decides about all layers at once."""
        return needs_all_layers(self.policy)

    def require_whole(self) -> None:
        """Raise `CacheError` when an error or interruption cut a forward pass short, so that layers disagree.

        Or when a decision about all layers was due, and making it failed.
        """
        if self.owing:
            raise CacheError(
                "the decision that was due at the end of the last forward pass was not made, because of an error; make "
                "it with cache.decide(), or reset() the cache and read the context again"
            )
        if self._uneven():
            self.refused = True
            raise CacheError(
                "a forward pass over this cache was cut short, so some layers read tokens that others did not; "
                "reset() it and read the context again"
            )

    def require_finished(self) -> None:
        """Raise `CacheError` when the last pass left out layers that the manager decides about, and nobody has said so.

        Asked at the end of a `reading` and of the block in which the model is attached: a model that leaves early never
        runs the last layer, at which a decision about all layers is made.
        """
        if self.whole_model and not self.refused and self._uneven():
            self.refused = True
            raise CacheError(
                "the last forward pass over this cache did not run all layers, so the manager, which decides about all "
                "layers at once, has not decided; reset() the cache, and read with the whole model"
            )

    def _uneven(self) -> bool:
        return len({layer.seen for layer in self.layers}) > 1

    def require_attended(self) -> None:
        """Raise `UnsupportedModelError` when keys were given to a layer and no managed attention read them."""
        if self.awaiting is not None:
            raise UnsupportedModelError(
                f"the keys of layer {self.awaiting} were given to the cache, and no managed attention read them: the "
                "model attends by code of its own, which evomem does not manage, or is not attached; or a forward pass "
                "over this cache was cut short: then reset() it and read the context again"
            )

    def require_observing(self, recorder: Recorder) -> None:
        """Raise `CacheError` when a decision is wanted of a layer whose recorder has stopped."""
        if recorder.wanted != self.wanted:
            raise CacheError(
                "the manager has decided at the end of a reading, and what it observes is not recorded in between; to "
                "decide again, read further tokens, or read inside `with cache.reading():`"
            )

    def begin_pass(self, tokens: int) -> None:
        """Find out whether the forward pass of ``tokens`` tokens that begins is a reading that ends with a decision."""
        first = self.get_seq_length() == 0
        reading = first or tokens > 1 or self.undecided
        around = generating() if reading else Generating()
        if not around.uses_cache and not first:
            raise CacheError(
                "generate was given a cache of evomem's and use_cache=False, with which it reads the whole text again "
                "for every token, into the same cache; leave use_cache out"
            )
        if self.policy.schedule.every is not None or not self.decides_after_forward:
            self.decides_now = False
            return
        reading = reading and (first or self.undecided or not around.takes_back)
        if reading:
            self.observe_again()
        self.decides_now = reading and not around.unfinished
        self.undecided = reading and around.unfinished

    def observe_again(self) -> None:
        """Let layers whose recorder has stopped record from now on."""
        for layer in self.layers:
            if layer.recorder.wanted != self.wanted:
                layer.observe_again()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Read a context in any number of passes; a manager with schedule *once* decides when the block ends.

        From then on it decides at the end of such blocks only. Raises `CacheError` when nothing was read, and what a
        manager observes was let go at its last decision.
        """
        once, before, begin = self.policy.schedule.every is None, self.decides_after_forward, self.get_seq_length()
        stopped = [layer for layer in self.layers if layer.recorder.wanted != self.wanted]
        if once:
            self.observe_again()
        self.decides_after_forward = self.decides_now = self.undecided = False
        try:
            yield
            self.require_finished()
            if once and stopped and self.get_seq_length() == begin:
                raise CacheError("nothing was read inside the block, so there is nothing to decide by")
        except BaseException:
            self.decides_after_forward = before
            if self.get_seq_length() == begin:
                for layer in stopped:
                    layer.recorder.stop()
            raise
        if once:
            self.decide()

    def decide(self) -> None:
        """Let the manager decide about every layer now.

        Raises
        ------
        CacheError : nothing was read; or the manager decides about all layers at once, and not all have read the same.
        """
        if not self.whole_model:
            for layer in self.layers:
                layer.decide()
            return
        self.owing = False
        self.require_whole()
        self._decide_all([True] * len(self.layers[0].starts))

    def end_pass(self, tokens: int) -> None:
        """Make the decision about all layers that fell due in the forward pass of ``tokens`` tokens that ends here."""
        if self._uneven():
            self.refused = True
            raise CacheError(
                "a forward pass ran its last layer and not all the others, so the manager, which decides about all "
                "layers at once, cannot; reset() the cache, and read with the whole model"
            )
        every, starts = self.policy.schedule.every, self.layers[0].starts
        begin = self.get_seq_length() - tokens
        due = [self.decides_now] * len(starts) if every is None else fell_due(begin, tokens, starts, every)
        if any(due):
            self._decide_all(due)
            if every is None:
                for layer in self.layers:
                    layer.recorder.stop()  # until the next reading

    def _decide_all(self, due: list[bool]) -> None:
        """Let the manager decide about all layers at once, for the rows that are due.

        Rows whose last turns were at different times look back to different tokens: they are asked about apart.
        """
        self.owing = True
        views = [layer.view() for layer in self.layers]
        since = self.layers[0].since_turn()
        groups = sorted({count for count, turn in zip(since, due, strict=True) if turn})
        decided = []
        with full_precision(views[0].keys):
            for fresh in groups:
                decided.append(decide_all(self.policy, [replace(view, fresh=fresh, memo={}) for view in views]))
        del views  # so that a layer's old slots go as soon as its new ones are there
        rows = [[turn and count == fresh for count, turn in zip(since, due, strict=True)] for fresh in groups]
        for index, layer in enumerate(self.layers):
            layer.apply_turns([one[index] for one in decided], rows)
        self.owing = False

    def repeat(self, ids: Tensor) -> None:
        """Let the model read its context once more, for a manager that goes by that (`kvzip`).

        >>> with manager.attach(model) as cache:                           # doctest: +SKIP
        ...     with cache.reading():
        ...         model(ids, past_key_values=cache)
        ...         cache.repeat(ids)

        Raises `CacheError`, see `evomem.memory.kv.repeating.repeat`.
        """
        from evomem.memory.kv.repeating import repeat

        repeat(self, ids)

    def keep(self, masks: list[Tensor]) -> None:
        """Evict by one mask a layer (batch, kv_heads, slots)."""
        for layer, mask in zip(self.layers, masks, strict=True):
            layer.keep(mask)
        if getattr(self.policy, "counts_evicted", False):
            count_evicted(self.layers)

    def crop(self, max_length: int) -> None:
        """Forget tokens at the end of every layer, see `SlotLayer.crop`."""
        counting = any(layer.evicted is not None for layer in self.layers)
        length = self.layers[0].length_after_crop(max_length)
        rows = rows_cropped(self.layers, length) if counting else None
        for layer in self.layers:
            layer.crop(max_length)
        if rows is not None:
            count_evicted(self.layers, rows)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, evicted ones and padding included."""
        return self.layers[layer_idx].seen

    def reset(self) -> None:
        """Forget everything, measurements too; the cache is as new."""
        for layer in self.layers:
            layer.reset()
        self._sums = {}
        self.bytes_peak = 0
        self.awaiting, self.owing, self.refused = None, False, False
        self.decides_after_forward, self.decides_now, self.undecided = True, False, False

    # ---- measurements ---------------------------------------------------------------------------------------------

    def account(self, layer: int, seen: int, size: int) -> None:
        """Note the bytes that a layer held when ``seen`` tokens had been read.

        The peak is over tokens, not over the moments of one forward pass, in which a layer may evict before the next
        one has read: so reading in pieces and reading at once measure the same, and the mean is never above the peak.
        """
        self._sums[seen] = self._sums.get(seen, 0) + size
        if layer == self.depth - 1:
            self.bytes_peak = max(self.bytes_peak, self._sums.pop(seen))

    def nbytes(self) -> int:
        """Bytes of the tensors held now, over all layers and rows."""
        return sum(layer.nbytes() for layer in self.layers)

    def bytes_per_token(self) -> int:
        """Bytes that one more token costs in every row, over all layers."""
        return sum(layer.bytes_per_token() for layer in self.layers)

    def bytes_by_row(self) -> Tensor:
        """Bytes that every row would hold in a cache of its own: (batch,) int64; see `SlotLayer.bytes_by_row`."""
        return stacked([layer.bytes_by_row() for layer in self.layers]).sum(0)

    @property
    def bytes_mean(self) -> float:
        """Mean bytes held over the tokens read."""
        return sum(layer.bytes_mean for layer in self.layers)

    @classmethod
    def from_views(
        cls, views: Sequence[LayerView], policy: CachePolicy, *, rows: int = 1, model: PreTrainedModel | None = None
    ) -> SlotCache:
        """Return a cache that goes on from what was read: every row starts as the views' one row, without copying.

        Recorded observations are not carried on; ``policy`` may ask for window attention only, which needs no past.
        """
        cache = cls(len(views), policy, model=model)
        cache.decides_after_forward = False
        if cache.wanted.every_query or cache.wanted.needs_past:
            raise CacheError("a cache made from views cannot go on recording observations")
        for layer, view in zip(cache.layers, views, strict=True):
            layer.restore(view, rows)
        return cache

    def slots_held(self) -> list[Tensor]:
        """Slots that hold a token, per layer: (batch, kv_heads)."""
        return [layer.counts() for layer in self.layers]

    @property
    def model(self) -> PreTrainedModel | None:
        """The model that the cache was made for, while it exists."""
        return None if self._model is None else self._model()

    def __copy__(self) -> SlotCache:
        return self.clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> SlotCache:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise CacheError(
            "a cache cannot be pickled: it belongs to a model and a manager of this process. For another process, or "
            "for later, write it with evomem.plugins.save_cache(cache, path) and read it with load_cache(path, model); "
            "in this process cache.clone() makes a copy"
        )

    def clone(self) -> SlotCache:
        """Return an independent continuation of this cache; tensors are shared until one of the two changes them."""
        other = SlotCache(self.depth, self.policy, rotaries=self.rotaries, centres=self.centres)
        other._model, other.bytes_peak, other._limit = self._model, self.bytes_peak, self._limit
        other.decides_after_forward, other.undecided = self.decides_after_forward, self.undecided
        other.owing, other.refused = self.owing, self.refused
        for mine, copy in zip(self.layers, other.layers, strict=True):
            state = {k: v for k, v in vars(mine).items() if k not in ("cache", "_cache", "recorder", "storage")}
            vars(copy).update(state)
            copy.storage = mine.storage.copy()
            for name in ("wanted", "window", "begin"):
                setattr(copy.recorder, name, getattr(mine.recorder, name))
            # Recorded sums are added to in place, so they are the one thing that must be copied.
            for name in ("slotwise", "rowwise", "flat"):
                setattr(copy.recorder, name, {k: v.clone() for k, v in getattr(mine.recorder, name).items()})
        return other
