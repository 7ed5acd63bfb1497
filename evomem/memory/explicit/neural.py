"""Memory: a neural memory as a layer of a cache: its weights, their momentum, and what the layer looks back to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor

from evomem.errors import CacheError
from evomem.memory.explicit.cache_layer import require_numbers, require_shapes
from evomem.memory.explicit.neural_rules import Gates, Surprise, answer, take_in
from evomem.memory.explicit.segmented import SegmentedCache, SegmentedLayer

WEIGHTS = ("memory", "momentum", "anchor")
TAILS = ("tail_key", "tail_value", "tail_query", "tail_recall")
WINDOW = ("window_keys", "window_values", "recalled_keys", "recalled_values")
TENSORS = (*WEIGHTS, "start", *TAILS, *WINDOW, "window_real")
"""Attributes of a `NeuralLayer` that are its state, besides ``seen``; the batch is axis 0 of each."""


class NeuralLayer(SegmentedLayer):  # type: ignore[no-untyped-call]
    """The neural memory of one layer, for every row and head, and what else the layer keeps of a text.

    A row's segments are counted from its first token that is no padding.

    Attributes
    ----------
    seen : tokens read so far, padding included.
    memory, momentum : (batch, heads, numbers) fp32 or finer, M and S after the last token.
    anchor : (batch, heads, numbers), M as each row's segment began: surprise is measured there.
    start : (batch,) int64, tokens of padding before a row's first token.
    tail_key, tail_value, tail_query, tail_recall : (batch, conv - 1, width), what convolutions of later tokens see.
    window_keys, window_values : (batch, attention_heads, tokens, head_dim), of the last tokens that attention sees.
    recalled_keys, recalled_values : the same of what those tokens recalled before they were read (MAC).
    window_real : (batch, tokens) bool, which tokens of the window are no padding.
    """

    title: ClassVar[str] = "a neural memory"
    not_undone: ClassVar[str] = "what its weights learnt cannot be taken out of them"
    tensor_names: ClassVar[tuple[str, ...]] = TENSORS
    memory: Tensor | None
    momentum: Tensor | None
    anchor: Tensor | None
    tail_key: Tensor | None
    tail_value: Tensor | None
    tail_query: Tensor | None
    tail_recall: Tensor | None
    window_keys: Tensor | None
    window_values: Tensor | None
    recalled_keys: Tensor | None
    recalled_values: Tensor | None
    window_real: Tensor | None

    def begin(self, initial: Tensor, rows: int) -> None:
        """Start every row with the weights ``initial`` (heads, numbers) where nothing was read yet."""
        if self.memory is None:
            self.memory, self.anchor = (initial.expand(rows, *initial.shape).clone() for _ in range(2))
            self.momentum = torch.zeros_like(self.memory)

    def recall(self, queries: Tensor, widths: tuple[int, ...]) -> Tensor:
        """Return what tokens read of M as their segment began, (batch, heads, tokens, out)."""
        return answer(self.begun(self.anchor), queries, widths)

    def exchange(
        self, keys: Tensor, values: Tensor, queries: Tensor, gates: Gates, widths: tuple[int, ...], limit: float | None
    ) -> tuple[Tensor, Surprise]:
        """Let tokens of one segment write, and each read after its own write.

        Parameters
        ----------
        keys, values, queries : (batch, heads, tokens, size), all of one segment in every row.
        gates : of every token; those of padding are 0.
        limit : see `evomem.memory.explicit.neural_rules.surprise`.

        Returns
        -------
        What is read, (batch, heads, tokens, out), and how much each token was a surprise.
        """
        anchor, memory, momentum = self.begun(self.anchor), self.begun(self.memory), self.begun(self.momentum)
        reads, learnt, self.memory, self.momentum = take_in(
            anchor, memory, momentum, keys, values, queries, gates, widths, limit
        )
        return reads, learnt

    def end_segment(self, rows: Tensor | None) -> None:
        """Let a new segment begin in these rows, (batch,) bool; None: in all of them."""
        memory = self.begun(self.memory)
        if rows is None:
            self.anchor = memory.clone()  # a tensor of its own, for files and for bytes
        else:
            self.anchor = torch.where(rows[:, None, None], memory, self.begun(self.anchor))

    @staticmethod
    def begun(tensor: Tensor | None) -> Tensor:
        """Return a tensor of the layer; raises `CacheError` where nothing was read yet."""
        if tensor is None:
            raise CacheError("nothing has been read yet: a neural memory that is empty has no weights to look at")
        return tensor

    def check(self, where: str, tensors: Mapping[str, Tensor], seen: int) -> None:
        """Raise `CacheError` unless tensors fit each other and the number of tokens read."""
        if not seen and not tensors:
            return
        if missing := {*WEIGHTS, "start", "tail_key", "tail_value", "tail_query"} - tensors.keys():
            raise CacheError(f"{where}: {min(missing)!r} is missing; the file is damaged")
        memory, start = tensors["memory"], tensors["start"]
        if memory.dim() != 3:
            raise CacheError(f"{where}: 'memory' has shape {tuple(memory.shape)}; its axes are (batch, heads, numbers)")
        batch = len(memory)
        shapes: dict[str, tuple[int, ...]] = {name: tuple(memory.shape) for name in WEIGHTS}
        shapes["start"] = (batch,)
        shapes |= {name: (batch, *tensors[name].shape[1:3]) for name in TAILS if name in tensors}
        windows = [name for name in WINDOW if name in tensors]
        if windows:
            keys = tensors[windows[0]]
            if keys.dim() != 4 or keys.shape[2] > seen:
                raise CacheError(
                    f"{where}: {windows[0]!r} has shape {tuple(keys.shape)} after {seen} tokens; its axes are (batch, "
                    "attention_heads, tokens, head_dim)"
                )
            shapes |= dict.fromkeys(windows, (batch, *keys.shape[1:]))
            shapes["window_real"] = (batch, keys.shape[2])
        if windows not in ([], list(WINDOW[:2]), list(WINDOW)) or ("window_real" in tensors) != bool(windows):
            raise CacheError(f"{where}: keys, values and window_real of a window are saved together; it is damaged")
        require_shapes(where, tensors, shapes)
        require_numbers(where, tensors, {"start": torch.int64, "window_real": torch.bool})
        if bool(((start < 0) | (start > seen)).any()):
            raise CacheError(f"{where}: 'start' is before the first token or behind the last; the file is damaged")


class NeuralCache(SegmentedCache):
    """The neural memories of all layers: what a model that has them sees as its `past_key_values`."""

    layers: list[NeuralLayer]  # type: ignore[assignment]
    saved_title: ClassVar[str] = "saved neural memories"
    why_left: ClassVar[str] = "a neural memory would take it into its segments"

    def __init__(self, layers: int) -> None:
        super().__init__([NeuralLayer() for _ in range(layers)])

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], layers: int) -> Self:
        """Return the cache that `tensors` describe; see `TensorCache.fill`."""
        return cls(layers).fill(tensors)
