"""Memory: the rows of a memory matrix where a manager decides: which are stored, which leave, which fade.

A token's write is a row of its own, what the model's rule would make of an empty slot. The manager takes the place of
the softmax over slots: with a budget of N slots and a decision after every token it keeps N of N + 1 rows, so it says
whether the new one is stored, and which other one it replaces. Rows are read by content as the model reads its matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from evomem.errors import CacheError
from evomem.memory.explicit.beside import LayerWithTensors
from evomem.memory.explicit.decided import DecidedCache
from evomem.memory.explicit.matrix import WINDOW, Exchange, MatrixLayer
from evomem.memory.explicit.matrix_rules import Write, written
from evomem.memory.kv.policy import CachePolicy
from evomem.memory.observations.effective_writes import STRENGTHS
from evomem.memory.observations.windows import SOFTMAX_READS


def row_of(write: Write, rule: str) -> Tensor:
    """Return what a write makes of an empty slot that it goes to whole: (batch, heads, tokens, width).

    λ is 1: rows fade as the manager says. With `ema` that would write nothing, and the value itself is taken.
    """
    share = torch.ones_like(write.value[..., :1]) if write.store is None else write.store.unsqueeze(-1)
    empty = torch.zeros_like(write.value).unsqueeze(-2)
    return written(empty, share, write, "leaky" if rule == "ema" else rule, None).squeeze(-2)


class MatrixRows(LayerWithTensors):  # type: ignore[no-untyped-call]
    """The rows of one layer's memory; keys and values of a slot are both the row, which is held once.

    Attributes
    ----------
    window_keys, window_values, window_real, tail : as of `MatrixLayer`.
    """

    title: ClassVar[str] = "a memory matrix"
    has: frozenset[str] = frozenset({"queries without positions", SOFTMAX_READS, STRENGTHS})
    beside_names: ClassVar[tuple[str, ...]] = (*WINDOW, "tail")
    window_keys: Tensor | None
    window_values: Tensor | None
    window_real: Tensor | None
    tail: Tensor | None

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """Values, which are the rows, as `keys` are."""
        return self.keys

    def load_state(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on, to the bit, as the memory that `state` was taken of.

        Raises
        ------
        CacheError : see `LayerWithTensors.load_state`; or rows are there a second time, as values.
        """
        super().load_state(facts, tensors)
        if self.seen and self.storage.even["values"].shape[-1]:
            self.reset()
            raise CacheError(
                f"state of {self.title}: it holds its rows twice, as keys and as values, which is no state of this "
                "version; read the text again"
            )

    def exchange(
        self, writes: Write, keys: Tensor, rule: str, decay: Tensor | None, initial: Tensor, real: Tensor | None
    ) -> Exchange:
        """Let the tokens of a chunk read, each before it writes; see `MatrixLayer.exchange`.

        ``decay`` and ``initial``, which are the model's own way to forget and to begin, do not matter.
        """
        batch, _, count, _ = keys.shape
        self._begin(batch, keys)
        if real is not None:
            self.note_padding(real)
        new = row_of(writes, rule)
        if real is not None:
            new = new * real[:, None, :, None]  # padding writes nothing, also in what is observed of writes
        self.storage.append(new, new[..., :0], self.seen, real, self.recorder)
        rows, slots = self.keys, self.slots
        earlier = torch.ones(count, count, dtype=torch.bool, device=keys.device).tril(-1)
        visible = torch.cat((earlier.new_ones(count, slots.shape[2] - count), earlier), 1) & (slots >= 0)[:, :, None]
        faded = rows.new_zeros(()) if self.decays is None else self.decays[:, :, None].to(rows.dtype)
        bias = torch.where(visible, faded, -torch.inf)
        weights = torch.softmax(keys @ rows.transpose(-1, -2) + bias, -1).nan_to_num(nan=0.0)
        if real is not None:
            weights = weights * real[:, None, :, None]
        self.note_reads(keys, weights, real)
        self.storage.settle(self.recorder)
        return Exchange(rows[:, :, None], weights @ rows, bias)


class MatrixRowsCache(DecidedCache):
    """The rows of all layers that have a memory, and the windows of the others.

    Parameters
    ----------
    blocks : layers of the model.
    memories : numbers of those that have a memory.
    policy : the manager.

    Attributes
    ----------
    right_padded : as of `MatrixCache`.
    """

    layers: list[MatrixRows]  # type: ignore[assignment]
    right_padded: bool = False
    beside_title: ClassVar[str] = "window"

    def __init__(self, blocks: int, memories: list[int], policy: CachePolicy) -> None:
        rows = [MatrixRows(index, len(memories), observes=policy.observes) for index in range(len(memories))]
        windows = {number: MatrixLayer() for number in range(blocks) if number not in memories}
        super().__init__(rows, windows, policy)
        self.blocks, self.memories = blocks, list(memories)

    @property
    def windows(self) -> dict[int, MatrixLayer]:
        """The windows of the layers without a memory, by the number of the layer."""
        return self.beside

    def copy_empty(self) -> MatrixRowsCache:
        """Return an empty cache of the same layers."""
        return type(self)(self.blocks, self.memories, self.policy)

    def clone(self) -> MatrixRowsCache:
        """Return an independent continuation of this cache."""
        other = super().clone()
        assert isinstance(other, MatrixRowsCache)  # of `copy_empty`
        other.right_padded = self.right_padded
        return other

    def load_state(self, facts: Sequence[dict[str, Any]], tensors: dict[str, Tensor]) -> None:
        """Go on, to the bit, as the cache that `state` was taken of; see `DecidedCache.load_state`."""
        super().load_state(facts, tensors)
        self.right_padded = True  # nobody has said that it is not

    def by_block(self, batch: int) -> list[MatrixRows | MatrixLayer]:
        """Return what every layer of the model reads and writes, for ``batch`` rows."""
        self.expand_beside(batch)
        rows = dict(zip(self.memories, self.layers, strict=True))
        return [rows[number] if number in rows else self.windows[number] for number in range(self.blocks)]
