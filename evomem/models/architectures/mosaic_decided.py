"""Model: the memory of a Memory Mosaic about which a manager decides: pairs are slots, contextual units are layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from evomem.errors import CacheError
from evomem.memory.explicit.beside import LayerWithTensors
from evomem.memory.explicit.cache_layer import TensorLayer
from evomem.memory.explicit.decided import DecidedCache
from evomem.memory.kv.attention import full_precision
from evomem.memory.kv.policy import CachePolicy
from evomem.memory.view import LayerView
from evomem.models.architectures.mosaic_cache import Pairs, Reach, UnitMemory
from evomem.models.architectures.mosaic_memory import precise, read_weights, readable


class DecidedPairs(LayerWithTensors):  # type: ignore[no-untyped-call]
    """The pairs of one contextual unit as slots: what `UnitMemory` keeps, and what a manager observes of it.

    A slot's index is that of the token that its key was made of. The newest token is in no pair yet.

    Attributes
    ----------
    average, next_key, next_value, next_real : as of `UnitMemory`.
    next_read : (batch, heads, dim), what the newest token has read: its pair's surprise is measured by it.
    """

    title: ClassVar[str] = "a mosaic's memory"
    has: frozenset[str] = frozenset({"predictions of what is written", "queries without positions"})
    beside_names: ClassVar[tuple[str, ...]] = ("average", "next_key", "next_value", "next_real", "next_read")
    average: Tensor | None
    next_key: Tensor | None
    next_value: Tensor | None
    next_real: Tensor | None
    next_read: Tensor | None

    def exchange(
        self,
        pairs: Pairs,
        queries: Tensor,
        reach: Reach,
        bandwidth: Callable[[Tensor], Tensor],
        real: Tensor | None,
        dropout: float,
    ) -> Tensor:
        """Store pairs and let tokens read; see `UnitMemory.exchange`. ``dropout`` is for training, and left out."""
        self._begin(len(queries), queries)
        if real is not None:
            self.note_padding(real)
        first = not pairs.keys.shape[2]
        pairs = _placeholder(pairs) if first else pairs
        self.storage.append(pairs.keys, pairs.values, pairs.first, pairs.real, self.recorder)
        with full_precision(queries):
            read = self._read_pairs(queries, reach, bandwidth, real)
        self._note_surprise(pairs.values, read)
        self.next_read = read[:, :, -1]
        if not first:
            self.storage.settle(self.recorder)
        return read

    def _read_pairs(
        self, queries: Tensor, reach: Reach, bandwidth: Callable[[Tensor], Tensor], real: Tensor | None
    ) -> Tensor:
        indices = torch.arange(self.seen, self.seen + queries.shape[2], device=queries.device)
        allowed = readable(self.slots, indices, reach.nearest, reach.farthest)
        weights = read_weights(queries, self.keys, allowed, bandwidth(allowed.sum(-1)), self.decays)
        if real is not None:
            weights = weights * real[:, None, :, None]
        self.note_reads(queries, weights, real)
        return (weights @ precise(self.values)).to(queries.dtype)

    def _note_surprise(self, values: Tensor, read: Tensor) -> None:
        """Note how far what the pairs' tokens had read lies from the values that came."""
        if not any(one.name == "surprise" for one in self.wanted.observations):
            return
        before = read if self.next_read is None else torch.cat((self.next_read[:, :, None], read), 2)
        expected, came = precise(before[:, :, : values.shape[2]]), precise(values)
        error = torch.linalg.vector_norm(came - expected, dim=-1)
        self.recorder.predicted(error / torch.linalg.vector_norm(came, dim=-1).clamp(min=1e-6))

    def view(self) -> LayerView:
        """What a manager sees now: the newest token is in no pair yet, so the last pair is of age 0.

        Before the second token, with which the first pair comes, there is one empty slot.

        Raises
        ------
        CacheError : nothing has been read yet.
        """
        view = super().view()
        known = max(view.seen - 1, 1)
        return replace(view, seen=known, fresh=min(view.fresh, known))

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return all that the memory is between two tokens; see `ExplicitLayer.state`."""
        self.storage.settle(self.recorder)
        return super().state()

    def load_state(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on, to the bit, as the memory that `state` was taken of.

        Raises
        ------
        CacheError : see `LayerWithTensors.load_state`; or the newest token's half of a pair has other sizes than pairs.
        """
        super().load_state(facts, tensors)
        if not self.seen:
            return
        keys, values = self.storage.even["keys"], self.storage.even["values"]
        like_keys, like_values = (tuple(part.shape[:2]) + tuple(part.shape[3:]) for part in (keys, values))
        shapes = {
            "average": like_keys, "next_key": like_keys, "next_value": like_values, "next_read": like_values,
            "next_real": like_keys[:1],
        }  # fmt: skip
        for name, part in self.beside().items():
            if tuple(part.shape) != shapes[name]:
                self.reset()
                raise CacheError(
                    f"state of {self.title}: {name!r} has shape {tuple(part.shape)} beside pairs of keys "
                    f"{tuple(keys.shape)}; save it again"
                )

    def forget_beyond(self, farthest: int) -> None:
        """Let pairs go that no later token reads, because it reads at most ``farthest`` tokens back."""
        self.keep(self.slots >= self.seen - farthest)


