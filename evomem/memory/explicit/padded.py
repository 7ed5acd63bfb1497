"""Memory: layers of a cache that know where every row of a text begins, behind the padding on its left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from evomem.errors import CacheError
from evomem.memory.explicit.cache_layer import TensorCache, TensorLayer


class PaddedLayer(TensorLayer):  # type: ignore[no-untyped-call]
    """A layer whose rows begin at tokens of their own.

    A subclass names ``start`` among its ``tensor_names``.

    Attributes
    ----------
    start : (batch,) int64, index of the row's first real token, or of the next one where it has none yet; None before
        the first token.
    """

    start: Tensor | None
    _counted: tuple[Tensor | None, tuple[int, ...]] = (None, ())

    @property
    def starts(self) -> tuple[int, ...]:
        """``start`` as numbers, taken from the device once."""
        if self.start is None:
            return ()
        if self._counted[0] is not self.start:
            self._counted = (self.start, tuple(self.start.tolist()))
        return self._counted[1]


class PaddedCache(TensorCache):
    """Layers whose rows begin alike in all of them."""

    layers: list[Any]

    @property
    def starts(self) -> tuple[int, ...]:
        """Where every row begins."""
        starts: tuple[int, ...] = self.layers[0].starts
        return starts

    def begin_rows(self, rows: int, device: torch.device) -> None:
        """Let every one of ``rows`` texts begin at the next token."""
        for layer in self.layers:
            layer.start = torch.zeros(rows, dtype=torch.int64, device=device)

    def note_padding(self, real: Tensor) -> None:
        """Move the beginning of rows that have read nothing but padding behind the padding of the next chunk.

        real : (batch, tokens) bool, False for padding.

        Raises
        ------
        CacheError : rows have not begun.
        """
        moved = moved_starts(self.starts, self.get_seq_length(), real)
        if moved == self.starts:
            return
        for layer in self.layers:
            layer.start = torch.tensor(moved, dtype=torch.int64, device=real.device)
            layer._counted = (layer.start, moved)

    def fill(self, tensors: Mapping[str, Tensor]) -> Self:
        """Hold what `tensors` describe; see `TensorCache.fill`.

        Raises
        ------
        CacheError : see there; or it is not said where rows begin, or differently by layer.
        """
        super().fill(tensors)
        seen, first = self.get_seq_length(), self.layers[0].start
        for index, layer in enumerate(self.layers):
            start, where = layer.start, f"{self.saved_title}, {self.layer_title} {index}"
            if not seen and start is None:
                continue
            if start is None:
                raise CacheError(f"{where}: 'start' is missing, where rows begin; read the text again")
            if (
                start.shape != (layer.rows,)
                or start.dtype != torch.int64
                or not bool(((start >= 0) & (start <= seen)).all())
            ):
                raise CacheError(f"{where}: 'start' is no index of the {seen} tokens read; the file is damaged")
            if not torch.equal(start, first):
                raise CacheError(f"{where}: its rows begin elsewhere than those of the first one; the file is damaged")
        return self


def moved_starts(starts: tuple[int, ...], seen: int, real: Tensor) -> tuple[int, ...]:
    """Return where rows begin after a chunk with padding; ``starts`` are where they began after ``seen`` tokens.

    real : (batch, tokens) bool, False for padding.

    Raises
    ------
    CacheError : rows have not begun.
    """
    if len(starts) != len(real):
        raise CacheError(f"{len(starts)} rows have begun, and {len(real)} have padding; call begin_rows first")
    padding: list[int] = (~real).long().cumprod(1).sum(1).tolist()
    return tuple(start + count if start == seen else start for start, count in zip(starts, padding, strict=True))
