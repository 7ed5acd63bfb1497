"""Manager: from scores to a keep-mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from evomem.memory.view import LayerView


class Selection(Protocol):
    """Turns scores into a keep-mask; pure tensor arithmetic, so that it runs under `torch.func.vmap`."""

    def keep(self, scores: Tensor, view: LayerView) -> Tensor:
        """Return a bool mask of the scores' shape (batch, kv_heads, slots)."""
        ...


def best(scores: Tensor, n: Tensor) -> Tensor:
    """Mark the ``n`` best slots of every head; of equal scores, the older token comes first.

    scores : (..., slots) fp32. n : (..., 1) int64 that broadcasts against them. Returns bool of the scores' shape.
    """
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    among = torch.arange(scores.shape[-1], device=scores.device) < n
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, among.expand(order.shape))


def slots_of_budget(budget: int | float | None, view: LayerView) -> Tensor:
    """Slots per head that a budget allows: (batch, 1, 1) int64; a share is of the row's tokens read, rounded up."""
    read = view.seen - view.start[:, None, None]
    if budget is None:
        return read
    if isinstance(budget, int):
        return torch.full_like(read, budget)
    # In float64: fp32 would round 0.3 * 3000 up to 901 slots.
    return torch.ceil(read.double() * budget - 1e-6).long().clamp(min=1)


def share_of(share: float, n: Tensor) -> Tensor:
    """Whole slots in a share of ``n`` slots, rounded down: int64 of n's shape."""
    return torch.floor(n.double() * share + 1e-6).long()


def protect(scores: Tensor, view: LayerView, sinks: int | Tensor, recent: int | Tensor) -> Tensor:
    """Empty slots get -inf; the first ``sinks`` and the newest ``recent`` tokens get +inf.

    ``sinks`` and ``recent`` are counts or (batch, 1, 1) tensors. All other scores become finite (NaN and -inf the
    smallest number, +inf the largest), so that a slot that holds a token always comes before an empty one.
    """
    limits = torch.finfo(scores.dtype)
    scores = torch.nan_to_num(scores, nan=limits.min, posinf=limits.max, neginf=limits.min)
    scores = torch.where(view.valid, scores, -torch.inf)
    safe = view.age < recent
    if not (isinstance(sinks, int) and sinks == 0):
        safe = safe | (view.position < sinks)
    return torch.where(safe & view.valid, torch.inf, scores)


@dataclass(frozen=True)
class KeepAll:
    """Every slot that holds a token."""

    def keep(self, scores: Tensor, view: LayerView) -> Tensor:
        """Return the keep-mask (batch, kv_heads, slots)."""
        return view.valid


@dataclass(frozen=True)
class TopN:
    """The best slots of every head; the first ``sinks`` and the newest ``recent`` tokens come before all others.

    Attributes
    ----------
    budget : slots per head, see `slots_of_budget`.
    sinks : tokens protected at the row's beginning.
    recent : tokens protected at its end: a whole number, or a float as share of the budget (rounded down).
    recent_share : the protected end is at most this share of the budget (rounded down).

    Where the budget is too small for both ends, the sinks come first and the newest tokens get what is left.
    """

    budget: int | float | None
    sinks: int = 0
    recent: int | float = 0
    recent_share: float = 1.0

    def limit(self, view: LayerView) -> Tensor:
        """Return the slots per head that this layer may keep: (batch, 1, 1) int64."""
        return slots_of_budget(self.budget, view)

    def window(self, view: LayerView) -> Tensor:
        """Return how many of the newest tokens are protected: (batch, 1, 1) int64."""
        return self._window(self.limit(view))

    def _window(self, n: Tensor) -> Tensor:
        recent = share_of(self.recent, n) if isinstance(self.recent, float) else torch.full_like(n, self.recent)
        recent = torch.minimum(recent, share_of(self.recent_share, n))
        return torch.minimum(recent, n - n.clamp(max=self.sinks))

    def protected(self, scores: Tensor, view: LayerView) -> Tensor:
        """Return the scores with empty slots at -inf and protected tokens at +inf; see `protect`."""
        return self._protected(scores, view, self.limit(view))

    def _protected(self, scores: Tensor, view: LayerView, n: Tensor) -> Tensor:
        return protect(scores, view, n.clamp(max=self.sinks), self._window(n))

    def keep(self, scores: Tensor, view: LayerView) -> Tensor:
        """Return the keep-mask (batch, kv_heads, slots)."""
        n = self.limit(view)
        return best(self._protected(scores, view, n), n) & view.valid


