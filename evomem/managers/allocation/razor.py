"""Manager: the allocation of RazorAttention: heads that do induction or echo keep everything first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from evomem.bounds import LARGE
from evomem.managers.allocation.base import AllocationOptions, ModelAllocation, register_allocation
from evomem.managers.allocation.by_weight import ends_at, first_heads, limits_by_weight
from evomem.managers.allocation.probed import ProbedAllocation
from evomem.managers.selection import Ends
from evomem.memory.view import LayerView


class RazorOptions(AllocationOptions):
    """Options of `Razor`."""

    induction: float = Field(default=0.14, ge=0, le=1, description="share of heads that are kept for induction")
    echo: float = Field(default=0.01, ge=0, le=1, description="share of heads that are kept for echo")
    compression: float = Field(
        default=5.0, ge=1, le=LARGE, description="how many times fewer slots the other heads get"
    )


@register_allocation("razor")
class Razor(ProbedAllocation, ModelAllocation):
    """Gives retrieval heads everything, and the others a fraction (RazorAttention, Tang et al., arXiv 2407.15891).

    Retrieval heads are the ``induction`` share of all KV heads that does most induction on random tokens that repeat,
    and the ``echo`` share that does most echo (section 3.2; 14 % and 1 % as published; at least one head of a share
    above 0). The others keep sinks and the newest N / C of N tokens (algorithm 1; C is ``compression``, 5 as
    published). ``streaming_llm(allocation=razor)`` keeps that, any other scorer its own choice of as many.

    Different from the paper: a budget is given. Every head first gets what protected ends take at the mean; of the rest
    a retrieval head gets C times as much as another, until it holds everything, and then the others get more. So at the
    budget that the paper's own rule makes it is that rule, and below it both kinds shrink by the same factor. Which
    heads are which is measured on the model itself (`HeadProbes`), by the query head of the group that does it most.
    There is no compensation token for what a head lets go, and no least buffer of 4,000 tokens.
    """

    Options = RazorOptions
    options: RazorOptions

    def limits(
        self,
        views: Sequence[LayerView],
        means: Sequence[Tensor],
        scores: Sequence[Tensor],
        ends: Ends,
        shares: Tensor | None = None,
    ) -> list[Tensor]:
        """Return the slots of every head, as a list of (batch, kv_heads, 1) int64."""
        kept = first_heads(self.probe("induction", views), self.options.induction)
        kept = kept | first_heads(self.probe("echo", views), self.options.echo)
        weights = torch.where(kept, 1.0, 1 / self.options.compression).double()[:, None]
        return limits_by_weight(weights, views, means[0], scores, ends_at(ends, means[0]))
