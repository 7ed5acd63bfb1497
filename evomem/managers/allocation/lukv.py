"""Manager: an allocation that solves for the heads' budgets, from curves of what a slot is worth to each head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from evomem.bounds import UNITS
from evomem.errors import ConfigError
from evomem.managers.allocation.base import AllocationOptions, ModelAllocation, register_allocation
from evomem.managers.allocation.by_weight import usable_slots
from evomem.managers.allocation.curve_record import CurveRecord, MeasuredAllocation
from evomem.managers.selection import Ends, tokens_read
from evomem.memory.view import LayerView


class LUKVOptions(AllocationOptions):
    """Options of `LUKV`."""

    layers: int = Field(ge=1, le=UNITS, description="layers of the model that the curves are of")
    heads: int = Field(ge=1, le=UNITS, description="KV heads of each of them")
    points: int = Field(default=64, ge=1, le=UNITS, description="pieces of a curve")


@register_allocation("lukv")
class LUKV(MeasuredAllocation, ModelAllocation):
    """Gives slots where the next one is worth most, by measured curves (LU-KV, Tang et al., arXiv 2602.08585).

    A curve is of one head under one ranking: the attention to come that falls on the b best slots, as a function of b,
    less what the protected ends hold. With its concave hull in place of the curve, Σ_h U_h(b_h) under Σ_h b_h = total
    is solved exactly by taking pieces of the hulls in the order of their slopes. So one measurement serves every
    budget. The curves are buffers, measured by ``evomem allocate`` or `evomem.evaluation.utility.utility_curves`.

    Every head first gets what the protected ends need and one slot more (at most the mean), and never more than it
    holds. The sum is layers x heads x mean in every row. Curves are in shares of the slots that a head holds beyond
    that floor, so that contexts of other lengths use them too. They are of one model: another number of layers or heads
    is refused. They are also of one ranking. What they were measured with is kept beside them (`MeasuredAllocation`):
    under another scorer, or on another model of this shape, the manager warns once.

    What differs from the paper: utility is the attention that question and answer pay (`Future.peak`), and curves are
    means over contexts where the paper averages budgets.

    Attributes
    ----------
    knots : (points + 1,) fp32, ascending from 0 to 1: shares of the slots beyond the floor.
    marginal : (layers, heads, points) fp32, slope of the hull between two knots, in attention per share; not
        increasing along a curve. NaN until it is measured.
    """

    Options = LUKVOptions
    options: LUKVOptions
    knots: Tensor
    marginal: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        o = self.options
        self.register_buffer("knots", torch.linspace(0, 1, o.points + 1, dtype=torch.float32))
        self.register_buffer("marginal", torch.full((o.layers, o.heads, o.points), torch.nan, dtype=torch.float32))

    def set_curves(self, knots: Tensor, marginal: Tensor, record: CurveRecord | None = None) -> None:
        """Take in measured curves.

        Parameters
        ----------
        knots : (points + 1,), ascending from 0 to 1.
        marginal : (layers, heads, points), not increasing along the last axis.
        record : what they were measured with; None: unknown.

        Raises
        ------
        ConfigError : another shape, numbers that are not finite, knots that do not ascend, or slopes that rise.
        """
        if knots.shape != self.knots.shape or marginal.shape != self.marginal.shape:
            raise ConfigError(
                f"allocation 'lukv': knots {tuple(knots.shape)} and slopes {tuple(marginal.shape)}; with these options "
                f"{tuple(self.knots.shape)} and {tuple(self.marginal.shape)} are expected"
            )
        _check_curves(knots, marginal)
        with torch.no_grad():
            self.knots.copy_(knots)
            self.marginal.copy_(marginal)
        self.set_record(record or CurveRecord())
        self.has_curves = True

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        # Whether there are curves is a fact of the host: a decision must not wait for a device to say it.
        self.has_curves = bool(torch.isfinite(self.marginal).all())
        if self.has_curves:
            _check_curves(self.knots, self.marginal)

    def limits(
        self,
        views: Sequence[LayerView],
        means: Sequence[Tensor],
        scores: Sequence[Tensor],
        ends: Ends,
        shares: Tensor | None = None,
    ) -> list[Tensor]:
        """Return the slots of every head, as a list of (batch, kv_heads, 1) int64, each on its view's device."""
        counts = [view.slots.shape[1] for view in views]
        if reason := self.refusal(counts):
            raise ConfigError(reason)
        device = views[0].slots.device
        usable = torch.cat([usable_slots(s)[..., 0].to(device) for s in scores], 1)
        read = tokens_read(views[0])[:, 0, 0]
        limits = self.solve(usable, means[0].to(device)[:, 0, 0], ends.floor, read)
        parts = torch.split(limits[..., None], counts, 1)
        return [part.to(view.slots.device) for part, view in zip(parts, views, strict=True)]

    def solve(self, usable: Tensor, mean: Tensor, floor: int, read: Tensor) -> Tensor:
        """Return the slots of every head of all layers: (batch, heads of all layers) int64.

        Parameters
        ----------
        usable : (batch, heads of all layers) int64, slots that a head may keep.
        mean : (batch,) int64, slots per head.
        floor : slots that every head gets first, if it has them; at most the mean.
        read : (batch,) int64, tokens of the context, of which the curves' shares are.
        """
        heads = usable.shape[1]
        total = mean * heads
        least = torch.minimum(mean.clamp(max=floor)[:, None], usable)
        taken = self._greedy(usable - least, total - least.sum(1), (read - floor).clamp(min=1))
        # Slots that the row has not got are counted too, in equal parts, so that the limits add up.
        over = (total - usable.sum(1)).clamp(min=0)[:, None]
        index = torch.arange(heads, device=usable.device)
        return least + taken + over // heads + (index < over % heads)

    def _greedy(self, room: Tensor, total: Tensor, span: Tensor) -> Tensor:
        """Return how many of ``total`` (batch,) slots every head takes of its ``room`` (batch, heads): the same shape.

        Pieces of all hulls in the order of their slopes, each in whole slots, until the total is reached. A curve is of
        ``span`` (batch,) slots; a head that has fewer takes the curve's beginning, one that has more gets them last.
        """
        ends = torch.round(span[:, None] * self.knots.double().to(room.device)).long()  # (batch, points + 1)
        ends = torch.minimum(ends[:, None], room[..., None])  # (batch, heads, points + 1)
        ends = torch.cat([ends[..., :-1], room[..., None]], -1)
        pieces = ends.diff(dim=-1).flatten(1)
        order = torch.sort(self.marginal.float().to(room.device).flatten(), descending=True, stable=True).indices
        wanted = pieces[:, order]
        before = wanted.cumsum(1) - wanted
        got = torch.minimum(wanted, (total[:, None] - before).clamp(min=0))
        return got[:, torch.argsort(order)].reshape(ends[..., 1:].shape).sum(-1)

    def refusal(self, counts: Sequence[int]) -> str:
        """Return why the curves say nothing of layers with so many KV heads; "" if they do."""
        o = self.options
        if not self.has_curves:
            return (
                "allocation 'lukv': its curves have not been measured; measure them on a task with `evomem allocate`, "
                "and load the plug-in that it writes"
            )
        if list(counts) != [o.heads] * o.layers:
            return (
                f"allocation 'lukv': its curves are of {o.layers} layers of {o.heads} KV heads, and this model has "
                f"{len(counts)} layers of {' or '.join(map(str, sorted(set(counts))))}; measure them on this model "
                "with `evomem allocate`"
            )
        return ""


def _check_curves(knots: Tensor, marginal: Tensor) -> None:
    if not torch.isfinite(marginal).all() or not torch.isfinite(knots).all():
        raise ConfigError("allocation 'lukv': its curves hold numbers that are not finite; measure them again")
    if knots[0] != 0 or knots[-1] != 1 or (knots.diff() <= 0).any():
        raise ConfigError("allocation 'lukv': knots must ascend from 0 to 1")
    if (marginal.diff(dim=-1) > 0).any():
        raise ConfigError("allocation 'lukv': slopes of a hull do not rise; take the concave hull of the curves first")