def pyramid_budget(mean: Tensor, read: Tensor, layer: int, layers: int, beta: float, window: int) -> Tensor:
    """Slots per head of one layer, falling linearly from the first layer to the last (PyramidKV, arXiv 2406.02069).

    b_l = b_max - l (b_max - b_min) / (N - 1) with b_min = m/beta, b_max = 2m - b_min; where b_max >= L - w,
    b_max = L - w and b_min = 2m - b_max. Three things that the formula leaves open are settled here:

    * rounding: the first half of the layers is rounded to the nearest (halves up), layer N-1-l gets 2m - b_l and a
      middle layer m, so the sum over the layers is exactly m N and every b_l is within 1/2 of the formula;
    * b_min is at least one slot (m < beta would empty the last layer), b_max = 2m - b_min as before;
    * where the second case would turn the pyramid upside down (m > L - w), all layers get m.

    Parameters
    ----------
    mean :
        (...) int64, m, the mean number of slots per head over the layers.
    read :
        (...) int64, L, tokens of the row read so far.
    layer, layers :
        l and N.
    beta :
        Steepness, >= 1; 1 gives all layers m.
    window :
        w.

    Returns
    -------
    (...) int64.
    """
    m = mean.double()
    smallest = (m / beta).clamp(min=1.0)
    largest = 2 * m - smallest
    most = (read - window).double()
    largest = torch.where(largest >= most, most, largest)
    largest = torch.maximum(largest, m)
    smallest = 2 * m - largest
    mirrored = min(layer, layers - 1 - layer)
    upper = torch.floor(largest - mirrored * (largest - smallest) / max(layers - 1, 1) + 0.5).long()
    if 2 * layer == layers - 1:
        return mean
    return upper if 2 * layer < layers - 1 else 2 * mean - upper


@dataclass(frozen=True)
class PyramidTopN(TopN):
    """`TopN` with `pyramid_budget`: ``budget`` is the mean over the layers.

    Attributes
    ----------
    beta : steepness of the pyramid.
    observed : w of the formula, the length of the observation window.
    """

    beta: float = 20.0
    observed: int = 32

    def limit(self, view: LayerView) -> Tensor:
        """Return the slots per head that this layer may keep: (batch, 1, 1) int64."""
        read = view.seen - view.start[:, None, None]
        mean = slots_of_budget(self.budget, view)
        return pyramid_budget(mean, read, view.layer, view.layers, self.beta, self.observed)


@dataclass(frozen=True)
class AcrossHeads:
    """One ranking over all heads of the layer instead of one a head (AdaKV, arXiv 2407.11550, algorithm 1).

    With n slots per head allowed by ``per_head`` and H heads, the layer keeps n H slots (or all that it holds). Every
    head keeps its floor(safeguard n) best for certain, the rest goes to the best of the layer. What ``per_head``
    protects comes before all others. Equal scores rank by position, then by head.

    Attributes
    ----------
    per_head : budget and protected tokens.
    safeguard : share of n that every head is sure of.
    """

    per_head: TopN
    safeguard: float = 0.2

    def keep(self, scores: Tensor, view: LayerView) -> Tensor:
        """Return the keep-mask (batch, kv_heads, slots)."""
        n = self.per_head.limit(view)
        scores = self.per_head.protected(scores, view)
        safe = best(scores, share_of(self.safeguard, n)) & view.valid
        # At most n a head are safe or protected (`TopN` sees to that), so all of them fit into the layer's total.
        ordered = torch.where(safe, torch.inf, scores)
        order = torch.sort(view.slots.flatten(-2), dim=-1, stable=True).indices
        flat = ordered.flatten(-2)
        order = order.expand(flat.shape)
        by_score = torch.sort(flat.gather(-1, order), dim=-1, descending=True, stable=True).indices
        order = order.gather(-1, by_score)
        places = torch.arange(order.shape[-1], device=order.device).expand(order.shape)
        ranks = torch.zeros_like(order).scatter(-1, order, places).reshape(scores.shape)
        return (ranks < n * scores.shape[-2]) & view.valid


@dataclass(frozen=True)
class Threshold:
    """Keep where the score is >= 0, and always the newest token (NAMM, arXiv 2410.13166); heads are independent.

    Attributes
    ----------
    cap : slots per head at most, the best first, the newest token before all; None: no cap. A share as in `TopN`.
    """

    cap: int | float | None = None

    def keep(self, scores: Tensor, view: LayerView) -> Tensor:
        """Return the keep-mask (batch, kv_heads, slots)."""
        scores = protect(scores, view, sinks=0, recent=1)
        kept = scores >= 0
        if self.cap is None:
            return kept
        return kept & best(scores, slots_of_budget(self.cap, view))


@dataclass(frozen=True)
class Dense:
    """Every head of the batch keeps as many slots as the greediest: its own K best, K = max over heads of #{s >= 0}.

    What the reference implementation of NAMM does, because its cache is one tensor; for parity only. The newest token
    is kept in any case.
    """

    def keep(self, scores: Tensor, view: LayerView) -> Tensor:
        """Return the keep-mask (batch, kv_heads, slots)."""
        scores = protect(scores, view, sinks=0, recent=1)
        most = (scores >= 0).sum(-1).amax()
        return best(scores, most) & view.valid
