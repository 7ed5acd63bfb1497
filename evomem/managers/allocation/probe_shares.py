"""Manager: an allocation by what every head does on synthetic text; nothing of it is searched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from evomem.bounds import TOKENS
from evomem.managers.allocation.base import AllocationOptions, ModelAllocation, register_allocation
from evomem.managers.allocation.by_weight import limits_by_weight
from evomem.managers.allocation.probed import ProbedAllocation
from evomem.managers.allocation.probes import PROBES
from evomem.managers.selection import Ends
from evomem.memory.view import LayerView

OFFSET = 1e-3
"""Added to a probe before its logarithm is taken."""


class ProbeSharesOptions(AllocationOptions):
    """Options of `ProbeShares`."""

    probe: Literal["induction", "echo", "retrieval", "beyond_window"] = Field(
        default="induction", description="what heads that get more do on synthetic text"
    )
    power: float = Field(
        default=0.5, ge=0, le=16, description="how unequal the shares are: (probe + .001) to this power"
    )
    least: int = Field(
        default=0, ge=0, le=TOKENS, description="slots that every head gets first, if protected ends need fewer"
    )


@register_allocation("probe_shares")
class ProbeShares(ProbedAllocation, ModelAllocation):
    """Gives every head of every layer a share proportional to (probe + .001)^power, a probe of the model's own heads.

    A few heads of a model do induction, and these need the slots: shares softmax(power log(probe + .001)) over all
    layers and heads. Every head first gets what the protected ends need and one slot more, or ``least``; no head gets
    more than it holds (`limits_by_weight`). On another model its heads are measured first.
    """

    Options = ProbeSharesOptions
    options: ProbeSharesOptions

    def limits(
        self,
        views: Sequence[LayerView],
        means: Sequence[Tensor],
        scores: Sequence[Tensor],
        ends: Ends,
        shares: Tensor | None = None,
    ) -> list[Tensor]:
        """Return the slots of every head, as a list of (batch, kv_heads, 1) int64, each on its view's device."""
        values = self.head_values([view.slots.shape[1] for view in views], views[0].slots.device)
        probe = values[:, PROBES.index(self.options.probe)]
        weights = torch.softmax(self.options.power * torch.log(probe.double() + OFFSET), 0)[:, None]
        sure = means[0].clamp(max=max(ends.floor, self.options.least))
        return limits_by_weight(weights, views, means[0], scores, sure)
