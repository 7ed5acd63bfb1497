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
        require_nothing_behind(self.starts, self.get_seq_length(), real, self.why_left)
        super().note_padding(real)


def require_nothing_behind(starts: tuple[int, ...], seen: int, real: Tensor, why_left: str) -> None:
    """Raise `CacheError` where a row that has read a token has padding in the next chunk.

    Parameters
    ----------
    starts : where the rows begin, after ``seen`` tokens.
    real : (batch, tokens) bool, False for padding.
    why_left : see `SegmentedCache`.
    """
    begun = [start < seen for start in starts]
    first: list[bool] = (~real[:, 0]).tolist() if any(begun) else []
    if any(padding and started for padding, started in zip(first, begun, strict=False)):
        raise CacheError(
            f"attention_mask has padding behind tokens that were read; {why_left}: give the mask of all "
            "tokens ever read, and pad on the left (tokenizer.padding_side = 'left')"
        )
