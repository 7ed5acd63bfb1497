"""Memory: layers of a cache that read a row segment by segment, counted from its first token that is no padding."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from evomem.errors import CacheError
from evomem.memory.explicit.padded import PaddedCache, PaddedLayer


class SegmentedLayer(PaddedLayer):  # type: ignore[no-untyped-call]
    """A layer whose rows have segments of their own; a row's first one begins at its ``start``."""


class SegmentedCache(PaddedCache):
    """Segmented layers, whose rows begin alike in all.

    Class attributes
    ----------------
    why_left : what a segment would do with padding behind a token, as an end of a sentence.
    """

    layers: list[SegmentedLayer]
    why_left: ClassVar[str] = "a segment would take it in"

    def note_padding(self, real: Tensor) -> None:
        """Move the beginning of rows that have read nothing but padding; see `PaddedCache.note_padding`.

        Raises
        ------
        CacheError : a row that has read a token has padding; or rows have not begun.
        """
        begun = [start < self.get_seq_length() for start in self.starts]
        first: list[bool] = (~real[:, 0]).tolist() if any(begun) else []
        if any(padding and started for padding, started in zip(first, begun, strict=False)):
            raise CacheError(
                f"attention_mask has padding behind tokens that were read; {self.why_left}: give the mask of all "
                "tokens ever read, and pad on the left (tokenizer.padding_side = 'left')"
            )
        super().note_padding(real)
