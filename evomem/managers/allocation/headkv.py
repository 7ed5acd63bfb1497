"""Manager: the allocation of HeadKV: a part of the budget goes to heads by what they retrieve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor

from evomem.bounds import LARGE
from evomem.managers.allocation.base import AllocationOptions, ModelAllocation, register_allocation
from evomem.managers.allocation.by_weight import ends_at, limits_by_weight
from evomem.managers.allocation.probed import ProbedAllocation
from evomem.managers.selection import Ends
from evomem.memory.view import LayerView


class HeadKVOptions(AllocationOptions):
    """Options of `HeadKV`."""

    beta: float = Field(
        default=1.2, ge=1, le=LARGE, description="1 / beta of every head's slots go into the pool that scores share out"
    )
    power: float = Field(default=1.0, ge=0, le=16, description="power of the scores before they are shared out by")
    probe: Literal["retrieval", "induction", "echo", "beyond_window"] = Field(
        default="retrieval", description="what heads that get more do on synthetic text"
    )


@register_allocation("headkv")
class HeadKV(ProbedAllocation, ModelAllocation):
    """Gives head h the slots b - b/β + S_h L H b/β by its retrieval score (HeadKV, Fu et al., arXiv 2410.19258).

    Every head first gets what protected ends take at the mean, as HeadKV's own window; b is what is left of the mean.
    1/β of it goes into a pool, which the scores share out: S_h is the head's score to the ``power``, divided by the sum
    over all L H heads (section 3.3; β is tuned from 1.005 to 10 there). ``snapkv(allocation=headkv)`` ranks as the
    paper does.

    Different from the paper: scores are of KV heads, not of query heads, of the query head of the group that does it
    most, and measured on the model itself (`HeadProbes`): attention to the value of a key that comes again, in place of
    attention to a needle's words while a question about it is answered, so that no tokenizer and no list of scores per
    model is needed. What a head cannot hold goes to the others, and the total is exact.
    """

    Options = HeadKVOptions
    options: HeadKVOptions

    def limits(
        self,
        views: Sequence[LayerView],
        means: Sequence[Tensor],
        scores: Sequence[Tensor],
        ends: Ends,
        shares: Tensor | None = None,
    ) -> list[Tensor]:
        """Return the slots of every head, as a list of (batch, kv_heads, 1) int64."""
        beta = self.options.beta
        score = self.probe(self.options.probe, views).double() ** self.options.power
        total = score.sum()
        share = (score / total.clamp(min=1e-300)).where(total > 0, score.new_tensor(1 / len(score)))
        weights = (1 - 1 / beta + len(score) * share / beta)[:, None]
        return limits_by_weight(weights, views, means[0], scores, ends_at(ends, means[0]))
