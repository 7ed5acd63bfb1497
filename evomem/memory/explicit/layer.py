"""Memory: an explicit memory as one layer of a cache: what every one has, however it is read and written.

Slots have keys, values, the token that they were written at, observations and a log-decay, as those of a KV cache have.
So managers, search spaces, allocations and everything behind them decide about it unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from evomem.errors import CacheError
from evomem.memory.explicit.cache_layer import MemoryCacheLayer
from evomem.memory.kv.attention import full_precision
from evomem.memory.kv.layer_memory import LayerMemory
from evomem.memory.kv.policy import CachePolicy
from evomem.memory.kv.storage import SlotStorage
from evomem.memory.observations import Recorder, Wanted
from evomem.memory.view import Decision, LayerView, refuse_gates


class ExplicitLayer(MemoryCacheLayer, LayerMemory):  # type: ignore[no-untyped-call]
    """An explicit memory: the protocol, and all of it that does not depend on how the memory is read and written.

    A subclass writes into ``storage`` (`SlotStorage.append`), tells ``recorder`` of every read (`Recorder.attended`,
    `queried`), counts tokens in ``seen``, and names what else is its state in `own_state`.

    Parameters
    ----------
    index, layers : which layer this is, of how many.
    observes : observations to record, `CachePolicy.observes` of whoever decides.
    scale : β, by which products of queries and keys are multiplied before a softmax.

    Class attributes
    ----------------
    has : what it has of `Observation.needs`; an instance may have more.
    slot_marks : tensors that a slot has besides key, value, token and log-decay (`SlotStorage.append`).

    Raises
    ------
    ConfigError : an observation means nothing here (a rotary one, say).
    """

    has: frozenset[str] = frozenset()
    slot_marks: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self, index: int = 0, layers: int = 1, *, observes: frozenset[str] = frozenset(), scale: float = 1.0
    ) -> None:
        # The base class would set keys and values, which are the storage's.
        self.index, self.layers, self.scale = index, layers, float(scale)
        self.wanted = Wanted.parse(observes)
        self.wanted.require(self.title, self.has)
        self.reset()

    def reset(self) -> None:
        """Forget everything; the memory is as new."""
        self.storage = SlotStorage()
        self.recorder = Recorder(self.wanted)
        self.start = None  # type: ignore[assignment]
        self.starts = ()
        self.evicted = self.turned = None
        self.seen = self.decided = 0
        self.is_initialized = False
        self.bytes_peak, self._byte_tokens, self._read = 0, 0.0, 0

    @property
    def observes(self) -> frozenset[str]:
        """Names of the observations that are recorded."""
        return frozenset(one.spec for one in self.wanted.observations)

    # ---- what managers decide about -------------------------------------------------------------------------------

    def view(self) -> LayerView:
        """What a manager sees now.

        Raises
        ------
        CacheError : nothing has been read yet.
        """
        if not self.seen:
            raise CacheError(f"nothing has been read yet: there is no view of {self.title} that is empty")
        recorded = self.recorder.whole(self.storage.layout).recorded(
            self.keys, self.slots, self.start, self.seen,
            scale=self.scale, decays=self.decays, window=None, softcap=None, rotary=None,
        )  # fmt: skip
        return LayerView(
            self.keys, self.values, self.slots, self.start, self.seen, self.seen - self.decided,
            self.index, self.layers, recorded, evicted=self.evicted, decays=self.decays,
        )  # fmt: skip

    def decide(self, policy: CachePolicy) -> None:
        """Let a manager decide about this memory now."""
        view = self.view()
        with full_precision(view.keys):
            self.apply(policy.decide(view))

    def apply(self, decision: Decision) -> None:
        """Carry out a decision about the slots held now.

        Raises
        ------
        CacheError : it writes into slots: what those of an explicit memory hold, its model writes; or it moves gates.
        """
        self.refuse_writing(decision)
        refuse_gates(decision, self.title)
        if decision.decay is not None:
            self.decay(decision.decay)
        if decision.evicted is not None:
            self.evicted = decision.evicted
        self.keep(decision.keep)
        self.decided = self.seen

    def refuse_writing(self, decision: Decision) -> None:
        """Raise `CacheError` where a decision says what slots hold."""
        if decision.keys is not None:
            raise CacheError(
                f"the manager writes what it evicts into slots of {self.title}, which only its model writes; use it on "
                "a KV cache, and here the manager inside it"
            )

    def keep(self, mask: Tensor) -> None:
        """Evict, physically, every slot where ``mask`` (batch, kv_heads, slots) is False.

        Raises
        ------
        CacheError : the mask has another shape than the slots.
        """
        self.storage.keep(mask, self.recorder)

    def decay(self, log_decay: Tensor) -> None:
        """Let slots fade: log-decay (batch, kv_heads, slots) <= 0 that is added to the logits of every later read.

        Raises
        ------
        CacheError : it has another shape than the slots, is above 0, or no number.
        """
        if tuple(log_decay.shape) != self.storage.shape or not bool((log_decay <= 0).all()):
            raise CacheError(
                f"log-decay of shape {tuple(log_decay.shape)} for slots of shape {self.storage.shape}: give one for "
                "every slot, at most 0, and none that is no number"
            )
        self.storage.set_decays(log_decay.float())

    def note_reads(self, queries: Tensor, weights: Tensor | None, real: Tensor | None = None) -> None:
        """Let the recorder see what tokens have read, before empty slots go.

        queries : (batch, heads, tokens, key_dim).
        weights : (batch, heads, tokens, slots), what each slot was read with; None: nobody observes that.
        real : (batch, tokens) bool, False for padding; None: there is none.
        """
        if weights is not None and self.wanted.every_query:
            whole = self.recorder.whole(self.storage.layout)
            whole.attended(weights.float(), self.seen, self.starts)
            self.recorder.take_over(whole, self.storage.layout)
        if self.wanted.observations:
            self.recorder.queried(queries, None, real, None, self.start)

    # ---- state ----------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return all that the memory is between two tokens: plain values, and tensors by name (not copies)."""
        recorder, storage = self.recorder, self.storage
        facts = {name: getattr(self, name) for name in ("seen", "decided", "bytes_peak", "_byte_tokens", "_read")}
        facts |= {
            "dense": storage.dense,
            "padded": storage.padded,
            "begin": recorder.begin,
            "observes": sorted(self.observes),
        }
        tensors = {name: getattr(self, name) for name in ("start", "evicted") if getattr(self, name) is not None}
        groups = {
            "even.": storage.even, "flat.": storage.flat, "flat_recorded.": recorder.flat,
            "slotwise.": recorder.slotwise, "rowwise.": recorder.rowwise,
        }  # fmt: skip
        for group, parts in groups.items():
            tensors |= {f"{group}{name}": tensor for name, tensor in parts.items()}
        if storage.layout is not None:
            tensors["lengths"] = storage.layout.lengths
        return facts, tensors

    def load_state(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on, to the bit, as the memory that `state` was taken of; tensors go to wherever they are wanted first.

        Raises
        ------
        CacheError : the state is of a memory that records something else, or tensors do not fit together.
        """
        from evomem.memory.explicit.state import fill

        fill(self, facts, tensors)

    def clone(self) -> Self:
        """Return an independent continuation of this memory; tensors are shared until one of the two changes them."""
        other = self.copy_empty()
        vars(other).update({name: value for name, value in vars(self).items() if name not in ("recorder", "storage")})
        other.storage = self.storage.copy()
        other.recorder = Recorder(
            self.recorder.wanted, window=self.recorder.window, begin=self.recorder.begin,
            # Recorded sums are added to in place, so they are the one thing that must be copied.
            **{name: {k: v.clone() for k, v in getattr(self.recorder, name).items()}
               for name in ("slotwise", "rowwise", "flat")},
        )  # fmt: skip
        return other

    def copy_empty(self) -> Self:
        """Return an empty memory of the same kind; a subclass with arguments of its own overrides it."""
        return type(self)(self.index, self.layers, observes=self.observes, scale=self.scale)

    def _begin(self, batch: int, like: Tensor) -> None:
        """Note the rows of what is read; raises `CacheError` for another number of rows than before."""
        if not self.seen and self.start is None:
            self.start = torch.zeros(batch, dtype=torch.int64, device=like.device)
            self.starts = (0,) * batch
            self.is_initialized = True
        if len(self.starts) != batch:
            raise CacheError(
                f"{batch} rows are read by {self.title} of {len(self.starts)}; repeat its rows first "
                "(batch_repeat_interleave), or reset() it"
            )
