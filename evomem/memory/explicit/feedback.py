"""Memory: feedback memory as a layer of a cache: activations that summarise all blocks read, and the last segments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor

from evomem.errors import CacheError
from evomem.memory.explicit.cache_layer import TensorCache, TensorLayer
from evomem.memory.explicit.matrix import WINDOW
from evomem.memory.explicit.matrix_rules import precise


class FeedbackLayer(TensorLayer):  # type: ignore[no-untyped-call]
    """The feedback memory of one layer, and the keys and values of its last tokens.

    Attributes
    ----------
    seen : tokens read so far, padding included.
    feedback : (batch, slots, hidden) fp32, F: what the layer made of it and of the last whole block. None where the
        model has no feedback memory.
    window_keys, window_values : (batch, heads, tokens, head_dim), of the memory segments and of the block that is read.
    window_real : (batch, tokens) bool, which of these tokens are no padding.
    start : (batch,) int64, index of the row's first real token, where its first block begins.
    starts : the same as numbers, so that nobody waits for a device to say where blocks end.
    """

    title: ClassVar[str] = "a feedback memory"
    not_undone: ClassVar[str] = "a block that was compressed cannot be undone"
    tensor_names: ClassVar[tuple[str, ...]] = (*WINDOW, "start", "feedback")
    feedback: Tensor | None
    window_keys: Tensor | None
    window_values: Tensor | None
    window_real: Tensor | None
    start: Tensor | None
    starts: tuple[int, ...]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.starts = ()

    def begin(self, rows: int, initial: Tensor | None, device: torch.device) -> None:
        """Start ``rows`` texts with the feedback (slots, hidden) that a model begins with."""
        self.start, self.starts = torch.zeros(rows, dtype=torch.int64, device=device), (0,) * rows
        self.feedback = None if initial is None else precise(initial).expand(rows, *initial.shape)

    def note_padding(self, real: Tensor) -> None:
        """Move the first block of rows that have read nothing but padding behind the padding of a chunk.

        real : (batch, tokens) bool.

        Raises
        ------
        CacheError : a row that has read a token has padding, which its block would be compressed with.
        """
        if self.start is None:
            return
        padding = (~real).long().cumprod(1).sum(1)
        if bool(((self.start < self.seen) & (padding > 0)).any()):
            raise CacheError(
                "attention_mask has padding behind tokens that were read, which a block would be compressed with: give "
                "the mask of all tokens ever read, and pad on the left (tokenizer.padding_side = 'left')"
            )
        self.start = torch.where(self.start == self.seen, self.start + padding, self.start)
        self.starts = tuple(self.start.tolist())

    def compress(self, feedback: Tensor, due: Tensor) -> None:
        """Replace the feedback of the rows that are ``due`` (batch,) bool by (batch, slots, hidden)."""
        if self.feedback is None:
            raise CacheError("this feedback memory was not begun; begin(...) comes before compress")
        self.feedback = torch.where(due[:, None, None], precise(feedback), self.feedback)

    @property
    def bias(self) -> None:
        """Added to the logits of reads: nothing, no slot fades."""
        return None

    @property
    def numbers(self) -> None:
        """Which of the model's slots these are: all, in their order."""
        return None

    def read_by(self, tokens: Tensor, weights: Tensor) -> None:
        """Do nothing: nobody asks who reads the slots."""

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change every tensor."""
        super().map(change)
        self.starts = () if self.start is None else tuple(self.start.tolist())

    def fill(self, where: str, tensors: Mapping[str, Tensor], seen: int) -> None:
        """Hold these tensors after ``seen`` tokens; see `TensorLayer.fill`."""
        super().fill(where, tensors, seen)
        self.starts = () if self.start is None else tuple(self.start.tolist())

    def check(self, where: str, tensors: Mapping[str, Tensor], seen: int) -> None:
        """Raise `CacheError` unless tensors fit each other and the number of tokens read."""
        if not seen and not tensors:
            return
        if missing := {*WINDOW, "start"} - tensors.keys():
            raise CacheError(f"{where}: {min(missing)!r} is missing; the file is damaged")
        keys = tensors["window_keys"]
        if keys.dim() != 4 or keys.shape[2] > seen:
            raise CacheError(
                f"{where}: 'window_keys' has shape {tuple(keys.shape)} after {seen} tokens; its axes are (batch, "
                "heads, tokens, head_dim)"
            )
        batch, tokens = keys.shape[0], keys.shape[2]
        shapes = {"window_values": tuple(keys.shape), "window_real": (batch, tokens), "start": (batch,)}
        if "feedback" in tensors:
            shapes["feedback"] = (batch, *tensors["feedback"].shape[1:3])
        types = {"window_real": torch.bool, "start": torch.int64}
        for name, shape in shapes.items():
            if tuple(tensors[name].shape) != shape:
                raise CacheError(f"{where}: {name!r} has shape {tuple(tensors[name].shape)} instead of {shape}")
        for name, tensor in tensors.items():
            right = tensor.dtype == types[name] if name in types else tensor.is_floating_point()
            if not right or not bool(torch.isfinite(tensor).all()):
                raise CacheError(
                    f"{where}: {name!r} is {tensor.dtype}, or holds what is no number; the file is damaged"
                )
        if not bool(((tensors["start"] >= 0) & (tensors["start"] <= seen)).all()):
            raise CacheError(f"{where}: 'start' is no index of the {seen} tokens read; the file is damaged")


class FeedbackCache(TensorCache):
    """The feedback memories of all layers: what a model that has them sees as its `past_key_values`."""

    layers: list[FeedbackLayer]
    saved_title: ClassVar[str] = "saved feedback memories"

    def __init__(self, layers: int) -> None:
        super().__init__([FeedbackLayer() for _ in range(layers)])

    @property
    def starts(self) -> tuple[int, ...]:
        """Where the first block of every row begins."""
        return self.layers[0].starts

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], layers: int) -> Self:
        """Return the cache that `tensors` describe; see `TensorCache.fill`."""
        return cls(layers).fill(tensors)
