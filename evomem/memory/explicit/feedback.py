"""Memory: feedback memory as a layer of a cache: activations that summarise all blocks read, and the last segments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor

from evomem.errors import CacheError
from evomem.memory.explicit.cache_layer import require_numbers, require_shapes
from evomem.memory.explicit.matrix import WINDOW
from evomem.memory.explicit.matrix_rules import precise
from evomem.memory.explicit.segmented import SegmentedCache, SegmentedLayer


class FeedbackLayer(SegmentedLayer):  # type: ignore[no-untyped-call]
    """The feedback memory of one layer, and the keys and values of its last tokens.

    Attributes
    ----------
    seen : tokens read so far, padding included.
    feedback : (batch, slots, hidden) fp32, F: what the layer made of it and of the last whole block. None where the
        model has no feedback memory.
    window_keys, window_values : (batch, heads, tokens, head_dim), of the memory segments and of the block that is read.
    window_real : (batch, tokens) bool, which of these tokens are no padding.
    start : (batch,) int64, index of the row's first real token, where its first block begins.
    """

    title: ClassVar[str] = "a feedback memory"
    not_undone: ClassVar[str] = "a block that was compressed cannot be undone"
    tensor_names: ClassVar[tuple[str, ...]] = (*WINDOW, "start", "feedback")
    feedback: Tensor | None
    window_keys: Tensor | None
    window_values: Tensor | None
    window_real: Tensor | None

    def begin(self, rows: int, initial: Tensor | None, device: torch.device) -> None:
        """Start ``rows`` texts with the feedback that a model begins with: (slots, hidden), or (rows, slots, hidden).

        Raises
        ------
        CacheError : the feedback is of other rows.
        """
        if initial is not None and initial.dim() == 3 and len(initial) != rows:
            raise CacheError(
                f"{rows} rows are to be read, and embeddings are given for {len(initial)}; give model.new_cache(...) "
                "embeddings for every row"
            )
        self.start = torch.zeros(rows, dtype=torch.int64, device=device)
        self.feedback = None if initial is None else precise(initial).expand(rows, *initial.shape[-2:])

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
        require_shapes(where, tensors, shapes)
        require_numbers(where, tensors, {"window_real": torch.bool, "start": torch.int64})
        if not bool(((tensors["start"] >= 0) & (tensors["start"] <= seen)).all()):
            raise CacheError(f"{where}: 'start' is no index of the {seen} tokens read; the file is damaged")


class FeedbackCache(SegmentedCache):
    """The feedback memories of all layers: what a model that has them sees as its `past_key_values`.

    Parameters
    ----------
    layers : how many there are.
    embeddings : (batch, slots, hidden), what texts begin with, a row's own; None: what the model begins with. `reset`
        leaves it.
    """

    layers: list[FeedbackLayer]  # type: ignore[assignment]
    saved_title: ClassVar[str] = "saved feedback memories"
    why_left: ClassVar[str] = "a block would be compressed with it"

    def __init__(self, layers: int, embeddings: Tensor | None = None) -> None:
        super().__init__([FeedbackLayer() for _ in range(layers)])
        self.embeddings = embeddings

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], layers: int) -> Self:
        """Return the cache that `tensors` describe; see `TensorCache.fill`."""
        return cls(layers).fill(tensors)
