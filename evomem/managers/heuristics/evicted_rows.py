"""Manager: any ranking manager, with what it evicts written into rows that the model goes on to read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from evomem.bounds import TOKENS
from evomem.errors import ConfigError
from evomem.managers.allocation import Allocation, EmergentAllocation
from evomem.managers.around import ManagerAround, RewritingRule, describe_inner
from evomem.managers.base import register
from evomem.managers.decision import Judgement, Rule
from evomem.managers.options import ManagerOptions
from evomem.managers.selection import Ends, finite
from evomem.memory.view import Decision, LayerView

Written = Literal["both", "values"]


class EvictedRowsOptions(ManagerOptions):
    """Options of `EvictedRows`; budget, schedule and allocation are given here and not to the inner manager."""

    inner: dict[str, Any] = Field(
        default="keydiff",
        validate_default=True,
        description='manager that ranks, e.g. "keydiff" or "snapkv(window=64)"',
    )
    rows: int = Field(default=8, ge=1, le=TOKENS, description="of the budget's slots, those that are written into")
    sharpness: float = Field(
        default=16.0, ge=0, le=1e4, description="how much a token prefers the row whose key points as its own does"
    )
    writes: Written = Field(
        default="both", description="what a row averages: keys and values, or values only, under its own key"
    )
    weight: float = Field(
        default=1.0, gt=0, le=1, description="a row of m tokens is attended to as m^weight slots of its key"
    )

    @field_validator("inner", mode="before")
    @classmethod
    def _describe(cls, inner: Any) -> dict[str, Any]:
        """Turn any spec into the full description."""
        return describe_inner(inner, "evicted_rows", ("budget", "every", "allocation"))


@dataclass(frozen=True)
class WritingRule(RewritingRule):
    """A `Rule` whose evicted tokens are written into the worst of the slots that stay.

    Attributes
    ----------
    rows, sharpness, writes, weight : see `EvictedRowsOptions`.
    """

    rows: int
    sharpness: float
    writes: Written
    weight: float

    def written(self, decision: Decision, judgement: Judgement, view: LayerView) -> Decision:
        """Return a decision with the tokens that it evicts written into its rows.

        Raises
        ------
        ConfigError : the manager lets slots fade by itself.
        """
        if decision.decay is not None:
            raise ConfigError("manager 'evicted_rows': inner: it lets slots fade, and so do rows; leave out forget")
        keep, scores = decision.keep, judgement.scores
        gone = self.candidates(view, judgement.stored) & ~keep
        open_slots = keep & ~self.ends.safe(view, keep.sum(-1, keepdim=True))
        count = min(self.rows, scores.shape[-1])
        worst = torch.where(open_slots, finite(scores), torch.inf)
        rows = torch.sort(worst, dim=-1, stable=True).indices[..., :count]
        chosen = open_slots.gather(-1, rows)  # a head may have fewer slots that are open to be written into
        mass = torch.ones_like(scores) if view.decays is None else torch.exp(view.decays.float() / self.weight)
        keys, values = view.keys.float(), view.values.float()
        directions = F.normalize(keys, dim=-1)
        logits = self.sharpness * (directions @ _take(directions, rows).transpose(-1, -2))  # (…, slots, rows)
        # Minus infinity would make NaN of a head without a row, and its weights are taken out below anyway.
        shares = torch.softmax(logits.masked_fill(~chosen[..., None, :], -1e30), -1) * chosen[..., None, :]
        shares = shares * torch.where(gone, mass, 0.0)[..., None]
        before = mass.gather(-1, rows)
        after = before + shares.sum(-2)
        total = after[..., None].clamp(min=1e-30)

        def averaged(parts: Tensor) -> Tensor:
            """Return the slots' means (batch, kv_heads, slots, size) with what was written."""
            new = (before[..., None] * _take(parts, rows) + shares.transpose(-1, -2) @ parts) / total
            return parts.scatter(2, rows[..., None].expand_as(new), new)

        decay = self.weight * torch.log(mass.scatter(-1, rows, after))
        return replace(
            decision,
            decay=torch.where(keep, decay, 0.0),
            keys=averaged(keys).to(view.keys.dtype) if self.writes == "both" else view.keys,
            values=averaged(values).to(view.values.dtype),
        )


@register("evicted_rows")
class EvictedRows(ManagerAround):
    """Keeps what another manager keeps, and writes what that evicts into some of it: a memory of what was evicted.

    The ``rows`` slots that are ranked last among those that stay, protected ones not counted, are rows of a memory
    matrix. An evicted token of key k is written into row i with w_i = softmax_i(sharpness cos(k, k_i)); a row's key and
    value are the means of all that was written into it, and m_i, its tokens, raise the logit of its key by
    weight log m_i. So tokens with equal keys and values can be evicted without a change of what is read. Rows that are
    evicted later are written with all their tokens: Σ m_i is always the number of tokens read, as long as a head has a
    slot that is not protected.

    Rows are read by the managed attention of a frozen model, beside the slots that hold one token each, and cost as
    many bytes; a log-weight costs 4 more a slot. Keys are averaged as they were rotated. In a layer of sliding window
    attention a row is seen as long as its slot's own token is.
    """

    Options = EvictedRowsOptions
    options: EvictedRowsOptions

    def make_ends(self) -> Ends:
        """Return what the inner manager protects; it is built here, with budget and allocation."""
        given = self.options.allocation
        inner = self.build_inner(
            self.options.inner, budget=self.options.budget, **({"allocation": given} if given else {})
        )
        if inner.forgets:
            raise ConfigError("manager 'evicted_rows': inner: it lets slots fade, and so do rows; leave out forget")
        return inner.ends

    def make_allocation(self) -> Allocation:
        """Return the inner manager's allocation.

        Raises
        ------
        ConfigError : how many slots stay emerges from scores, so that none is the last of a budget's.
        """
        if isinstance(self.inner.allocation, EmergentAllocation):
            raise ConfigError(
                f"manager 'evicted_rows': inner: {self.inner.name!r} does not rank its slots to a budget, so there is "
                "no last slot to write into; use one that does, e.g. evicted_rows(keydiff)"
            )
        self.require_no_statistics()
        return self.inner.allocation

    @property
    def rule(self) -> Rule:
        """The rule that also says what rows hold."""
        o = self.options
        return WritingRule(o.budget, self.ends, self.allocation, o.rows, o.sharpness, o.writes, o.weight)

    def prepare(self, view: LayerView) -> None:
        """Let the inner manager compute what does not depend on parameters."""
        self.inner.prepare(view)

    def score_within(self, view: LayerView, n: Tensor) -> Tensor:
        """Return the inner manager's scores where protected ends are measured by ``n`` slots a head."""
        return self.inner.score_within(view, n)


def _take(slots: Tensor, rows: Tensor) -> Tensor:
    """Return slots (batch, kv_heads, slots, size) of the rows (batch, kv_heads, rows)."""
    return slots.gather(2, rows[..., None].expand(*rows.shape, slots.shape[-1]))
