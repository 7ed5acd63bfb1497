"""Manager: the allocation of LAVa: layers by the entropy of their scores, heads by one ranking."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional

from evomem.bounds import NEIGHBOURS
from evomem.managers.allocation.base import AllocationOptions, ModelAllocation, recorded_for, register_allocation
from evomem.managers.allocation.by_weight import ends_at, layer_totals
from evomem.managers.allocation.over_heads import heads_by_ranking
from evomem.managers.selection import Ends
from evomem.memory.view import LayerView


def lava_scores(attention: Tensor, values: Tensor, before: Tensor, kernel: int) -> Tensor:
    """Return LAVa's scores, s[i] = max_k ‖v_k‖₁ · a[i], which bound what a slot's loss does to the layer's output.

    Parameters
    ----------
    attention : (batch, kv_heads, slots), a: the mean attention of the last queries, the largest of the group.
    values : (batch, kv_heads, slots, head_dim).
    before : (batch, kv_heads, slots) bool, the slots before the window of those queries; others score 0.
    kernel : neighbouring slots among which the largest attention is taken; odd.

    Returns
    -------
    (batch, kv_heads, slots) fp32.
    """
    largest = functional.max_pool1d(torch.where(before, attention.float(), 0.0), kernel, stride=1, padding=kernel // 2)
    norm = torch.where(before, values.float().abs().sum(-1), 0.0).amax(-1, keepdim=True)
    return torch.where(before, largest * norm, 0.0)


class LavaOptions(AllocationOptions):
    """Options of `Lava`."""

    window: int = Field(default=32, ge=1, le=NEIGHBOURS, description="last queries whose attention is looked at")
    kernel: int = Field(
        default=7, ge=1, le=NEIGHBOURS, description="neighbouring slots among which the largest attention counts; odd"
    )
    safeguard: float = Field(default=0.0, ge=0, le=1, description="share of its layer's mean that a head is sure of")

    @field_validator("kernel")
    @classmethod
    def _odd(cls, kernel: int) -> int:
        if kernel % 2 == 0:
            raise ValueError("give an odd number, so that the largest is taken around the token")
        return kernel


@register_allocation("lava")
class Lava(ModelAllocation):
    """Shares slots among layers by the entropy of LAVa's scores, and among a layer's heads by one ranking of all.

    LAVa (Shen et al., arXiv 2509.09754): with ŝ the scores of `lava_scores` of all heads and slots before the window,
    divided by their sum, the layer's entropy is e_l = -Σ ŝ log ŝ / log(number of slots). A layer gets what protected
    ends take at the mean, for LAVa's own ranking its window in every head, and of the rest the share e_l / Σe. The
    layer's slots go to the best of the layer by the scorer's scores (as in `AcrossHeads`), whichever scorer that is.

    Different from the paper: what a layer cannot hold goes to the others by their entropies; layers are compared when
    all of them have read, and not compressed again whenever another one has, which ends at the same slots; a
    ``safeguard`` may be given, which LAVa does without. In `streaming` the entropy is over the slots that are held.
    """

    Options = LavaOptions
    options: LavaOptions

    @property
    def observes(self) -> frozenset[str]:
        """The window's mean attention, of the query head that pays a slot most."""
        return frozenset({f"window_group_peak:{self.options.window}"})

    def entropies(self, views: Sequence[LayerView]) -> Tensor:
        """Return e of every layer: (layers, batch) float64 in [0, 1], on the first view's device."""
        window, device = self.options.window, views[0].slots.device
        parts = []
        for view in views:
            attention = recorded_for(self, view, f"window_group_peak:{window}")
            before = view.valid & (view.age >= window)
            scores = lava_scores(attention, view.values, before, self.options.kernel).double()
            share = scores / scores.sum((1, 2), keepdim=True).clamp(min=1e-300)
            entropy = -torch.special.xlogy(share, share).sum((1, 2))
            # One slot, or none, has nothing to share: its entropy is 0, whatever it is divided by.
            parts.append((entropy / before.sum((1, 2)).clamp(min=2).double().log()).to(device))
        return torch.stack(parts)

    def limits(
        self,
        views: Sequence[LayerView],
        means: Sequence[Tensor],
        scores: Sequence[Tensor],
        ends: Ends,
        shares: Tensor | None = None,
    ) -> list[Tensor]:
        """Return the slots of every head, as a list of (batch, kv_heads, 1) int64."""
        totals = layer_totals(self.entropies(views), views, means[0], scores, ends_at(ends, means[0]))
        limits = []
        for view, mean, score, total in zip(views, means, scores, totals, strict=True):
            candidates = score != -torch.inf
            marked = ends.mark(score, view, candidates, mean)
            limits.append(heads_by_ranking(marked, view.slots, candidates, total, self.options.safeguard))
        return limits

    def ends_within(self, limits: Tensor, mean: Tensor) -> Tensor:
        """Return the mean: every head protects the same tokens, however few slots it gets beyond them."""
        return mean
