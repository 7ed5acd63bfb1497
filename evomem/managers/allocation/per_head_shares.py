"""Manager: an allocation over the heads of all layers at once, by one learned share a head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from evomem.bounds import UNITS
from evomem.managers.allocation.arithmetic import interpolated, say_other_shape
from evomem.managers.allocation.base import AllocationOptions, ModelAllocation, register_allocation
from evomem.managers.allocation.by_weight import limits_by_weight
from evomem.managers.selection import Ends
from evomem.memory.view import LayerView


class PerHeadSharesOptions(AllocationOptions):
    """Options of `PerHeadShares`."""

    heads: int = Field(ge=1, le=UNITS, description="KV heads that have log-shares of their own")
    layers: int | None = Field(default=None, ge=1, le=UNITS, description="one log-share a layer and head")
    points: int | None = Field(
        default=None, ge=1, le=UNITS, description="one log-share a head at so many points of depth, linear in between"
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.layers is None) == (self.points is None):
            raise ValueError("give either layers (a number for every layer) or points (of depth)")
        return self


@register_allocation("per_head_shares")
class PerHeadShares(ModelAllocation):
    """Gives head h of layer l a share proportional to exp(θ[l, h]) of what all heads of all layers have together.

    Every head first gets what the protected ends need and one slot more (at most the mean); the rest is shared out by
    the softmax of θ over all layers and heads. A head gets at most what it holds, and what it cannot use goes to the
    others by their shares. The sum is heads of all layers x mean in every row.

    θ is one learned number a layer and head (``layers=``), or a function of depth and head with few numbers
    (``points=``). On a model with another number of layers either is interpolated linearly in depth; where the number
    of KV heads is another, every head gets the heads' mean; both are said in a warning, but not that points are
    interpolated, which is what they are for. At first all numbers are 0: equal shares.
    """

    Options = PerHeadSharesOptions
    parameter_options = frozenset({"layers", "points"})
    options: PerHeadSharesOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        knots = self.options.layers or self.options.points or 1
        self.log_shares = nn.Parameter(torch.zeros(knots, self.options.heads, dtype=torch.float32))

    def limits(
        self,
        views: Sequence[LayerView],
        means: Sequence[Tensor],
        scores: Sequence[Tensor],
        ends: Ends,
        shares: Tensor | None = None,
    ) -> list[Tensor]:
        """Return the slots of every head, as a list of (batch, kv_heads, 1) int64, each on its view's device."""
        logs = self.log_shares_of([view.slots.shape[1] for view in views], views[0].slots.device)
        weights = torch.softmax(logs.double(), 0)[:, None]
        return limits_by_weight(weights, views, means[0], scores, means[0].clamp(max=ends.floor))

    def log_shares_of(self, counts: Sequence[int], device: torch.device) -> Tensor:
        """Return θ for a model whose layers have so many heads: (heads of all layers,), layer by layer."""
        layers, known_heads = self.options.layers, self.options.heads
        if (layers is not None and layers != len(counts)) or any(heads != known_heads for heads in counts):
            known = (
                f"{layers} layers of {known_heads} KV heads"
                if layers is not None
                else f"layers of {known_heads} KV heads"
            )
            several = " or ".join(map(str, sorted(set(counts))))
            say_other_shape(self.name, known, f"{len(counts)} layers of {several}")
        knots = torch.nan_to_num(self.log_shares.float().to(device))
        logs = knots if knots.shape[0] == len(counts) else interpolated(knots, len(counts))
        return torch.cat(
            [
                row if heads == known_heads else row.mean(0, keepdim=True).expand(heads)
                for row, heads in zip(logs, counts, strict=True)
            ]
        )
