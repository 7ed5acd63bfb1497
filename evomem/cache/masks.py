"""Cache: masks worked out from what the slots hold."""

from __future__ import annotations

import torch
from torch import Tensor


def slot_mask(
    slots: Tensor,
    index: Tensor,
    *,
    uniform: bool = False,
    decays: Tensor | None = None,
    window: int | None = None,
    padding: Tensor | None = None,
    real: Tensor | None = None,
) -> Tensor:
    """Which slots every query may attend to.

    Parameters
    ----------
    slots : (batch, kv_heads, slots) int64, token index held, -1 = empty.
    index : (queries,) int64, token index of the queries.
    uniform : all rows and heads hold the same, so one mask does for all.
    decays : (batch, kv_heads, slots) log-decay to be added, or None.
    window : sliding window, in tokens.
    padding : (batch, tokens ever read) bool, True = visible now. It may hide a token that was visible when it was read.
    real : (batch, queries) bool, which queries are no padding; None when all are.

    Returns
    -------
    (1 or batch, 1 or kv_heads, queries, slots): bool, or with decays additive fp32 (-inf where not allowed).
    """
    index = index[:, None]
    held = slots[:1, :1, None] if uniform else slots[:, :, None]
    allowed = (held >= 0) & (held <= index)
    if window is not None:
        allowed = allowed & (held > index - window)
    if padding is not None:
        allowed = allowed & _visible(slots, padding)[:, :, None]
        if real is not None:
            # A padded query sees everything: its output is never used, but it must be finite.
            allowed = allowed | ~real[:, None, :, None]
    if decays is None:
        return allowed
    return torch.where(allowed, decays[:, :, None], -torch.inf)


def hides(slots: Tensor, padding: Tensor) -> bool:
    """Whether ``padding`` (batch, tokens ever read) hides a token that the slots (batch, kv_heads, slots) hold."""
    return not bool((_visible(slots, padding) | (slots < 0)).all())


def _visible(slots: Tensor, padding: Tensor) -> Tensor:
    return padding[:, None].expand(-1, slots.shape[1], -1).gather(2, slots.clamp(min=0))
