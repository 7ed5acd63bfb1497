"""Memory: what one layer of a cache holds, rows and slots and what is observed of them, and how many bytes that is."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from evomem.memory.kv.storage import SlotStorage, row_numbers
from evomem.memory.observations import Recorder


class CountedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """A layer of a cache whose length, for transformers, is what it has read and not what it still holds.

    Attributes
    ----------
    seen : tokens read, evicted ones and padding included.
    """

    seen: int

    def get_seq_length(self) -> int:
        """Tokens read so far, evicted ones and padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys, offset) of the mask that the model prepares: it covers every token ever read."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1


class LayerMemory(CountedLayer):  # type: ignore[no-untyped-call]
    """The slots of a layer, as tensors and as bytes: of a `SlotLayer`, or of an explicit memory.

    Attributes
    ----------
    storage : the slots' tensors; `keys`, `values`, `slots` and `decays` are theirs.
    recorder : what the manager observes, in step with the slots.
    seen : tokens read, padding included.
    start : (batch,) int64, first real token of every row; ``starts``: the same as numbers.
    evicted : (batch, layers) int64, see `evomem.memory.view.LayerView.evicted`; None while nobody counts.
    turned : (batch,) int64, tokens read at every row's last decision, where rows had different turns; else None.
    bytes_peak : most bytes held so far.
    """

    storage: SlotStorage
    recorder: Recorder
    seen: int
    start: Tensor
    starts: tuple[int, ...]
    evicted: Tensor | None
    turned: Tensor | None
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

    # ---- rows -----------------------------------------------------------------------------------------------------

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder rows for beam search."""
        self.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        if self.seen:
            self.select_rows(torch.arange(len(self.start), device=self.start.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows named, in that order."""
        self.select_rows(indices)

    def select_rows(self, index: Tensor) -> None:
        """Rows ``index`` (new_batch,) of everything held; see `row_numbers`."""
        if not self.seen:
            return
        numbers = row_numbers(index, len(self.starts))
        index = torch.tensor(numbers, device=self.start.device)
        self.storage.select_rows(index, self.recorder)
        self.start = self.start.index_select(0, index)
        self.starts = tuple(self.starts[number] for number in numbers)
        if self.evicted is not None:
            self.evicted = self.evicted.index_select(0, index)
        if self.turned is not None:
            self.turned = self.turned.index_select(0, index)

    def expand(self, rows: int) -> None:
        """Let the only row become ``rows`` equal ones; keys and values are shared until they are changed."""
        self.storage.expand(rows, self.recorder)
        self.start, self.starts = self.start.expand(rows), self.starts * rows
        self.turned = None if self.turned is None else self.turned.expand(rows)
        self.evicted = None if self.evicted is None else self.evicted.expand(rows, -1)

    # ---- bytes ----------------------------------------------------------------------------------------------------

    def counts(self) -> Tensor:
        """Slots that every head holds: (batch, kv_heads) int64."""
        return self.storage.counts()

    @property
    def fades(self) -> bool:
        """Whether slots have a log-decay, which costs bytes."""
        return "decays" in self.storage.even

    def nbytes(self) -> int:
        """Bytes of every tensor held now: keys, values, slot indices, decays, recorded observations."""
        if not self.seen:
            return 0
        tensors = [*self.storage.tensors(), *self.recorder.tensors()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

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
        size = self.nbytes()
        self.bytes_peak = max(self.bytes_peak, size)
        self._byte_tokens += (before + size) / 2 * tokens
        return size

    @property
    def bytes_mean(self) -> float:
        """Mean of the bytes held, over the tokens read (cropped ones too: they were held)."""
        return self._byte_tokens / self._read if self._read else 0.0
