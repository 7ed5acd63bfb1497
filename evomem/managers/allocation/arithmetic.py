"""Manager: the arithmetic of allocations: whole slots by shares, with floors and ceilings, and an exact total."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from evomem.managers.selection import tokens_read
from evomem.memory.view import LayerView
from evomem.modes import outside_inference_mode

logger = logging.getLogger("evomem")


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


def slots_at_most(view: LayerView) -> Tensor:
    """Return the slots that a head of every layer can hold: (layers or 1, batch, 1, 1) int64.

    These are the tokens read less what decisions took; what left at one decision cannot be held at a later one.
    """
    read = tokens_read(view)[None]
    return read if view.evicted is None else read - view.evicted.transpose(0, 1)[..., None, None]


def depth_limits(log_shares: Tensor, view: LayerView, mean: Tensor, floor: int) -> Tensor:
    """Return the slots per head of every layer, whose share of the budget is exp(g(depth)).

    Shares are rounded by their running sum, so that the layers' slots add up to N times the mean.

    Parameters
    ----------
    log_shares : (batch or 1, points of depth).
    mean : (batch, 1, 1) int64, the mean over the layers.
    floor : slots that every layer keeps, unless the mean itself is less.

    Returns
    -------
    (layers, batch, 1, 1) int64.
    """
    layers = view.layers
    logs = torch.nan_to_num(interpolated(log_shares.transpose(0, 1), layers))
    weights = torch.softmax(logs.double(), 0)
    until = (weights.cumsum(0) * layers)[..., None, None]
    rounded = torch.round(mean * until).long()
    parts = torch.diff(rounded, dim=0, prepend=torch.zeros_like(rounded[:1]))
    return water_fill(parts, weights[..., None, None], mean, floor, slots_at_most(view))


@cache
def say_other_shape(name: str, known: str, here: str) -> None:
    """Warn, once a process and shape, that numbers of an allocation are those of a model of another shape."""
    logger.warning(
        "allocation %r: its numbers are for %s, and this model has %s: they are interpolated in depth, and where the "
        "number of heads is another, a head gets the mean of its layer. Give the allocation the sizes of this model, "
        "and search its numbers there, or do without",
        name, known, here,
    )  # fmt: skip


def interpolated(knots: Tensor, layers: int) -> Tensor:
    """Return a piecewise linear function, given at equally spaced knots (knots, ...), at every layer: (layers, ...)."""
    count = knots.shape[0]
    if count == 1:
        return knots.expand(layers, *knots.shape[1:])
    index, share, rest = _between(count, layers, knots.device)
    shape = (layers, *[1] * (knots.dim() - 1))
    return knots[index] * rest.reshape(shape) + knots[index + 1] * share.reshape(shape)


@cache
def _between(count: int, layers: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return every layer's knot below, and the weights of the knot above and below: (layers,) each. Made once."""
    at = [layer / (layers - 1) * (count - 1) if layers > 1 else 0.0 for layer in range(layers)]
    low = [min(int(place), count - 2) for place in at]
    share = [place - knot for place, knot in zip(at, low, strict=True)]
    with outside_inference_mode():
        weights = torch.tensor([share, [1 - s for s in share]], dtype=torch.float32, device=device)
        return torch.tensor(low, dtype=torch.int64, device=device), weights[0], weights[1]


def water_fill(parts: Tensor, weights: Tensor, mean: Tensor, floor: int, most: Tensor) -> Tensor:
    """Return whole slots of every layer that add up to layers x mean and respect a floor and what can be held.

    Where no bound binds in a row, that is ``parts``. Else layer l gets clamp(λ w_l, floor, most_l) with the λ that
    makes the sum right: what a floor takes and a ceiling leaves is shared by the others as before. Found at the kinks
    of Σ_l clamp(λ w_l, …), which is piecewise linear in λ; rounded by the running sum, in whole numbers.

    Parameters
    ----------
    parts : (layers, batch or 1, 1, 1) int64 whose sum is layers x mean.
    weights : the same shape, float64 >= 0.
    mean : (batch or 1, 1, 1) int64.
    floor : a floor above the mean, or above what can be held, counts as that.
    most : ([layers or 1,] batch or 1, 1, 1) int64, see `slots_at_most`. Where the layers together can hold fewer than
        the budget, fewer than the mean count as the mean.

    Returns
    -------
    (layers, batch, 1, 1) int64.
    """
    layers = parts.shape[0]
    most = most.expand(layers, *most.shape[-3:])
    total = mean * layers
    most = torch.where(most.sum(0) >= total, most, torch.maximum(mean, most))
    least = torch.minimum(mean.clamp(max=floor), most)
    bound = ((parts < least) | (parts > most)).any(0)
    return torch.where(bound, clamped_shares(weights, least, most, total), parts)


_BITS = 4
_BRANCHES = 1 << _BITS
"""Kinks that are tried at once: fewer steps than by halves, whose cost is that of calling at all."""


def clamped_shares(weights: Tensor, least: Tensor, most: Tensor, total: Tensor) -> Tensor:
    """Return whole numbers that add up to a total: clamp(λ w, least, most) with the λ that makes the sum right.

    The sum is piecewise linear in λ and bends where a part meets a bound. O(parts log parts): the bends are sorted, and
    the one below the total is searched for.

    Parameters
    ----------
    weights : (parts, batch or 1, 1, 1) float64 >= 0.
    least, most : ([parts,] batch, 1, 1) int64, whose sums over the parts are at most and at least the total.
    total : (batch, 1, 1) int64.

    Returns
    -------
    (parts, batch, 1, 1) int64.
    """
    low, high, w = least.double(), most.double(), weights.clamp(min=1e-200)
    target = (total + torch.zeros_like(weights[0])).double()

    def parts(scales: Tensor) -> Tensor:
        """Return clamp(λ w, low, high) for several λ (scales, batch, 1, 1): (scales, parts, batch, 1, 1)."""
        return torch.minimum(torch.maximum(scales[:, None] * w, low), high)

    kinks = torch.cat([low / w, high / w, torch.zeros_like(target)[None], torch.full_like(target, 1e300)[None]])
    kinks = torch.sort(kinks, dim=0).values
    last = kinks.shape[0] - 1
    # The last kink at which the sum, which never falls, is at most the total: a search in steps of _BRANCHES.
    below = torch.zeros_like(target, dtype=torch.int64)
    ahead = torch.arange(1, _BRANCHES, device=w.device).reshape(-1, *[1] * below.dim())
    stride = _BRANCHES ** ((last.bit_length() - 1) // _BITS)
    while stride:
        tried = kinks.gather(0, (below + ahead * stride).clamp(max=last))
        reached = (parts(tried).sum(1) <= target).sum(0)
        below = (below + reached * stride).clamp(max=last)
        stride //= _BRANCHES
    ends = torch.stack([below, (below + 1).clamp(max=last)])
    small, large = parts(kinks.gather(0, ends)).unbind(0)
    gap = (large - small).sum(0)
    share = torch.where(gap > 0, (target - small.sum(0)) / gap, 0.0).clamp(0, 1)
    # In units of 2^-20 slots everything is exact, and a sum of parts that are within the bounds rounds within them.
    units = torch.round((small + share * (large - small)) * 2**20).long().cumsum(0)
    rounded = (units + 2**19) >> 20
    return torch.diff(rounded, dim=0, prepend=torch.zeros_like(rounded[:1]))
