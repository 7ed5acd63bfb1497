"""Manager: allocations whose number of slots emerges from the scores."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from evomem.bounds import TOKENS
from evomem.errors import ConfigError
from evomem.managers.allocation.base import AllocationOptions, EmergentAllocation, register_allocation
from evomem.managers.selection import Ends, best, slots_of_budget, tokens_read
from evomem.memory.view import LayerView


class ThresholdOptions(AllocationOptions):
    """Options of `Threshold`."""

    cap: Annotated[int, Field(ge=1, le=TOKENS)] | Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = (
        Field(
            default=None,
            description="slots per head at most: a number, or a share of the tokens read; none: the manager's budget",
        )
    )

    @field_validator("cap", mode="before")
    @classmethod
    def _number(cls, cap: Any) -> Any:
        if isinstance(cap, bool):
            raise ValueError("give a whole number >= 1, or a share in (0, 1]")
        return cap


@register_allocation("threshold")
class Threshold(EmergentAllocation):
    """Keeps where the score is >= 0, and always the newest token (NAMM, arXiv 2410.13166); heads are independent.

    How many slots that are is up to the scores; the cap is all that a budget does.
    """

    Options = ThresholdOptions
    options: ThresholdOptions

    def keep(
        self, scores: Tensor, view: LayerView, candidates: Tensor, ends: Ends, budget: int | float | None
    ) -> Tensor:
        """Return the keep-mask: scores >= 0, of these the best up to the cap, protected tokens before all."""
        cap = budget if self.options.cap is None else self.options.cap
        n = slots_of_budget(cap, view)
        marked, newest = ends.mark(scores, view, candidates, n), candidates & (view.age == 0)
        kept = (marked >= 0) & candidates
        if cap is not None:  # the newest token has its slot before all others, protected ones too
            kept = kept & best(torch.where(newest, -torch.inf, marked), n - newest.sum(-1, keepdim=True))
        return kept | newest


class Dense(EmergentAllocation):
    """Every head of the batch keeps as many slots as the greediest: its own K best, K = max over heads of #{s >= 0}.

    What the reference implementation of NAMM does, because its cache is one tensor. For parity only, and not
    registered. The newest token is kept in any case.
    """

    name = "dense"

    def keep(
        self, scores: Tensor, view: LayerView, candidates: Tensor, ends: Ends, budget: int | float | None
    ) -> Tensor:
        """Return the keep-mask."""
        marked = ends.mark(scores, view, candidates, tokens_read(view))
        marked = torch.where(candidates & (view.age == 0), torch.inf, marked)
        most = (marked >= 0).sum(-1).amax()
        return best(marked, most) & candidates


class Everything(EmergentAllocation):
    """Keeps every slot that holds a token, whatever the budget; not registered: it is what ``full`` is."""

    name = "everything"

    def require_no_budget(self, budget: int | float | None, manager: str) -> None:
        """Raise `ConfigError` where ``manager``, by its name, has a budget, which would say nothing.

        Not so ``full``: it is the reference of comparisons, whatever budget these have.
        """
        if budget is not None and manager != "full":
            raise ConfigError(
                f"manager {manager!r}: budget: {budget!r} has no effect, for every slot stays; leave budget out"
            )

    def keep(
        self, scores: Tensor, view: LayerView, candidates: Tensor, ends: Ends, budget: int | float | None
    ) -> Tensor:
        """Return ``candidates``."""
        return candidates
