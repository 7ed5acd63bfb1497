"""Model: the memory of a Memory Mosaic about which a manager decides: pairs are slots, contextual units are layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from evomem.errors import CacheError
from evomem.memory.explicit import ExplicitCache
from evomem.memory.explicit.beside import LayerWithTensors
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
    has: ClassVar[frozenset[str]] = frozenset({"predictions of what is written"})
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
        if self.wanted.observations:
            self.recorder.queried(queries, None, None, None, self.start)
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
        if self.wanted.every_query:
            whole = self.recorder.whole(self.storage.layout)
            whole.attended(weights.float(), self.seen, self.starts)
            self.recorder.take_over(whole, self.storage.layout)
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


class DecidedMosaicCache(ExplicitCache):
    """The pairs of all contextual units, and what the other units keep.

    Parameters
    ----------
    units : contextual units of the model, one layer each.
    others : units that store no pairs.
    policy : the manager.
    """

    layers: list[DecidedPairs]  # type: ignore[assignment]

    def __init__(self, units: int, others: int, policy: CachePolicy) -> None:
        super().__init__([DecidedPairs(index, units, observes=policy.observes) for index in range(units)], policy)
        self.others = [UnitMemory() for _ in range(others)]
        self.interrupted = False

    @property
    def parts(self) -> list[DecidedPairs | UnitMemory]:
        """Everything that has rows of the batch."""
        return [*self.layers, *self.others]

    def memories(self, layer: int, count: int, batch: int) -> list[Any]:
        """Return what the units of a model's layer keep: ``count`` contextual ones, then the others."""
        for other in self.others:
            if other.average is not None and len(other.average) == 1 < batch:
                other.map(lambda part: part.expand(batch, *part.shape[1:]))
        return [*self.layers[count * layer :][:count], *self.others[layer : layer + 1]]

    def require_whole(self) -> None:
        """Raise `CacheError` when an error or interruption cut a forward pass short, so that units disagree."""
        if self.interrupted or len({layer.seen for layer in self.parts}) > 1:
            raise CacheError(
                "a forward pass over this cache was cut short, so some units read tokens that others did not; reset() "
                "it and read the text again"
            )

    def require_finished(self) -> None:
        """Raise `CacheError` when the last pass was cut short; asked where a block of ``manager.attach`` ends."""
        self.require_whole()

    # ---- what there is besides the layers that are decided about --------------------------------------------------

    def reset(self) -> None:
        """Forget everything; the cache is as new."""
        super().reset()
        for other in self.others:
            other.reset()
        self.interrupted = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i go on as row ``beam_idx[i]``."""
        for part in self.parts:
            part.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        for part in self.parts:
            part.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        for part in self.parts:
            part.batch_repeat_interleave(repeats)

    def nbytes(self) -> int:
        """Bytes of the tensors held, over all units and rows."""
        return super().nbytes() + sum(other.nbytes() for other in self.others)

    def bytes_by_row(self) -> Tensor:
        """Bytes that every row would hold in a cache of its own: (batch,) int64."""
        averages = [other.average for other in self.others if other.average is not None]
        return super().bytes_by_row() + sum(part.shape[1:].numel() * part.element_size() for part in averages)

    def clone(self) -> DecidedMosaicCache:
        """Return an independent continuation of this cache."""
        other = type(self)(len(self.layers), len(self.others), self.policy)
        other.layers = [layer.clone() for layer in self.layers]
        for mine, copy in zip(self.others, other.others, strict=True):
            vars(copy).update(vars(mine))
        other.interrupted = self.interrupted
        return other

    def state(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """Return all that the cache is between two tokens; see `ExplicitCache.state`. Others are ``other.N``."""
        self.require_whole()
        facts, tensors = super().state()
        averages = {f"other.{number}": other.average for number, other in enumerate(self.others)}
        return facts, tensors | {name: part for name, part in averages.items() if part is not None}

    def load_state(self, facts: Sequence[dict[str, Any]], tensors: dict[str, Tensor]) -> None:
        """Go on, to the bit, as the cache that `state` was taken of.

        Raises
        ------
        CacheError : the state is of another number of units, or no state of such memories.
        """
        averages = {name: part for name, part in tensors.items() if name.startswith("other.")}
        super().load_state(facts, {name: part for name, part in tensors.items() if name not in averages})
        seen = self.get_seq_length()
        expected = {f"other.{number}" for number in range(len(self.others))} if seen else set()
        if averages.keys() != expected or any(len(part) != len(self.layers[0].starts) for part in averages.values()):
            raise CacheError(
                f"state of a mosaic's memory: averages {sorted(averages)} for {len(self.others)} units that store no "
                "pairs; load it with the model that it was saved with"
            )
        for number, other in enumerate(self.others):
            other.reset()
            other.average, other.seen = averages.get(f"other.{number}"), seen
