"""Slow path: shares between bounds, with the sum worked out at every place at which it bends."""

from __future__ import annotations

import torch
from torch import Tensor


def quadratic_shares(weights: Tensor, least: Tensor, most: Tensor, total: Tensor) -> Tensor:
    """What `evomem.managers.allocation.clamped_shares` must equal; O(parts²), a kink at a time."""
    low, high, w = least.double(), most.double(), weights.clamp(min=1e-200)
    target = (total + torch.zeros_like(weights[0])).double()
    kinks = torch.cat([low / w, high / w, torch.zeros_like(target)[None], torch.full_like(target, 1e300)[None]])
    sums = torch.cat([torch.minimum(torch.maximum(part[:, None] * w, low), high).sum(1) for part in kinks.split(64)])
    below = torch.where(sums <= target, kinks, 0.0).amax(0)
    above = torch.where(sums >= target, kinks, 1e300).amin(0)
    small, large = (torch.minimum(torch.maximum(end * w, low), high) for end in (below, above))
    gap = (large - small).sum(0)
    share = torch.where(gap > 0, (target - small.sum(0)) / gap, 0.0).clamp(0, 1)
    units = torch.round((small + share * (large - small)) * 2**20).long().cumsum(0)
    rounded = (units + 2**19) >> 20
    return torch.diff(rounded, dim=0, prepend=torch.zeros_like(rounded[:1]))
