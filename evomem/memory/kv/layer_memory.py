"""Memory: what one layer of a cache holds, its slots and what is observed of them, and how many bytes that is."""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from evomem.memory.kv.storage import SlotStorage
from evomem.memory.observations import Recorder


class LayerMemory(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The slots of a `SlotLayer`, as tensors and as bytes.

    Attributes
    ----------
    storage : the slots' tensors; `keys`, `values`, `slots` and `decays` are theirs.
    recorder : what the manager observes, in step with the slots.
    seen : tokens read, padding included.
    bytes_peak : most bytes held so far.
    """

    storage: SlotStorage
    recorder: Recorder
    seen: int
    bytes_peak: int
    _byte_tokens: float
    _read: int

    # ---- the slots' tensors, which transformers looks for here -----------------------------------------------------

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        """Keys, (batch, kv_heads, slots, head_dim), or None before the first token."""
        return self.storage.whole("keys") if self.storage.even else None  # type: ignore[return-value]

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """Values, as `keys`."""
        return self.storage.whole("values") if self.storage.even else None  # type: ignore[return-value]

    @property
    def slots(self) -> Tensor:
        """Token index that every slot holds, (batch, kv_heads, slots) int64, ascending; -1 = empty."""
        return self.storage.whole("slots")

    @property
    def decays(self) -> Tensor | None:
        """Log-decay of every slot, (batch, kv_heads, slots) fp32, or None while nothing fades."""
        return self.storage.whole("decays") if "decays" in self.storage.even else None

    @property
    def dense(self) -> bool:
        """Whether nothing has left: slots are 0..seen-1 in every head of every row."""
        return self.storage.dense

    @property
    def aligned(self) -> bool:
        """Whether no head has an empty slot."""
        return self.storage.aligned

    # ---- bytes ----------------------------------------------------------------------------------------------------

    def nbytes(self) -> int:
        """Bytes of every tensor held now: keys, values, slot indices, decays, recorded observations."""
        if not self.seen:
            return 0
        held = [*self.storage.tensors(), *self.recorder.tensors()]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def bytes_per_token(self) -> int:
        """Bytes that one more token costs in every row, over all KV heads."""
        if not self.seen:
            return 0
        recorded = sum(t.shape[3:].numel() * t.element_size() for t in self.recorder.slotwise.values())
        return self.storage.shape[1] * (self.storage.bytes_per_slot() + recorded)

    def bytes_by_row(self) -> Tensor:
        """Bytes that every row holds, as it would in a cache of its own: (batch,) int64.

        But what is observed of a row's newest queries, and of none of its slots, is as long for all rows: a row that
        has read fewer tokens than a window has is charged for its padding there.
        """
        rest = sum(t.shape[1:].numel() * t.element_size() for t in self.recorder.rowwise.values())
        return self.bytes_by_head().sum(-1) + rest

    def bytes_by_head(self) -> Tensor:
        """Bytes of the slots of every KV head: (batch, kv_heads) int64.

        Observations that belong to a row, and to none of its slots, are in `bytes_by_row` only.
        """
        return self.storage.counts() * (self.bytes_per_token() // self.storage.shape[1])

    def note_bytes(self, before: int, tokens: int) -> int:
        """Note that ``tokens`` arrived since ``before`` bytes were held; pieces do not matter. Returns what is held."""
        held = self.nbytes()
        self.bytes_peak = max(self.bytes_peak, held)
        self._byte_tokens += (before + held) / 2 * tokens
        return held

    @property
    def bytes_mean(self) -> float:
        """Mean of the bytes held, over the tokens read (cropped ones too: they were held)."""
        return self._byte_tokens / self._read if self._read else 0.0
