"""Memory: a memory matrix as a layer of a cache: its rows, what was observed of them, and the model's short window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from evomem.errors import CacheError
from evomem.memory.explicit.cache_layer import require_numbers, require_shapes
from evomem.memory.explicit.matrix_rules import Write, latest, read, scan
from evomem.memory.explicit.padded import PaddedCache, PaddedLayer

WINDOW = ("window_keys", "window_values", "window_real")
TENSORS = (*WINDOW, "matrix", "frequency", "last_read", "last_written", "tail", "start")
"""Attributes of a `MatrixLayer` that are its state, besides ``seen``; the batch is axis 0 of each.

A layer without a memory has those of the window only, and ``start``.
"""


@dataclass(frozen=True)
class Exchange:
    """What the tokens of a chunk see of a memory.

    Attributes
    ----------
    rows : (batch, heads, tokens, slots, width), the rows that each token sees; one token where all see the same.
    context : (batch, heads, tokens, width), what each has read, c.
    bias : (batch, heads, tokens, slots), added to the logits of attention to the rows: the log-decay of a slot, and
        minus infinity where a token does not see it. None: every token sees every row whole.
    """

    rows: Tensor
    context: Tensor
    bias: Tensor | None = None


def ended_rows(layer: Any) -> Tensor | None:
    """Return which rows have padding behind a token, where no token may follow: (batch,) bool.

    layer : the first one of a `MatrixCache` or `MatrixRowsCache`. None: nothing was read, or the window is a single
        token and keeps none, so that a model refuses such padding from the beginning.
    """
    if layer.start is None or layer.window_real is None or not layer.window_real.shape[1]:
        return None
    ended: Tensor = (layer.start < layer.seen) & ~layer.window_real[:, -1]
    return ended


class MatrixLayer(PaddedLayer):  # type: ignore[no-untyped-call]
    """The memory matrix of one layer, for every row and head, and the last tokens that its attention sees.

    Attributes
    ----------
    seen : tokens read so far, padding included.
    matrix : (batch, heads, slots, width) fp32, M.
    frequency : (batch, heads, slots) fp32, reads received: the sum of the weights softmax(M k_r) of all tokens.
    last_read, last_written : (batch, heads, slots) fp32, index of the token that read, and wrote, the slot last;
        softly where weights are soft (see `evomem.memory.explicit.matrix_rules.latest`); -1: none yet.
    window_keys, window_values : (batch, attention_heads, tokens, head_dim) of the window.
    window_real : (batch, tokens) bool, which tokens of the window are no padding.
    tail : (batch, reach, hidden), inputs of the last tokens, which later tokens' writes and reads look back to.
    start : see `PaddedLayer`; None beside layers that a manager decides about, which know it.
    """

    title: ClassVar[str] = "a memory matrix"
    not_undone: ClassVar[str] = "a write cannot be undone"
    tensor_names: ClassVar[tuple[str, ...]] = TENSORS
    matrix: Tensor | None
    frequency: Tensor | None
    last_read: Tensor | None
    last_written: Tensor | None
    window_keys: Tensor | None
    window_values: Tensor | None
    window_real: Tensor | None
    tail: Tensor | None

    def exchange(
        self, writes: Write, keys: Tensor, rule: str, decay: Tensor | None, initial: Tensor, real: Tensor | None
    ) -> Exchange:
        """Let the tokens of a chunk read, each before it writes.

        Parameters
        ----------
        writes, rule, decay, real : see `evomem.memory.explicit.matrix_rules.scan`.
        keys : (batch, heads, tokens, width), read keys.
        initial : (heads, slots, width), the matrix before the first token.
        """
        if self.matrix is None:
            self.begin(initial.expand(len(keys), -1, -1, -1))
        before, written, after = scan(self._begun(self.matrix), writes, rule, decay, real)
        context, weights = read(before, keys)
        weights = weights if real is None else weights * real[:, None, :, None]
        self.advance(after, written.detach(), weights.detach())
        return Exchange(before, context)

    def begin(self, matrix: Tensor) -> None:
        """Start with a matrix (batch, heads, slots, width) before the first token."""
        self.matrix = matrix
        self.frequency = matrix.new_zeros(matrix.shape[:-1])
        self.last_read = matrix.new_full(matrix.shape[:-1], -1.0)
        self.last_written = self.last_read

    def advance(self, matrix: Tensor, writes: Tensor, reads: Tensor) -> None:
        """Note the matrix after a chunk, and how strongly its tokens wrote and read: (batch, heads, tokens, slots)."""
        if self.frequency is None or self.last_read is None or self.last_written is None:
            raise CacheError("this memory matrix was not begun; begin(matrix) comes before advance")
        self.matrix = matrix
        self.frequency = self.frequency + reads.sum(2)
        self.last_read = latest(self.last_read, reads, self.seen)
        self.last_written = latest(self.last_written, writes.clamp(max=1), self.seen)

    @property
    def recency(self) -> Tensor:
        """(batch, heads, slots) fp32, steps since the last read; ``seen`` for a slot that was never read."""
        return self.seen - 1 - self._begun(self.last_read)

    @property
    def age(self) -> Tensor:
        """(batch, heads, slots) fp32, steps since the last write; ``seen`` for a slot that was never written."""
        return self.seen - 1 - self._begun(self.last_written)

    @staticmethod
    def _begun(tensor: Tensor | None) -> Tensor:
        if tensor is None:
            raise CacheError("nothing has been read yet: an empty memory matrix has no slots to look at")
        return tensor

    def check(self, where: str, tensors: Mapping[str, Tensor], seen: int) -> None:
        """Raise `CacheError` unless tensors fit each other and the number of tokens read."""
        if not seen and not tensors:
            return
        names = TENSORS if tensors.keys() - {*WINDOW, "start"} else WINDOW
        if missing := set(names) - tensors.keys() - {"start"}:
            raise CacheError(f"{where}: {min(missing)!r} is missing; the file is damaged")
        keys = tensors["window_keys"]
        if keys.dim() != 4 or keys.shape[2] > seen:
            raise CacheError(
                f"{where}: 'window_keys' has shape {tuple(keys.shape)} after {seen} tokens; its axes are (batch, "
                "attention_heads, tokens, head_dim)"
            )
        batch, tokens = keys.shape[0], keys.shape[2]
        shapes = {"window_values": tuple(keys.shape), "window_real": (batch, tokens)}
        if "matrix" in tensors:
            matrix = tensors["matrix"]
            shapes |= dict.fromkeys(("frequency", "last_read", "last_written"), tuple(matrix.shape[:-1]))
            shapes |= {"matrix": (batch, *matrix.shape[1:4]), "tail": (batch, *tensors["tail"].shape[1:3])}
        require_shapes(where, tensors, shapes)
        require_numbers(where, tensors, {"window_real": torch.bool, "start": torch.int64})


class MatrixCache(PaddedCache):
    """The memory matrices of all layers: what a model with memory matrices sees as its `past_key_values`.

    Attributes
    ----------
    right_padded : whether a row may have padding behind its tokens, so that it is asked for (`ended_rows`).
    """

    layers: list[MatrixLayer]
    saved_title: ClassVar[str] = "saved memory matrices"
    right_padded: bool = False

    def __init__(self, layers: int) -> None:
        super().__init__([MatrixLayer() for _ in range(layers)])

    def by_block(self, batch: int) -> list[MatrixLayer]:
        """Return what every layer of the model reads and writes."""
        return self.layers

    def fill(self, tensors: Mapping[str, Tensor]) -> Self:
        """Hold what `tensors` describe; see `PaddedCache.fill`."""
        self.right_padded = True  # nobody has said that it is not
        return super().fill(tensors)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], layers: int) -> Self:
        """Return the cache that `tensors` describe; see `TensorCache.fill`."""
        return cls(layers).fill(tensors)
