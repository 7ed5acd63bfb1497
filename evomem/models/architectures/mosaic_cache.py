"""Model: the memory of a Memory Mosaic as a cache: what every unit keeps from one forward pass to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from evomem.errors import CacheError
from evomem.models.architectures.mosaic_memory import read_pairs, readable

UNITS = 2
"""Units of a layer that keep something of the text: v1's contextual and persistent one, v2's short and long memory."""
CONTEXTUAL = {"v1": 1, "v2": 2}
"""Those of them that store pairs, the first ones."""

TENSORS = ("average", "keys", "values", "slots", "next_key", "next_value", "next_real")
"""Attributes of a `UnitMemory` that are its state, besides ``seen``; the batch is axis 0 of each."""


@dataclass(frozen=True)
class Reach:
    """How far back tokens read: pairs of tokens at least and at most so many tokens before; None: all."""

    nearest: int = 1
    farthest: int | None = None


@dataclass(frozen=True)
class Pairs:
    """Pairs that are complete since the next token is known.

    Attributes
    ----------
    keys, values : (batch, heads, pairs, dim).
    first : index of the token that the first pair's key was made of; the others follow.
    real : (batch, pairs) bool, False for pairs of padding; None: there is none.
    """

    keys: Tensor
    values: Tensor
    first: int
    real: Tensor | None


class UnitMemory(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """What one unit of one layer keeps, for every row and head.

    A unit that stores no pairs (a persistent one) keeps ``average`` only.

    Attributes
    ----------
    seen : tokens read so far, padding included.
    average : (batch, heads, dim), the leaky average of keys.
    keys, values : (batch, heads, pairs, dim); keys have length 1.
    slots : (batch, 1, pairs) int64, index of the token that a pair's key was made of, ascending; -1: padding.
    next_key, next_value : (batch, heads, dim), key and projected value of the newest token. They become a pair when
        the token after it is read, of which the pair's value knows.
    next_real : (batch,) bool: the newest token is no padding.
    """

    average: Tensor | None
    slots: Tensor | None
    next_key: Tensor | None
    next_value: Tensor | None
    next_real: Tensor | None

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._forget()

    def _forget(self) -> None:
        self.seen = 0
        for name in TENSORS:
            setattr(self, name, None)
        self.is_initialized = False

    def reset(self) -> None:
        """Forget everything."""
        self._forget()

    def exchange(
        self,
        pairs: Pairs,
        queries: Tensor,
        reach: Reach,
        bandwidth: Callable[[Tensor], Tensor],
        real: Tensor | None,
        dropout: float,
    ) -> Tensor:
        """Store pairs, and let tokens read: (batch, heads, tokens, dim); zeros where there is nothing to read.

        Parameters
        ----------
        pairs : those that the tokens have made complete; none of the first token.
        queries : (batch, heads, tokens, dim), of the tokens after those that were read.
        reach : what the tokens may read.
        bandwidth : gives β of the number of pairs that each may read, (batch, heads or 1, tokens).
        real : (batch, tokens) bool, or None: no token is padding. What padding reads does not matter.
        dropout : share of the pairs that each token overlooks.
        """
        keys, values, slots = self._stored(pairs)
        if not slots.shape[2]:
            return torch.zeros_like(queries)
        indices = torch.arange(self.seen, self.seen + queries.shape[2], device=queries.device)
        allowed = readable(slots, indices, reach.nearest, reach.farthest)
        return read_pairs(queries, keys, values, allowed, bandwidth(allowed.sum(-1)), dropout)

    def _stored(self, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        """Append pairs, and return keys, values and slots of all."""
        slots = torch.arange(pairs.first, pairs.first + pairs.keys.shape[2], device=pairs.keys.device)[None]
        slots = (slots.expand(len(pairs.keys), -1) if pairs.real is None else slots.where(pairs.real, -1))[:, None]
        keys, values = pairs.keys, pairs.values
        if self.keys is not None and self.values is not None and self.slots is not None:
            keys, values = torch.cat((self.keys, keys), 2), torch.cat((self.values, values), 2)
            slots = torch.cat((self.slots, slots), 2)
        self.keys, self.values, self.slots = keys, values, slots
        self.is_initialized = True
        return keys, values, slots

    def finish(self, tokens: int) -> None:
        """Note that so many tokens have been read."""
        self.seen += tokens

    def forget_beyond(self, farthest: int) -> None:
        """Let pairs go that no later token reads, because it reads at most ``farthest`` tokens back."""
        if self.keys is None or self.values is None or self.slots is None:
            return
        # The newest token becomes a pair when the next one is read, which reads it at a distance of 1.
        surplus = self.keys.shape[2] - (farthest - 1)
        if surplus > 0:
            self.keys, self.values = self.keys[:, :, surplus:], self.values[:, :, surplus:]
            self.slots = self.slots[:, :, surplus:]

    # ---- what transformers asks of a cache's layer ----------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: a unit's tensors come with its first tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse; raises `CacheError`."""
        raise CacheError(
            "a mosaic's memory was given keys and values by another model; give every model a cache of its own"
        )

    def get_seq_length(self) -> int:
        """Tokens read so far, padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over all tokens read."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to take tokens back; raises `CacheError`."""
        if tokens_to_remove:
            raise CacheError(
                "a mosaic cannot take tokens back: its keys are running averages, of which single tokens cannot be "
                "taken out; before tokens that may be taken back, copy the cache (copy.deepcopy), and go on with that"
            )

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change every tensor; the batch is axis 0 of each."""
        for name in TENSORS:
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, change(tensor))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i go on as row ``beam_idx[i]``."""
        self.map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, (rows,) int64 or bool."""
        self.map(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        parts = (getattr(self, name) for name in TENSORS)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


class MosaicCache(Cache):
    """All units' memories, what a mosaic sees as its `past_key_values`.

    Parameters
    ----------
    units : units of the model, `MemoryMosaic.units`; one layer of the cache each.

    Attributes
    ----------
    interrupted : a forward pass over the cache has begun and not ended.
    """

    layers: list[UnitMemory]  # type: ignore[assignment]
    max_cache_len = -1

    def __init__(self, units: int) -> None:
        super().__init__(layers=[UnitMemory() for _ in range(units)])
        self.interrupted = False

    def reset(self) -> None:
        """Forget everything."""
        for layer in self.layers:
            layer.reset()
        self.interrupted = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, padding included."""
        return self.layers[layer_idx].seen

    def memories(self, layer: int, count: int, batch: int) -> list[UnitMemory]:
        """Return what the units of a model's layer keep, `UNITS` of them."""
        return self.layers[UNITS * layer :][:UNITS]

    def nbytes(self) -> int:
        """Bytes of the tensors held, over all units and rows."""
        return sum(layer.nbytes() for layer in self.layers)

    def require_whole(self) -> None:
        """Raise `CacheError` when an error or interruption cut a forward pass short, so that units disagree."""
        if self.interrupted or len({layer.seen for layer in self.layers}) > 1:
            raise CacheError(
                "a forward pass over this cache was cut short, so some units read tokens that others did not; reset() "
                "it and read the text again"
            )

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that is held, by ``UNIT.NAME``; not copies. ``seen`` is a tensor () int64."""
        self.require_whole()
        named = {"seen": torch.tensor(self.get_seq_length())}
        for index, layer in enumerate(self.layers):
            parts = {name: getattr(layer, name) for name in TENSORS}
            named |= {f"{index}.{name}": part for name, part in parts.items() if part is not None}
        return named

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], units: int) -> Self:
        """Return the cache that `tensors` describe; it goes on to the bit as the one that they were taken of.

        Raises
        ------
        CacheError : names or shapes that no cache of so many units has.
        """
        cache, rest = cls(units), dict(tensors)
        count = rest.pop("seen", None)
        if count is None or count.shape or count.dtype != torch.int64 or count < 0:
            raise CacheError("saved memory of a mosaic: 'seen' is no count of tokens; it is damaged or something else")
        for index, layer in enumerate(cache.layers):
            parts = {name: rest.pop(f"{index}.{name}") for name in TENSORS if f"{index}.{name}" in rest}
            _check(index, parts, int(count))
            for name, part in parts.items():
                setattr(layer, name, part)
            layer.seen, layer.is_initialized = int(count), "keys" in parts
        if rest:
            raise CacheError(
                f"saved memory of a mosaic: {min(rest)!r} belongs to no unit of this model, which has {units}; load it "
                "with the model that it was saved with"
            )
        if len({tuple(layer.average.shape[:1]) for layer in cache.layers if layer.average is not None}) > 1:
            raise CacheError("saved memory of a mosaic: its units have differently many rows; it is damaged")
        return cache


def _check(index: int, parts: Mapping[str, Tensor], seen: int) -> None:
    """Raise `CacheError` unless a unit's tensors fit each other and the number of tokens read."""
    where = f"saved memory of a mosaic, unit {index}"
    if not seen and not parts:
        return
    average = parts.get("average")
    if average is None or average.dim() != 3:
        raise CacheError(f"{where}: 'average' is missing or has not the axes (batch, heads, dim); the file is damaged")
    batch, heads, _ = average.shape
    if len(parts) == 1:
        return  # stores no pairs
    if missing := {"next_key", "next_value", "next_real"} - parts.keys():
        raise CacheError(f"{where}: {min(missing)!r} is missing; the file is damaged")
    pairs = parts["slots"].shape[-1] if "slots" in parts else 0
    shapes = {
        "keys": (batch, heads, pairs), "values": (batch, heads, pairs), "next_key": (batch, heads),
        "next_value": (batch, heads), "next_real": (batch,),
    }  # fmt: skip
    for name, shape in shapes.items():
        if name in parts and tuple(parts[name].shape[: len(shape)]) != shape:
            raise CacheError(f"{where}: {name!r} has shape {tuple(parts[name].shape)}, its first axes are {shape}")
    if len({"keys", "values", "slots"} & parts.keys()) not in (0, 3):
        raise CacheError(f"{where}: keys, values and slots are saved together or not at all; the file is damaged")
    if "slots" in parts:
        slots = parts["slots"]
        if slots.dtype != torch.int64 or slots.shape[:2] != (batch, 1):
            raise CacheError(f"{where}: 'slots' is {slots.dtype} of shape {tuple(slots.shape)}; the file is damaged")
        if pairs and (int(slots.min()) < -1 or int(slots.max()) >= seen):
            raise CacheError(f"{where}: pairs of tokens that were not read; the file is damaged")
