"""Memory: the rows of a memory matrix where a manager decides: which are stored, which leave, which fade.

A token's write is a row of its own, what the model's rule would make of an empty slot. The manager takes the place of
the softmax over slots: with a budget of N slots and a decision after every token it keeps N of N + 1 rows, so it says
whether the new one is stored, and which other one it replaces. Rows are read by content as the model reads its matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any, ClassVar

import torch
from torch import Tensor

from evomem.errors import CacheError
from evomem.memory.explicit.beside import LayerWithTensors
from evomem.memory.explicit.cache import ExplicitCache
from evomem.memory.explicit.matrix import WINDOW, Exchange, MatrixLayer, layer_of
from evomem.memory.explicit.matrix_rules import Write, written
from evomem.memory.kv.policy import CachePolicy


def row_of(write: Write, rule: str) -> Tensor:
    """Return what a write makes of an empty slot that it goes to whole: (batch, heads, tokens, width).

    λ is 1: rows fade as the manager says. With `ema` that would write nothing, and the value itself is taken.
    """
    share = torch.ones_like(write.value[..., :1]) if write.store is None else write.store.unsqueeze(-1)
    empty = torch.zeros_like(write.value).unsqueeze(-2)
    return written(empty, share, write, "leaky" if rule == "ema" else rule, None).squeeze(-2)


class MatrixRows(LayerWithTensors):  # type: ignore[no-untyped-call]
    """The rows of one layer's memory; keys and values of a slot are the row.

    Attributes
    ----------
    window_keys, window_values, window_real, tail : as of `MatrixLayer`.
    """

    title: ClassVar[str] = "a memory matrix"
    beside_names: ClassVar[tuple[str, ...]] = (*WINDOW, "tail")
    window_keys: Tensor | None
    window_values: Tensor | None
    window_real: Tensor | None
    tail: Tensor | None

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
        self.storage.append(new, new, self.seen, real, self.recorder)
        rows, slots = self.keys, self.slots
        earlier = torch.ones(count, count, dtype=torch.bool, device=keys.device).tril(-1)
        visible = torch.cat((earlier.new_ones(count, slots.shape[2] - count), earlier), 1) & (slots >= 0)[:, :, None]
        faded = rows.new_zeros(()) if self.decays is None else self.decays[:, :, None].to(rows.dtype)
        bias = torch.where(visible, faded, -torch.inf)
        weights = torch.softmax(keys @ rows.transpose(-1, -2) + bias, -1).nan_to_num(nan=0.0)
        if real is not None:
            weights = weights * real[:, None, :, None]
        if self.wanted.every_query:
            whole = self.recorder.whole(self.storage.layout)
            whole.attended(weights.float(), self.seen, self.starts)
            self.recorder.take_over(whole, self.storage.layout)
        if self.wanted.observations:
            self.recorder.queried(keys, None, None, None, self.start)
        self.storage.settle(self.recorder)
        return Exchange(rows[:, :, None], weights @ rows, bias)


class MatrixRowsCache(ExplicitCache):
    """The rows of all layers that have a memory, and the windows of all layers.

    Parameters
    ----------
    blocks : layers of the model.
    memories : numbers of those that have a memory.
    policy : the manager.

    Attributes
    ----------
    windows : by the number of the layer, the windows of layers without a memory.
    """

    layers: list[MatrixRows]  # type: ignore[assignment]

    def __init__(self, blocks: int, memories: list[int], policy: CachePolicy) -> None:
        rows = [MatrixRows(index, len(memories), observes=policy.observes) for index in range(len(memories))]
        super().__init__(rows, policy)
        self.blocks, self.memories = blocks, list(memories)
        self.windows = {number: MatrixLayer() for number in range(blocks) if number not in memories}

    @property
    def parts(self) -> list[MatrixRows | MatrixLayer]:
        """Everything that has rows of the batch: layers and windows."""
        return [*self.layers, *self.windows.values()]

    def by_block(self, batch: int) -> list[MatrixRows | MatrixLayer]:
        """Return what every layer of the model reads and writes, for ``batch`` rows."""
        for window in self.windows.values():
            if window.tensors() and len(window.tensors()["window_keys"]) == 1 < batch:
                window.map(lambda part: part.expand(batch, *part.shape[1:]))
        rows = dict(zip(self.memories, self.layers, strict=True))
        return [rows[number] if number in rows else self.windows[number] for number in range(self.blocks)]

    def require_whole(self) -> None:
        """Raise `CacheError` when an error or interruption cut a forward pass short, so that layers disagree."""
        if len({layer.seen for layer in self.parts}) > 1:
            raise CacheError(
                "a forward pass over this cache was cut short, so some layers read tokens that others did not; reset() "
                "it and read the text again"
            )

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Read a context in any number of passes; a manager without ``every`` decides when the block ends."""
        yield
        self.require_whole()
        if self.policy.schedule.every is None:
            self.decide()

    @property
    def bytes_peak(self) -> int:
        """The layers' peaks together."""
        return sum(layer.bytes_peak for layer in self.layers) + sum(one.nbytes() for one in self.windows.values())

    @property
    def bytes_mean(self) -> float:
        """Mean of the bytes held, over the tokens read."""
        return sum(layer.bytes_mean for layer in self.layers) + sum(one.nbytes() for one in self.windows.values())

    def require_finished(self) -> None:
        """Raise `CacheError` when the last pass was cut short; asked where a block of ``manager.attach`` ends."""
        self.require_whole()

    # ---- what there is besides the layers that are decided about --------------------------------------------------

    def reset(self) -> None:
        """Forget everything; the cache is as new."""
        super().reset()
        for window in self.windows.values():
            window.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i go on as row ``beam_idx[i]``."""
        for layer in self.parts:
            layer.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        for layer in self.parts:
            layer.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        for layer in self.parts:
            layer.batch_repeat_interleave(repeats)

    def nbytes(self) -> int:
        """Bytes of the tensors held, over all layers and rows."""
        return super().nbytes() + sum(window.nbytes() for window in self.windows.values())

    def bytes_by_row(self) -> Tensor:
        """Bytes that every row would hold in a cache of its own: (batch,) int64."""
        parts = [part for window in self.windows.values() for part in window.tensors().values()]
        return super().bytes_by_row() + sum(part.shape[1:].numel() * part.element_size() for part in parts)

    def clone(self) -> MatrixRowsCache:
        """Return an independent continuation of this cache."""
        other = type(self)(self.blocks, self.memories, self.policy)
        other.layers = [layer.clone() for layer in self.layers]
        other.windows = {number: copy(window) for number, window in self.windows.items()}
        return other

    def state(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """Return all that the cache is between two tokens; see `ExplicitCache.state`. Windows are ``window.N.NAME``."""
        facts, tensors = super().state()
        for number, window in self.windows.items():
            tensors |= {f"window.{number}.{name}": tensor for name, tensor in window.tensors().items()}
        return facts, tensors

    def load_state(self, facts: Sequence[dict[str, Any]], tensors: dict[str, Tensor]) -> None:
        """Go on, to the bit, as the cache that `state` was taken of.

        Raises
        ------
        CacheError : the state is of another number of layers, or no state of such memories.
        """
        windows: dict[str, dict[str, Tensor]] = {f"window.{number}": {} for number in self.windows}
        rest: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            window, _, part = name.rpartition(".")
            windows.get(window, rest)[part if window in windows else name] = tensor
        super().load_state(facts, rest)
        seen = self.get_seq_length()
        self.windows = {number: layer_of(number, windows[f"window.{number}"], seen) for number in self.windows}
