"""Manager: what the last queries attend to, on average and in turns."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from evomem.bounds import LARGE
from evomem.managers.allocation import Allocation, Cake, Uniform
from evomem.managers.base import register
from evomem.managers.heuristics.snapkv import SnapKV, SnapKVOptions
from evomem.memory.view import LayerView


class CakeKVOptions(SnapKVOptions):
    """Options of `CakeKV`."""

    gamma: float = Field(
        default=200.0, ge=0, le=LARGE, description="weight of the attention's variance against its mean"
    )


@register("cake")
class CakeKV(SnapKV):
    """Keeps what the last queries attend to, steadily or in turns (CAKE, Qin et al., arXiv 2503.12491).

    The score is the mean of the attention that the last ``window`` queries pay, plus ``gamma`` times its variance from
    query to query, averaged over the KV head's query heads and average-pooled over ``kernel`` neighbouring slots
    (eq. 9). The window is kept as by `SnapKV`. Layers share the budget by `Cake`, with the same window; with an
    ``allocation`` of another kind only the scores are CAKE's: ``cake(allocation=uniform)``.
    """

    Options = CakeKVOptions
    options: CakeKVOptions

    @property
    def observes(self) -> frozenset[str]:
        """Mean and variance of the attention of the last ``window`` queries."""
        return super().observes | {f"window_variance:{self.options.window}"}

    def built_in_allocation(self) -> Allocation:
        """Return CAKE's allocation, unless another one is given."""
        return Uniform() if self.options.allocation else Cake(window=self.options.window)

    def attention(self, view: LayerView) -> Tensor:
        """Return mean plus ``gamma`` times variance: (batch, kv_heads, slots) fp32."""
        variance = view.recorded[f"window_variance:{self.options.window}"].float()
        return super().attention(view) + self.options.gamma * variance
