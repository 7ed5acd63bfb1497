"""Probes of made-up models, for allocations that look at what heads do where a test has views and no model."""

from __future__ import annotations

import torch
from torch import nn

from evomem.managers.allocation import PROBES, HeadProbes, ProbedAllocation


def made_up(layers: int, heads: int, seed: int = 0) -> HeadProbes:
    """Return probes in [0, 1], most of them small."""
    values = torch.rand(layers * heads, len(PROBES), generator=torch.Generator().manual_seed(seed)) ** 4
    return HeadProbes(values, (heads,) * layers, f"{seed + 1:064x}")


def with_made_up_probes(module: nn.Module, layers: int, heads: int, seed: int = 0) -> nn.Module:
    """Return the module (an allocation, or a manager) after its allocations have taken `made_up` probes."""
    for part in module.modules():
        if isinstance(part, ProbedAllocation):
            part.keep_probes(made_up(layers, heads, seed))
    return module
