"""Memory: the tensors that one layer's slots are made of, and what becomes of them when slots or rows come and go."""

from __future__ import annotations

import torch
from torch import Tensor

from evomem.errors import CacheError
from evomem.memory.observations import Recorder
from evomem.memory.view import LayerView


class SlotStorage:
    """Keys, values, token indices and decays of one layer's slots.

    Methods that move slots or rows take the layer's recorder, whose observations follow.

    Attributes
    ----------
    keys, values : (batch, kv_heads, slots, head_dim), or None before the first token.
    slots : (batch, kv_heads, slots) int64, token index that the slot holds, ascending, -1 = empty; shorter heads are
        right-aligned.
    decays : (batch, kv_heads, slots) fp32 log-decay added to attention logits, or None while nothing fades.
    dense : slots are 0, 1, 2, … up to the newest token in every head of every row.
    aligned : no head has an empty slot.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    decays: Tensor | None

    def __init__(self) -> None:
        self.keys = self.values = self.slots = None  # type: ignore[assignment]
        self.decays = None
        self.dense = self.aligned = True

    @classmethod
    def of_view(cls, view: LayerView, rows: int) -> SlotStorage:
        """Return the slots of a view of one row, repeated ``rows`` times without copying."""
        storage = cls()
        storage.keys, storage.values, storage.slots = (
            t.expand(rows, *t.shape[1:]) for t in (view.keys, view.values, view.slots)
        )
        storage.aligned = bool(view.valid.all())
        storage.dense = storage.aligned and view.slots.shape[-1] == view.seen
        return storage

    @property
    def is_empty(self) -> bool:
        """Whether no token has come yet."""
        return self.keys is None

    def copy(self) -> SlotStorage:
        """Return a storage of the same tensors; none of them is ever written to."""
        other = SlotStorage()
        vars(other).update(vars(self))
        return other

    # ---- slots come and go ----------------------------------------------------------------------------------------

    def append(self, keys: Tensor, values: Tensor, first: int, real: Tensor | None, recorder: Recorder) -> None:
        """Put the slots of new tokens behind the others.

        keys, values : (batch, kv_heads, tokens, head_dim). first : index of the first of the tokens.
        real : (batch, tokens) bool, False for padding, which gets empty slots; None when nothing is padded.
        """
        batch, kv_heads, count, _ = keys.shape
        index = torch.arange(first, first + count, device=keys.device).expand(batch, kv_heads, count)
        if real is not None and not bool(real.all()):
            index = torch.where(real[:, None], index, -1)
            self.dense = self.aligned = False
        if self.is_empty:
            # A model may hand over a part of a larger tensor (fused projections), which would stay alive as a whole.
            self.keys, self.values, self.slots = _unshared(keys), _unshared(values), index.contiguous()
        else:
            self.keys, self.values = torch.cat((self.keys, keys), 2), torch.cat((self.values, values), 2)
            self.slots = torch.cat((self.slots, index), 2)
        if self.decays is not None:
            self.decays = torch.cat((self.decays, self.decays.new_zeros(batch, kv_heads, count)), 2)
        recorder.append(batch, kv_heads, count, keys)

    def keep(self, mask: Tensor, recorder: Recorder) -> None:
        """Evict, physically, every slot where ``mask`` (batch, kv_heads, slots) is False.

        Raises
        ------
        CacheError : the mask has another shape than the slots.
        """
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
        self._gather(index, recorder)
        self.dense, self.aligned = False, bool(filled.all())
        if not self.aligned:
            self.slots = torch.where(filled, self.slots, -1)
            # What an empty slot holds must not reach the logits, not even as 0 × NaN.
            self.keys = self.keys.masked_fill(~filled[..., None], 0)
            self.values = self.values.masked_fill(~filled[..., None], 0)

    def crop(self, length: int, recorder: Recorder) -> None:
        """Evict the slots of all tokens from index ``length`` on."""
        if self.dense:
            self._gather(torch.arange(length, device=self.keys.device).expand(*self.keys.shape[:2], length), recorder)
        else:
            self.keep(self.slots < length, recorder)

    def _gather(self, index: Tensor, recorder: Recorder) -> None:
        wide = index[..., None].expand(*index.shape, self.keys.shape[-1])
        self.keys = self.keys.gather(2, wide)
        self.values = self.values.gather(2, index[..., None].expand(*index.shape, self.values.shape[-1]))
        self.slots = self.slots.gather(2, index)
        if self.decays is not None:
            self.decays = self.decays.gather(2, index)
        recorder.gather(index)

    # ---- rows come and go -----------------------------------------------------------------------------------------

    def select_rows(self, index: Tensor, recorder: Recorder) -> None:
        """Keep the rows ``index`` (new_batch,), in that order."""
        self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)
        self.slots = self.slots.index_select(0, index)
        if self.decays is not None:
            self.decays = self.decays.index_select(0, index)
        recorder.rows(index)

    def expand(self, rows: int, recorder: Recorder) -> None:
        """Let the only row become ``rows`` equal ones; their slots are shared until they are changed."""
        self.keys, self.values, self.slots = (
            t.expand(rows, *t.shape[1:]) for t in (self.keys, self.values, self.slots)
        )
        if self.decays is not None:
            self.decays = self.decays.expand(rows, *self.decays.shape[1:])
        recorder.rows(torch.zeros(rows, dtype=torch.int64))

    # ---- bytes ----------------------------------------------------------------------------------------------------

    def tensors(self) -> list[Tensor]:
        """Every tensor that is held, for counting bytes."""
        held = [self.keys, self.values, self.slots, self.decays]
        return [tensor for tensor in held if tensor is not None]

    def bytes_per_slot(self) -> int:
        """Bytes of one slot of one KV head, without what is recorded of it."""
        return sum(t.shape[3:].numel() * t.element_size() for t in self.tensors())


def _unshared(x: Tensor) -> Tensor:
    """``x``, copied if it is a part of a larger tensor."""
    return x if x.untyped_storage().nbytes() <= x.numel() * x.element_size() else x.clone()
