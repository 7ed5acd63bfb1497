"""Manager: the best slots of a head, and the ends of a text that come before all others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from evomem.memory.view import LayerView


def best(scores: Tensor, n: Tensor) -> Tensor:
    """Mark the ``n`` best slots of every head; of equal scores, the older token comes first.

    scores : (..., slots) fp32. n : (..., 1) int64 that broadcasts against them. Returns bool of the scores' shape.
    """
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    first = torch.arange(scores.shape[-1], device=scores.device) < n
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, first.expand(order.shape))


def tokens_read(view: LayerView) -> Tensor:
    """Return how many tokens every row has read, padding not counted: (batch, 1, 1) int64."""
    return view.seen - view.start[:, None, None]


def slots_of_budget(budget: int | float | None, view: LayerView) -> Tensor:
    """Return the slots per head that a budget allows: (batch, 1, 1) int64.

    A share is of the tokens that the row has read, rounded up; without a budget all of them may stay.
    """
    read = tokens_read(view)
    if budget is None:
        return read
    if isinstance(budget, int):
        return torch.full_like(read, budget)
    # In float64: fp32 would round 0.3 * 3000 up to 901 slots.
    return torch.ceil(read.double() * budget - 1e-6).long().clamp(min=1)


def share_of(share: float, n: Tensor) -> Tensor:
    """Return the whole slots in a share of ``n`` slots, rounded down: int64 of n's shape."""
    return torch.floor(n.double() * share + 1e-6).long()


def finite(scores: Tensor) -> Tensor:
    """Scores whose order is the same and none of which is infinite; NaN becomes the smallest number."""
    limits = torch.finfo(scores.dtype)
    return torch.nan_to_num(scores, nan=limits.min, posinf=limits.max, neginf=limits.min)


@dataclass(frozen=True)
class Ends:
    """Tokens at both ends of a row that are kept before all others.

    Attributes
    ----------
    sinks : tokens protected at the row's beginning: a whole number, or a float as share of the head's slots (rounded
        down).
    recent : tokens protected at its end, likewise.
    recent_share : the protected end is at most this share of the head's slots (rounded down).

    Where a head has too few slots for both ends, the sinks come first and the newest tokens get what is left.
    """

    sinks: int | float = 0
    recent: int | float = 0
    recent_share: float = 1.0

    @property
    def floor(self) -> int:
        """Slots that a head needs for its protected ends and one slot more. Ends that are shares of the slots fit."""
        sinks = self.sinks if isinstance(self.sinks, int) else 0
        recent = self.recent if isinstance(self.recent, int) and self.recent_share == 1 else 0
        return sinks + recent + 1

    @property
    def by_share(self) -> bool:
        """Whether a protected end depends on the number of a head's slots wherever they have room for both ends."""
        return isinstance(self.sinks, float) or isinstance(self.recent, float) or self.recent_share < 1

    def first(self, n: Tensor) -> Tensor:
        """Return how many of the first tokens are protected among ``n`` slots: int64 of n's shape."""
        return share_of(self.sinks, n) if isinstance(self.sinks, float) else n.clamp(max=self.sinks)

    def window(self, n: Tensor) -> Tensor:
        """Return how many of the newest tokens are protected among ``n`` slots: int64 of n's shape."""
        rest = n - self.first(n) if self.sinks else n
        if isinstance(self.recent, float):
            rest = torch.minimum(rest, share_of(self.recent, n))
        if self.recent_share < 1:
            rest = torch.minimum(rest, share_of(self.recent_share, n))
        return rest.clamp(max=self.recent) if isinstance(self.recent, int) else rest

    def safe(self, view: LayerView, n: Tensor) -> Tensor:
        """Mark the protected slots where a head may keep ``n``: bool (batch, kv_heads, slots), also empty slots."""
        safe = view.age < self.window(n)
        return safe | (view.position < self.first(n)) if self.sinks else safe

    def mark(self, scores: Tensor, view: LayerView, candidates: Tensor, n: Tensor) -> Tensor:
        """Return scores whose order is the order in which slots are kept: (batch, kv_heads, slots).

        Protected slots get +inf, and slots that are no ``candidates`` get -inf. All others become finite (NaN and -inf
        the smallest number, +inf the largest), so that a slot that may stay always comes before one that may not.
        """
        scores = torch.where(candidates, finite(scores), -torch.inf)
        return torch.where(self.safe(view, n) & candidates, torch.inf, scores)
