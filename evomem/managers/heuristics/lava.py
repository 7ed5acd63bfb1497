"""Manager: what the last queries attend to, weighted by the largest value of the head."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from evomem.bounds import NEIGHBOURS
from evomem.managers.allocation import Allocation, Lava, Uniform
from evomem.managers.allocation.lava import lava_scores
from evomem.managers.base import register
from evomem.managers.heuristics.snapkv import SnapKV, SnapKVOptions
from evomem.memory.view import LayerView


class LavaKVOptions(SnapKVOptions):
    """Options of `LavaKV`."""

    kernel: int = Field(
        default=7, ge=1, le=NEIGHBOURS, description="neighbouring slots among which the largest attention counts; odd"
    )


@register("lava")
class LavaKV(SnapKV):
    """Keeps the slots whose loss could change the layer's output most (LAVa, Shen et al., arXiv 2509.09754).

    The score is max_k ‖v_k‖₁ times the mean attention of the last ``window`` queries, of the query head of the group
    that pays most, max-pooled over ``kernel`` neighbouring slots (`lava_scores`). It compares slots of different
    heads. The window is kept as by `SnapKV`. Layers and heads share the budget by `Lava`, with the same window and
    kernel; with an ``allocation`` of another kind only the scores are LAVa's: ``lava(allocation=across_heads)``.
    """

    Options = LavaKVOptions
    options: LavaKVOptions

    @property
    def observes(self) -> frozenset[str]:
        """The window's mean attention, of the query head that pays a slot most."""
        return frozenset({f"window_group_peak:{self.options.window}"})

    def built_in_allocation(self) -> Allocation:
        """Return LAVa's allocation, unless another one is given."""
        return Uniform() if self.options.allocation else Lava(window=self.options.window, kernel=self.options.kernel)

    def score_within(self, view: LayerView, n: Tensor) -> Tensor:
        """Return LAVa's scores: (batch, kv_heads, slots) fp32; the window is at most half of ``n`` slots a head."""
        attention = view.recorded[f"window_group_peak:{self.options.window}"]
        before = view.valid & (view.age >= self.ends.window(n))
        return lava_scores(attention, view.values, before, self.options.kernel)
