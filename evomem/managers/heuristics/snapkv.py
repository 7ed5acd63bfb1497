"""Manager: what the last queries attend to."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional

from evomem.bounds import NEIGHBOURS
from evomem.managers.base import MemoryManager, register
from evomem.managers.options import ManagerOptions
from evomem.managers.selection import Ends
from evomem.memory.view import LayerView


class SnapKVOptions(ManagerOptions):
    """Options of `SnapKV`."""

    window: int = Field(
        default=32, ge=1, le=NEIGHBOURS, description="last queries that are observed; their tokens are kept"
    )
    kernel: int = Field(
        default=5, ge=1, le=NEIGHBOURS, description="neighbouring slots over which the attention is averaged; odd"
    )

    @field_validator("kernel")
    @classmethod
    def _odd(cls, kernel: int) -> int:
        if kernel % 2 == 0:
            raise ValueError("give an odd number, so that the average is centred on the token")
        return kernel


@register("snapkv")
class SnapKV(MemoryManager):
    """Keeps what the last queries attend to, with its neighbours (SnapKV, Li et al., arXiv 2404.14469).

    The attention of the last ``window`` queries, averaged over them and the KV head's query heads, is average-pooled
    over ``kernel`` neighbouring slots. The window's own tokens are kept, and do not lend their attention to their
    neighbours. Where the budget n is smaller than 2 ``window``, only the ⌊n/2⌋ newest tokens are kept for certain and
    the others of the window compete like any token. An allocation of the whole model gives every head its own n.
    """

    Options: ClassVar[type[ManagerOptions]] = SnapKVOptions
    options: SnapKVOptions

    @property
    def observes(self) -> frozenset[str]:
        """The mean attention of the last ``window`` queries."""
        return frozenset({f"window_attention:{self.options.window}"})

    def make_ends(self) -> Ends:
        """The window, at most half of the slots."""
        return Ends(recent=self.options.window, recent_share=0.5)

    def attention(self, view: LayerView) -> Tensor:
        """Return what a slot's attention counts before it is pooled: (batch, kv_heads, slots) fp32."""
        return view.recorded[f"window_attention:{self.options.window}"].float()

    def score(self, view: LayerView) -> Tensor:
        """Return the pooled attention: (batch, kv_heads, slots) fp32; beyond both ends it counts as zero."""
        return self.score_within(view, self.rule.layer_limit(view, self.shares()))

    def score_within(self, view: LayerView, n: Tensor) -> Tensor:
        """Return the score where the window is at most half of ``n`` slots a head, see `MemoryManager.score_within`."""
        attention = self.attention(view)
        outside = view.valid & (view.age >= self.ends.window(n))
        kernel = self.options.kernel
        return functional.avg_pool1d(torch.where(outside, attention, 0.0), kernel, stride=1, padding=kernel // 2)