def _placeholder(pairs: Pairs) -> Pairs:
    """Return one empty slot in the place of no pairs: managers are used to those, and not to layers without a slot."""
    batch, heads, _, dim = pairs.keys.shape
    nothing = pairs.keys.new_zeros(batch, heads, 1, dim)
    return replace(
        pairs, keys=nothing, values=nothing, real=torch.zeros(batch, 1, dtype=torch.bool, device=nothing.device)
    )


class DecidedMosaicCache(DecidedCache):
    """The pairs of all contextual units, and what the other units keep.

    Parameters
    ----------
    units : contextual units of the model, one layer each.
    others : units that store no pairs.
    policy : the manager.
    """

    layers: list[DecidedPairs]  # type: ignore[assignment]
    beside_title: ClassVar[str] = "other"

    def __init__(self, units: int, others: int, policy: CachePolicy) -> None:
        pairs = [DecidedPairs(index, units, observes=policy.observes) for index in range(units)]
        super().__init__(pairs, {number: UnitMemory() for number in range(others)}, policy)

    def copy_empty(self) -> DecidedMosaicCache:
        """Return an empty cache of the same units."""
        return type(self)(len(self.layers), len(self.beside), self.policy)

    def memories(self, layer: int, count: int, batch: int) -> list[Any]:
        """Return what the units of a model's layer keep: ``count`` contextual ones, then the others."""
        self.expand_beside(batch)
        return [*self.layers[count * layer :][:count], *(self.beside[n] for n in (layer,) if n in self.beside)]

    def tensor_name(self, number: int, name: str) -> str:
        """Return what the average of a unit that stores no pairs is called in a state: it is all that the unit has."""
        return f"{self.beside_title}.{number}" if name == "average" else super().tensor_name(number, name)

    def fill_beside(self, layer: TensorLayer, number: int, tensors: Mapping[str, Tensor], seen: int) -> None:
        """Let a unit that stores no pairs hold what a state has of it.

        Raises
        ------
        CacheError : its average is missing, or has other rows than the pairs.
        """
        if tensors.keys() != ({"average"} if seen else set()) or any(
            len(part) != len(self.layers[0].starts) for part in tensors.values()
        ):
            raise CacheError(
                f"state of a mosaic's memory: {sorted(tensors)} of unit {number} of the {len(self.beside)} units that "
                "store no pairs, which have an average each, of as many rows as the pairs; load it with the model that "
                "it was saved with"
            )
        super().fill_beside(layer, number, tensors, seen)
