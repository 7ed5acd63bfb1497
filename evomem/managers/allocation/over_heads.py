"""Manager: the allocation that shares out a layer's budget over its heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from evomem.errors import ConfigError
from evomem.managers.allocation.base import (
    Allocation,
    AllocationOptions,
    LayerAllocation,
    build_allocation,
    register_allocation,
)
from evomem.managers.selection import Ends, best, share_of
from evomem.memory.view import LayerView


class AcrossHeadsOptions(AllocationOptions):
    """Options of `AcrossHeads`."""

    layers: dict[str, Any] = Field(
        default="uniform",
        validate_default=True,
        description="allocation over the layers: uniform, pyramid(...), depth_shares(...)",
    )
    safeguard: float = Field(default=0.2, ge=0, le=1, description="share of the budget that every head is sure of")

    @field_validator("layers", mode="before")
    @classmethod
    def _describe(cls, layers: Any) -> dict[str, Any]:
        """Turn any spec into the full description."""
        if not isinstance(layers, str | Mapping | int):
            raise ValueError('give an allocation over the layers, e.g. "pyramid(beta=20)"')
        return build_allocation(layers).describe()


@register_allocation("across_heads")
class AcrossHeads(LayerAllocation):
    """Shares a layer's slots among its heads by one ranking of all (AdaKV, Feng et al., arXiv 2407.11550, alg. 1).

    With n slots per head given by ``layers`` and H heads, the layer keeps n H slots (or all that it holds). Every head
    keeps its ⌊safeguard n⌋ best for certain, the rest goes to the best of the layer. What the scorer protects comes
    before all others. Equal scores rank by position, then by head. What a head cannot fill of its ⌊safeguard n⌋ is
    shared with the rest. With a safeguard of 1 nothing is shared: that is ``layers`` alone.
    """

    Options = AcrossHeadsOptions
    options: AcrossHeadsOptions
    layers: LayerAllocation

    @property
    def by_depth(self) -> bool:  # type: ignore[override]
        """Whether the allocation over the layers is by depth."""
        return self.layers.by_depth

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        layers = build_allocation(self.options.layers)
        if isinstance(layers, AcrossHeads) or not isinstance(layers, LayerAllocation):
            raise ConfigError(
                f"allocation 'across_heads': layers: {layers.name!r} is no allocation over layers, so nothing is left "
                "to share among heads; use uniform, pyramid or depth_shares"
            )
        self.layers = layers

    def over(self, layers: Allocation) -> AcrossHeads:
        """Return the allocation with another one over the layers; `ConfigError` if that is none over layers."""
        return AcrossHeads(layers=layers.describe(), safeguard=self.options.safeguard)

    @property
    def observes(self) -> frozenset[str]:
        """What the allocation over the layers observes."""
        return self.layers.observes

    def shares(self) -> Tensor | None:
        """Return what the allocation over the layers learns."""
        return self.layers.shares()

    def take_shares(self) -> nn.Parameter | None:
        """Hand over what the allocation over the layers learns."""
        return self.layers.take_shares()

    def layer_limit(self, view: LayerView, mean: Tensor, ends: Ends, shares: Tensor | None = None) -> Tensor:
        """Return what the allocation over the layers gives."""
        return self.layers.layer_limit(view, mean, ends, shares)

    def layer_limits(self, view: LayerView, mean: Tensor, ends: Ends, shares: Tensor | None = None) -> Tensor:
        """Return what the allocation over the layers gives every layer."""
        return self.layers.layer_limits(view, mean, ends, shares)

    def head_limits(self, marked: Tensor, view: LayerView, candidates: Tensor, n: Tensor) -> Tensor:
        """Return how many of the layer's n H best are each head's: (batch, kv_heads, 1) int64."""
        if self.options.safeguard == 1:  # also where a head cannot fill its slots, the others do not get them
            return n
        return heads_by_ranking(marked, view.slots, candidates, n * view.slots.shape[1], self.options.safeguard)


def heads_by_ranking(marked: Tensor, slots: Tensor, candidates: Tensor, total: Tensor, safeguard: float) -> Tensor:
    """Return how many of a layer's ``total`` best are each head's: (batch, kv_heads, 1) int64, which add up to it.

    Parameters
    ----------
    marked : (batch, kv_heads, slots), the scores after `Ends.mark`. Equal ones rank by position, then by head.
    slots : (batch, kv_heads, slots) int64, the tokens that the slots hold.
    candidates : (batch, kv_heads, slots) bool, slots that may stay.
    total : (batch, 1, 1) int64, slots of the layer, n a head.
    safeguard : every head keeps its ⌊safeguard n⌋ best for certain.
    """
    heads, count = marked.shape[1:]
    safe = best(marked, share_of(safeguard, total // heads)) & candidates
    # At most n a head are safe or protected (`Ends` sees to that), so all of them fit into the layer's total.
    ordered = torch.where(safe, torch.inf, marked)
    order = torch.sort(slots.flatten(-2), dim=-1, stable=True).indices
    flat = ordered.flatten(-2)
    order = order.expand(flat.shape)
    by_score = torch.sort(flat.gather(-1, order), dim=-1, descending=True, stable=True).indices
    order = order.gather(-1, by_score)
    ranks_of_all = torch.arange(order.shape[-1], device=order.device).expand(order.shape)
    ranks = torch.zeros_like(order).scatter(-1, order, ranks_of_all).reshape(ordered.shape)
    # Slots that the layer has not got are counted too, so that the heads' limits add up to the total.
    more = (total - heads * count).clamp(min=0)
    first = torch.arange(heads, device=order.device)[:, None] < more % heads
    return (ranks < total).sum(-1, keepdim=True) + more // heads + first
