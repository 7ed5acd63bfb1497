"""Memory: the tensors that one layer's slots are made of, and what becomes of them when slots or rows come and go."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from evomem.errors import CacheError
from evomem.memory.kv.ragged import RaggedLayout
from evomem.memory.observations import Recorder
from evomem.memory.view import LayerView

EMPTY = {"slots": -1}
"""What stands in an empty slot, by the name of the tensor; 0 elsewhere."""


class SlotStorage:
    """Keys, values, token indices and decays of one layer's slots, in two parts.

    New tokens get a slot in every head, so the slots of the newest tokens are *even*: (batch, kv_heads, slots, …).
    Where a decision leaves heads with differently many slots, these become *flat*: one head's after the other's,
    without padding, so that a head costs what it holds. Later tokens are even again. While all heads hold equally
    many, everything is even.

    Methods that move slots or rows take the layer's recorder, whose observations follow.

    Attributes
    ----------
    even : the newest slots, or all: ``keys`` and ``values`` (batch, kv_heads, slots, head_dim); ``slots`` (batch,
        kv_heads, slots) int64, the token index that a slot holds, ascending, -1 = empty; and, as soon as something
        fades, ``decays`` (batch, kv_heads, slots) fp32, the log-decay added to attention logits. Nothing before the
        first token.
    flat : the older slots by the same names, (slots of all heads, …), where heads hold differently many.
    layout : whose slots those are; None while everything is even.
    dense : the slots are 0, 1, 2, … up to the newest token in every head of every row.
    padded : some of the even slots are empty, for rows with padding. It is so within a pass only, see `settle`.
    """

    def __init__(self) -> None:
        self.even: dict[str, Tensor] = {}
        self.flat: dict[str, Tensor] = {}
        self.layout: RaggedLayout | None = None
        self.dense, self.padded = True, False

    @classmethod
    def of_view(cls, view: LayerView, rows: int) -> SlotStorage:
        """Return the slots of a view of one row, repeated ``rows`` times without copying."""
        storage = cls()
        named = {"keys": view.keys, "values": view.values, "slots": view.slots}
        storage.even = {name: tensor.expand(rows, *tensor.shape[1:]) for name, tensor in named.items()}
        storage.padded = not bool(view.valid.all())
        storage.dense = not storage.padded and view.slots.shape[-1] == view.seen
        return storage

    def copy(self) -> SlotStorage:
        """Return a storage of the same tensors, none of which is ever written to."""
        other = SlotStorage()
        vars(other).update(vars(self) | {"even": dict(self.even), "flat": dict(self.flat)})
        return other

    # ---- what is there --------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int, int]:
        """(batch, kv_heads, slots) of the padded form, which `whole` returns."""
        batch, kv_heads, slots = self.even["slots"].shape
        return batch, kv_heads, slots + (self.layout.longest if self.layout is not None else 0)

    @property
    def aligned(self) -> bool:
        """Whether all heads of all rows hold equally many slots, none of them empty."""
        return self.layout is None and not self.padded

    def whole(self, name: str) -> Tensor:
        """Return all slots of one name in their padded form: (batch, kv_heads, slots, …).

        The slots of shorter heads are right-aligned; before them lie empty ones. Where everything is even, this is the
        tensor itself, and else a copy.
        """
        even = self.even[name]
        if self.layout is None:
            return even
        return torch.cat((self.layout.pad(self.flat[name], EMPTY.get(name, 0)), even), 2)

    def counts(self) -> Tensor:
        """Slots that every head holds: (batch, kv_heads) int64."""
        even = (self.even["slots"] >= 0).sum(-1)
        return even if self.layout is None else even + self.layout.counts

    def tensors(self) -> list[Tensor]:
        """Every tensor that is held, for counting bytes."""
        return [*self.even.values(), *self.flat.values()]

    def bytes_per_slot(self) -> int:
        """Bytes of one slot of one KV head, without what is recorded of it."""
        return sum(t.shape[3:].numel() * t.element_size() for t in self.even.values())

    # ---- slots come and go ----------------------------------------------------------------------------------------

    def append(
        self,
        keys: Tensor,
        values: Tensor,
        first: int,
        real: Tensor | None,
        recorder: Recorder,
        marks: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Put the slots of new tokens behind the others.

        keys, values : (batch, kv_heads, tokens, head_dim). first : index of the first of the tokens.
        real : (batch, tokens) or (batch, kv_heads, tokens) bool, False for what gets an empty slot, such as padding;
            None: nothing.
        marks : further tensors of the slots (batch, kv_heads, tokens, …) by name, the same names at every call.
        """
        batch, kv_heads, count, _ = keys.shape
        index = torch.arange(first, first + count, device=keys.device).expand(batch, kv_heads, count)
        if real is not None and not bool(real.all()):
            index = torch.where(real if real.dim() == 3 else real[:, None], index, -1)
            self.dense, self.padded = False, True
        new = {name: _unshared(mark) for name, mark in (marks or {}).items()}
        if not self.even:
            # A model may hand over a part of a larger tensor (fused projections), which would stay alive as a whole.
            self.even = {"keys": _unshared(keys), "values": _unshared(values), "slots": index.contiguous()} | new
        else:
            new |= {"keys": keys, "values": values, "slots": index}
            if "decays" in self.even:
                new["decays"] = self.even["decays"].new_zeros(batch, kv_heads, count)
            self.even = {name: torch.cat((old, new[name]), 2) for name, old in self.even.items()}
        recorder.append(batch, kv_heads, count, keys)

    def set_decays(self, decays: Tensor) -> None:
        """Let slots fade: decays (batch, kv_heads, slots) fp32, in the padded form."""
        longest = 0 if self.layout is None else self.layout.longest
        if self.layout is not None:
            self.flat["decays"] = self.layout.flatten(decays[:, :, :longest])
        self.even["decays"] = decays[:, :, longest:].clone() if longest else decays

    def stamp(self, slots: Tensor) -> None:
        """Let slots hold other tokens: indices (batch, kv_heads, slots) int64, in the padded form; empty ones stay."""
        longest = 0 if self.layout is None else self.layout.longest
        if self.layout is not None:
            self.flat["slots"] = self.layout.flatten(slots[:, :, :longest])
        self.even["slots"] = torch.where(self.even["slots"] >= 0, slots[:, :, longest:], -1)
        self.dense = False

    def rewrite(self, keys: Tensor, values: Tensor) -> None:
        """Let slots hold other keys and values (batch, kv_heads, slots, head_dim), in the padded form.

        Raises
        ------
        CacheError : other shapes or types than the slots have.
        """
        longest = 0 if self.layout is None else self.layout.longest
        for name, new in (("keys", keys), ("values", values)):
            held = self.even[name]
            if tuple(new.shape) != (*self.shape, held.shape[3]) or new.dtype != held.dtype:
                raise CacheError(
                    f"{name} {tuple(new.shape)} of {new.dtype} for slots of shape {(*self.shape, held.shape[3])} and "
                    f"{held.dtype}"
                )
            if self.layout is not None:
                self.flat[name] = self.layout.flatten(new[:, :, :longest])
            self.even[name] = new[:, :, longest:].clone() if longest else new

    def keep(self, mask: Tensor, recorder: Recorder) -> None:
        """Evict, physically, every slot where ``mask`` (batch, kv_heads, slots), of the padded form, is False.

        Raises
        ------
        CacheError : the mask has another shape than the slots, or is not of booleans.
        """
        if tuple(mask.shape) != self.shape or mask.dtype != torch.bool:
            raise CacheError(
                f"keep-mask of shape {tuple(mask.shape)} and {mask.dtype} for slots of shape {self.shape}; give "
                "torch.bool"
            )
        kept = mask & (self.whole("slots") >= 0)
        lengths = kept.sum(-1).cpu()
        total, before = int(lengths.sum()), self.even["slots"].numel()
        if not self.padded and total == before + (0 if self.layout is None else self.layout.total):
            return
        even_now = bool((lengths == lengths[0, 0]).all())
        take = self._taking(kept)

        def change(flat: Tensor | None, even: Tensor) -> tuple[Tensor | None, Tensor]:
            chosen = take(flat, even)
            if even_now:
                return None, chosen.view(*lengths.shape, int(lengths[0, 0]), *even.shape[3:])
            return chosen, even.new_empty(*lengths.shape, 0, *even.shape[3:])

        self._change(change, recorder)
        self.layout = None if even_now else RaggedLayout(lengths, mask.device)
        self.dense = self.padded = False

    def settle(self, recorder: Recorder) -> None:
        """Let go of empty slots, which padding has got."""
        if self.padded:
            self.keep(torch.ones(self.shape, dtype=torch.bool, device=self.even["slots"].device), recorder)

    def align(self, recorder: Recorder) -> None:
        """Put empty slots before the others in every head, and let go of those that every head has.

        For a moment this costs less than `settle`, which leaves no head an empty slot, and more bytes.
        """
        if self.layout is not None:
            self.settle(recorder)
        if not self.padded:
            return
        filled = self.even["slots"] >= 0
        counts = filled.sum(-1)
        width = int(counts.max())
        order = torch.sort(filled.byte(), dim=-1, stable=True).indices[..., filled.shape[-1] - width :]

        def change(flat: Tensor | None, even: Tensor) -> tuple[Tensor | None, Tensor]:
            index = order.view(*order.shape, *[1] * (even.dim() - 3))
            return None, even.gather(2, index.expand(*order.shape, *even.shape[3:]))

        self._change(change, recorder)
        self.padded = int(counts.sum()) < order.numel()

    def crop(self, length: int, recorder: Recorder) -> None:
        """Evict the slots of all tokens from index ``length`` on."""
        if self.dense:  # and stays so
            self._change(lambda _, even: (None, even[:, :, :length].clone()), recorder)
        else:
            self.keep(self.whole("slots") < length, recorder)

    def _taking(self, kept: Tensor) -> Callable[[Tensor | None, Tensor], Tensor]:
        """Return a function that takes the slots ``kept``, of the padded form, out of a tensor's flat and even part.

        It returns them flat: (slots of all heads, …).
        """
        batch, kv_heads, width = self.shape
        index = kept.flatten().nonzero()[:, 0]
        if self.layout is not None:
            count = width - self.layout.longest
            head, place = index // width, index % width - self.layout.longest
            recent = self.layout.total + head * count + place
            index = torch.where(place >= 0, recent, self.layout.ends.flatten()[head] + place)

        def take(flat: Tensor | None, even: Tensor) -> Tensor:
            if flat is not None:
                return torch.cat((flat, even.flatten(0, 2))).index_select(0, index)
            if batch > 1 and even.stride(0) == 0:  # rows that are shared: see `of_view`
                return even[0].flatten(0, 1).index_select(0, index % (kv_heads * width))
            return even.flatten(0, 2).index_select(0, index)

        return take

    def _change(
        self, change: Callable[[Tensor | None, Tensor], tuple[Tensor | None, Tensor]], recorder: Recorder
    ) -> None:
        """Replace the flat and the even part of every tensor, recorded ones too."""
        flats, evens = self.flat, self.even
        self.flat, self.even = {}, {}
        for name in list(evens):  # one after the other, so that the old ones can go
            flat, self.even[name] = change(flats.pop(name, None), evens.pop(name))
            if flat is not None:
                self.flat[name] = flat
        recorder.change(change)

    # ---- rows come and go -----------------------------------------------------------------------------------------

    def select_rows(self, index: Tensor, recorder: Recorder) -> None:
        """Keep the rows ``index`` (new_batch,), in that order."""
        layout, of_flat = (None, None) if self.layout is None else self.layout.rows(index)

        def change(flat: Tensor | None, even: Tensor) -> tuple[Tensor | None, Tensor]:
            chosen = None if flat is None or of_flat is None else flat.index_select(0, of_flat)
            return chosen, even.index_select(0, index)

        self._change(change, recorder)
        self.layout = layout
        recorder.rows(index)

    def expand(self, rows: int, recorder: Recorder) -> None:
        """Let the only row become ``rows`` equal ones; even slots are shared until they are changed."""
        index = torch.zeros(rows, dtype=torch.int64, device=self.even["slots"].device)
        if self.layout is not None:
            self.select_rows(index, recorder)
            return
        self.even = {name: tensor.expand(rows, *tensor.shape[1:]) for name, tensor in self.even.items()}
        recorder.change(lambda _, even: (None, even.index_select(0, index)))
        recorder.rows(index)


def _unshared(x: Tensor) -> Tensor:
    """``x``, copied if it is a part of a larger tensor."""
    return x if x.untyped_storage().nbytes() <= x.numel() * x.element_size() else x.clone()


def row_numbers(index: Tensor, rows: int) -> list[int]:
    """Return the numbers of the rows that an index names, as a tensor of so many rows takes it.

    index : (new_batch,) whole numbers, negative ones counted from the end; or (rows,) bool.

    Raises
    ------
    CacheError : it names none, or one that is not there. So nothing has been changed yet.
    """
    whole = not index.is_floating_point() and not index.is_complex() and index.dim() == 1
    mask = index.dtype == torch.bool
    named = index.tolist() if whole else []
    if mask and len(named) == rows:
        named = [row for row, chosen in enumerate(named) if chosen]
    elif mask or not all(-rows <= row < rows for row in named):
        named = []
    if not named:
        raise CacheError(
            f"rows {index.tolist()} of a cache of {rows}: give the numbers of the rows that stay, at least one, each "
            f"from 0 to {rows - 1}"
        )
    return [row % rows for row in named]
