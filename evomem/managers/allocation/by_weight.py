"""Manager: whole slots for heads and layers by weights, whatever the weights come from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from evomem.managers.allocation.arithmetic import clamped_shares
from evomem.managers.selection import Ends
from evomem.memory.view import LayerView


def limits_by_weight(
    weights: Tensor, views: Sequence[LayerView], mean: Tensor, scores: Sequence[Tensor], sure: Tensor
) -> list[Tensor]:
    """Return the slots of every head of every layer: ``sure``, and of the rest a part in proportion to its weight.

    A head gets at most what it holds; what it cannot use goes to the others by their weights. The sum is
    heads of all layers x mean in every row, also where all heads hold less than that: then every head keeps all.

    Parameters
    ----------
    weights : (heads of all layers, batch or 1) float64 >= 0, layer by layer.
    views, scores : one a layer; scores (batch, kv_heads, slots), -inf at slots that may not stay.
    mean : (batch, 1, 1) int64, slots per head over all layers.
    sure : ([heads of all layers,] batch, 1, 1) int64, slots that every head is sure of if it holds them; at most the
        mean.

    Returns
    -------
    One (batch, kv_heads, 1) int64 a layer, on its view's device.
    """
    counts, device = [view.slots.shape[1] for view in views], weights.device
    usable = torch.cat([usable_slots(s).to(device) for s in scores], 1).transpose(0, 1)[..., None]
    mean, sure = mean.to(device), sure.to(device)
    least = torch.minimum(sure.expand(usable.shape), usable)
    parts = _shared(weights[..., None, None], least, usable, mean * sum(counts))[..., 0].transpose(0, 1)
    return [part.to(view.slots.device) for part, view in zip(torch.split(parts, counts, 1), views, strict=True)]


def layer_totals(
    weights: Tensor, views: Sequence[LayerView], mean: Tensor, scores: Sequence[Tensor], sure: Tensor
) -> list[Tensor]:
    """Return the slots of every layer, over all its heads, by one weight a layer; see `limits_by_weight`.

    Parameters
    ----------
    weights : (layers, batch or 1) float64 >= 0, of a head of the layer: layers with more heads get more.

    Returns
    -------
    One (batch, 1, 1) int64 a layer, on its view's device.
    """
    device, heads = weights.device, [view.slots.shape[1] for view in views]
    mean, sure = mean.to(device), sure.to(device)
    usable = [usable_slots(s).to(device) for s in scores]
    least = torch.stack([torch.minimum(sure, u).sum(1, keepdim=True) for u in usable])
    whole = torch.stack([u.sum(1, keepdim=True) for u in usable])
    by_layer = torch.stack([count * part for count, part in zip(heads, weights, strict=True)])[..., None, None]
    parts = _shared(by_layer, least, whole, mean * sum(heads))
    return [part.to(view.slots.device) for part, view in zip(parts, views, strict=True)]


def even_heads(
    weights: Tensor, views: Sequence[LayerView], mean: Tensor, scores: Sequence[Tensor], sure: Tensor
) -> list[Tensor]:
    """Return the slots of every head, by one weight a layer: the heads of a layer get the same number.

    Where the heads of some layer do not hold the same number of slots, equal parts cannot always add up to the budget:
    then every head takes part by itself with its layer's weight (`limits_by_weight`), and heads of a layer may differ
    by one slot, or by what they do not hold.

    Parameters
    ----------
    weights : (layers, batch or 1) float64 >= 0.

    Returns
    -------
    One (batch, kv_heads, 1) int64 a layer, on its view's device.
    """
    counts = [view.slots.shape[1] for view in views]
    each = torch.cat([part.expand(count, -1) for part, count in zip(weights[:, None], counts, strict=True)])
    uneven = limits_by_weight(each, views, mean, scores, sure)
    if len(set(counts)) > 1:
        return uneven
    device = weights.device
    usable = torch.stack([usable_slots(s).to(device) for s in scores])  # (layers, batch, kv_heads, 1)
    level = (usable == usable[:, :, :1]).all(2, keepdim=True).all(0)
    one, mean, sure = usable[:, :, :1], mean.to(device), sure.to(device)
    least = torch.minimum(sure.expand(one.shape), one)
    even = _shared(weights[..., None, None], least, one, mean * len(views))
    return [
        torch.where(level.to(part.device), layer.to(part.device), part)
        for layer, part in zip(even, uneven, strict=True)
    ]


def _shared(weights: Tensor, least: Tensor, usable: Tensor, total: Tensor) -> Tensor:
    """Return parts of a total: ``least`` and a part by weight, at most ``usable``; all of it where that is too little.

    weights (parts, batch or 1, 1, 1); least, usable (parts, batch, 1, 1) int64; total (batch, 1, 1) int64. The sum over
    the parts is the total in any case.
    """
    enough = usable.sum(0) >= total
    least = torch.where(enough, least, usable)
    most = torch.where(enough, usable, usable + total)
    return least + clamped_shares(weights, torch.zeros_like(least), most - least, total - least.sum(0))


def usable_slots(scores: Tensor) -> Tensor:
    """Return how many slots each head may keep: (batch, kv_heads, 1) int64.

    scores : (batch, kv_heads, slots), -inf at slots that may not stay.
    """
    return (scores != -torch.inf).sum(-1, keepdim=True)


def first_heads(values: Tensor, share: float) -> Tensor:
    """Mark the heads with the largest values: a share of them all, rounded up; of equal ones the first.

    values : (heads of all layers,). Returns bool of the same shape.
    """
    count = math.ceil(share * len(values) - 1e-9)
    order = torch.sort(values, descending=True, stable=True).indices
    return torch.zeros_like(values, dtype=torch.bool).index_fill(0, order[:count], True)


def ends_at(ends: Ends, mean: Tensor) -> Tensor:
    """Return the slots that protected ends take of a head with ``mean`` slots: int64 of its shape, at most the mean.

    It is at least `Ends.floor`, which counts one slot more than ends of a fixed size.
    """
    return torch.maximum(mean.clamp(max=ends.floor), ends.first(mean) + ends.window(mean))
