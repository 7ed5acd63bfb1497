"""Manager: the allocation of DuoAttention: streaming heads get a few slots, retrieval heads all others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from evomem.bounds import TOKENS
from evomem.managers.allocation.base import AllocationOptions, ModelAllocation, register_allocation
from evomem.managers.allocation.by_weight import ends_at, first_heads, limits_by_weight
from evomem.managers.allocation.probed import ProbedAllocation
from evomem.managers.selection import Ends, share_of
from evomem.memory.view import LayerView


class DuoOptions(AllocationOptions):
    """Options of `Duo`."""

    retrieval: float = Field(default=0.5, ge=0, le=1, description="share of heads that are retrieval heads")
    streaming: Annotated[int, Field(ge=1, le=TOKENS)] | Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = (
        Field(default=0.25, description="slots of a streaming head: a number, or a share of the mean")
    )
    probe: Literal["beyond_window", "retrieval", "induction"] = Field(
        default="beyond_window", description="what retrieval heads do more of on synthetic text"
    )

    @field_validator("streaming", mode="before")
    @classmethod
    def _number(cls, streaming: Any) -> Any:
        if isinstance(streaming, bool):
            raise ValueError("give a whole number of slots, or a share in [0, 1]")
        return streaming


@register_allocation("duo")
class Duo(ProbedAllocation, ModelAllocation):
    """Splits heads into retrieval and streaming heads (DuoAttention, Xiao et al., arXiv 2410.10819).

    The ``retrieval`` share of all KV heads (a half as published for grouped heads, a quarter for heads of their own)
    keeps everything; the others keep sinks and the newest tokens, a number that does not grow with the text.
    ``streaming_llm(allocation=duo)`` keeps that, any other scorer its own choice of as many.

    Different from the paper: a budget is given. A streaming head gets ``streaming`` slots, at most the mean and at
    least what protected ends take at the mean; retrieval heads share all others equally, up to what they hold, and only
    what they cannot use goes to streaming heads. The paper finds retrieval heads by training a gate per head, so that
    hidden states on synthetic pass keys change least. Here they are those whose attention on repeated random tokens
    goes most beyond sinks and window (the probe ``beyond_window``, of the query head of the group for which it is
    largest), measured on the model itself in seconds.
    """

    Options = DuoOptions
    options: DuoOptions

    def limits(
        self,
        views: Sequence[LayerView],
        means: Sequence[Tensor],
        scores: Sequence[Tensor],
        ends: Ends,
        shares: Tensor | None = None,
    ) -> list[Tensor]:
        """Return the slots of every head, as a list of (batch, kv_heads, 1) int64."""
        streaming = self.options.streaming
        retrieval = first_heads(self.probe(self.options.probe, views), self.options.retrieval)
        mean = means[0].to(retrieval.device)
        few = mean.clamp(max=streaming) if isinstance(streaming, int) else share_of(streaming, mean)
        sure = ends_at(ends, mean)
        least = torch.where(retrieval[:, None, None, None], sure, torch.maximum(sure, few))
        return limits_by_weight(retrieval.double()[:, None], views, mean, scores, least)
