"""Memory: layers of a cache that read a row segment by segment, counted from its first token that is no padding."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from evomem.errors import CacheError
from evomem.memory.explicit.cache_layer import TensorCache, TensorLayer


class SegmentedLayer(TensorLayer):  # type: ignore[no-untyped-call]
    """A layer whose rows have segments of their own.

    Attributes
    ----------
    start : (batch,) int64, index of the row's first real token, where its first segment begins; None before the first
        token.
    """

    start: Tensor | None
    _counted: tuple[Tensor | None, tuple[int, ...]] = (None, ())

    @property
    def starts(self) -> tuple[int, ...]:
        """``start`` as numbers, taken from the device once: every pass asks where segments end."""
        if self.start is None:
            return ()
        if self._counted[0] is not self.start:
            self._counted = (self.start, tuple(self.start.tolist()))
        return self._counted[1]


class SegmentedCache(TensorCache):
    """Segmented layers, whose rows begin alike in all.

    Class attributes
    ----------------
    why_left : what a segment would do with padding behind a token, as an end of a sentence.
    """

    layers: list[SegmentedLayer]
    why_left: ClassVar[str] = "a segment would take it in"

    @property
    def starts(self) -> tuple[int, ...]:
        """Where the first segment of every row begins."""
        return self.layers[0].starts

    def begin_rows(self, rows: int, device: torch.device) -> None:
        """Let every one of ``rows`` texts begin at the next token."""
        for layer in self.layers:
            layer.start = torch.zeros(rows, dtype=torch.int64, device=device)

    def note_padding(self, real: Tensor) -> None:
        """Move the beginning of rows that have read nothing but padding behind the padding of the next chunk.

        real : (batch, tokens) bool, False for padding.

        Raises
        ------
        CacheError : a row that has read a token has padding; or rows have not begun.
        """
        seen, starts = self.get_seq_length(), self.starts
        if len(starts) != len(real):
            raise CacheError(f"{len(starts)} rows have begun, and {len(real)} have padding; call begin_rows first")
        padding: list[int] = (~real).long().cumprod(1).sum(1).tolist()
        if any(count for start, count in zip(starts, padding, strict=True) if start < seen):
            raise CacheError(
                f"attention_mask has padding behind tokens that were read; {self.why_left}: give the mask of all "
                "tokens ever read, and pad on the left (tokenizer.padding_side = 'left')"
            )
        if not any(padding):
            return
        moved = [start + count if start == seen else start for start, count in zip(starts, padding, strict=True)]
        for layer in self.layers:
            layer.start = torch.tensor(moved, dtype=torch.int64, device=real.device)
            layer._counted = (layer.start, tuple(moved))
