"""Model: the memory of a Memory Mosaic as a cache: what every unit keeps from one forward pass to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from evomem.errors import CacheError
from evomem.memory.explicit.cache_layer import require_numbers
from evomem.memory.explicit.padded import PaddedCache, PaddedLayer
from evomem.models.architectures.mosaic_memory import read_pairs, readable

UNITS = 2
"""Units of a layer that keep something of the text: v1's contextual and persistent one, v2's short and long memory."""
CONTEXTUAL = {"v1": 1, "v2": 2}
"""Those of them that store pairs, the first ones."""

TENSORS = ("average", "keys", "values", "slots", "next_key", "next_value", "next_real", "start")
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


class UnitMemory(PaddedLayer):  # type: ignore[no-untyped-call]
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
    start : see `PaddedLayer`; None beside units that a manager decides about, which know it.
    """

    title: ClassVar[str] = "a mosaic's memory"
    not_undone: ClassVar[str] = "its keys are running averages, of which single tokens cannot be taken out"
    tensor_names: ClassVar[tuple[str, ...]] = TENSORS
    average: Tensor | None
    slots: Tensor | None
    next_key: Tensor | None
    next_value: Tensor | None
    next_real: Tensor | None

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
        return keys, values, slots

    def forget_beyond(self, farthest: int) -> None:
        """Let pairs go that no later token reads, because it reads at most ``farthest`` tokens back."""
        if self.keys is None or self.values is None or self.slots is None:
            return
        # The newest token becomes a pair when the next one is read, which reads it at a distance of 1.
        surplus = self.keys.shape[2] - (farthest - 1)
        if surplus > 0:
            self.keys, self.values = self.keys[:, :, surplus:], self.values[:, :, surplus:]
            self.slots = self.slots[:, :, surplus:]

    def check(self, where: str, tensors: Mapping[str, Tensor], seen: int) -> None:
        """Raise `CacheError` unless tensors fit each other and the number of tokens read."""
        if not seen and not tensors:
            return
        average = tensors.get("average")
        if average is None or average.dim() != 3:
            raise CacheError(
                f"{where}: 'average' is missing or has not the axes (batch, heads, dim); the file is damaged"
            )
        batch, heads, _ = average.shape
        require_numbers(where, tensors, {"slots": torch.int64, "next_real": torch.bool, "start": torch.int64})
        if tensors.keys() <= {"average", "start"}:
            return  # stores no pairs
        if missing := {"next_key", "next_value", "next_real"} - tensors.keys():
            raise CacheError(f"{where}: {min(missing)!r} is missing; the file is damaged")
        pairs = tensors["slots"].shape[-1] if "slots" in tensors else 0
        shapes = {
            "keys": (batch, heads, pairs), "values": (batch, heads, pairs), "next_key": (batch, heads),
            "next_value": (batch, heads), "next_real": (batch,),
        }  # fmt: skip
        for name, shape in shapes.items():
            if name in tensors and tuple(tensors[name].shape[: len(shape)]) != shape:
                raise CacheError(
                    f"{where}: {name!r} has shape {tuple(tensors[name].shape)}, its first axes are {shape}"
                )
        if len({"keys", "values", "slots"} & tensors.keys()) not in (0, 3):
            raise CacheError(f"{where}: keys, values and slots are saved together or not at all; the file is damaged")
        if "slots" in tensors:
            slots = tensors["slots"]
            if slots.shape[:2] != (batch, 1):
                raise CacheError(f"{where}: 'slots' has shape {tuple(slots.shape)}; the file is damaged")
            if pairs and (int(slots.min()) < -1 or int(slots.max()) >= seen):
                raise CacheError(f"{where}: pairs of tokens that were not read; the file is damaged")


class MosaicCache(PaddedCache):
    """All units' memories, what a mosaic sees as its `past_key_values`.

    Parameters
    ----------
    units : units of the model, `MemoryMosaic.units`; one layer of the cache each.
    """

    layers: list[UnitMemory]
    saved_title: ClassVar[str] = "saved memory of a mosaic"
    layer_title: ClassVar[str] = "unit"

    def __init__(self, units: int) -> None:
        super().__init__([UnitMemory() for _ in range(units)])

    def memories(self, layer: int, count: int, batch: int) -> list[UnitMemory]:
        """Return what the units of a model's layer keep, `UNITS` of them."""
        return self.layers[UNITS * layer :][:UNITS]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], units: int) -> Self:
        """Return the cache that `tensors` describe; see `TensorCache.fill`."""
        return cls(units).fill(tensors)
