"""Testing: how the conformance kit compares decisions of fp16 and bf16 models, in which a rounding may tip a slot.

Two ways to read the same context round differently there, so that near-equal scores may change places. What is compared
instead: decisions about the very same numbers, and the logits that follow from the very same decisions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from evomem.memory import CachePolicy, Decision, LayerView
from evomem.memory.kv.due import decide_all, needs_all_layers
from evomem.memory.observations import axes_of
from evomem.testing.comparing import ConformanceError, same_tensors
from evomem.testing.reference import Event, Tracing

AGREEMENT = 0.75
"""Share of kept slots that must be the same whether a context is read at once or in pieces."""


class RowByRow(Tracing):
    """Decides as the policy does, and compares with what it decides about every row's part of the view alone."""

    def decide(self, view: LayerView) -> Decision:
        """Decide about the batch and about its rows."""
        decision = super().decide(view)
        every = self.schedule.every
        for row in range(len(view.start)):
            read = view.seen - int(view.start[row])
            if read <= 0 or (every is not None and read % every):
                continue
            alone, empty = _row_of(view, row)
            _same_row(row, empty, decision, alone, self.policy.decide(alone))
        return decision

    def decide_all(self, views: Sequence[LayerView]) -> list[Decision]:
        """Decide about the batch and about its rows, all layers at once."""
        decisions = super().decide_all(views)
        for row in range(len(views[0].start)):
            if views[0].seen <= int(views[0].start[row]):
                continue
            parts = [_row_of(view, row) for view in views]
            wanted = decide_all(self.policy, [alone for alone, _ in parts])
            for decision, (alone, empty), theirs in zip(decisions, parts, wanted, strict=True):
                _same_row(row, empty, decision, alone, theirs)
        return decisions


def _same_row(row: int, empty: int, decision: Decision, alone: LayerView, theirs: Decision) -> None:
    mine = decision.keep[row : row + 1, :, empty:]
    same_tensors(f"row {row} in a batch against alone, layer {alone.layer}: kept", mine, theirs.keep & alone.valid)


def _row_of(view: LayerView, row: int) -> tuple[LayerView, int]:
    """Return one row of a view as if it had been read alone, and how many columns that are empty in it were cut."""
    one, start = slice(row, row + 1), view.start[row]
    slots = view.slots[one]
    empty = int((slots < 0).all(1).sum())
    recorded = {
        name: part[one, :, empty:] if (axes_of(name) or ())[2:3] == ("slots",) else part[one]
        for name, part in view.recorded.items()
    }
    seen = view.seen - int(start)
    slots = torch.where(slots >= 0, slots - start, -1)[..., empty:]
    alone = replace(
        view, keys=view.keys[one, :, empty:], values=view.values[one, :, empty:], slots=slots,
        start=torch.zeros_like(view.start[one]), seen=seen, fresh=min(view.fresh, seen), recorded=recorded, memo={},
    )  # fmt: skip
    return alone, empty


class Replaying:
    """Repeats recorded decisions, and counts the slots in which the policy agrees with them."""

    def __init__(self, policy: CachePolicy, events: Mapping[int, list[Event]]) -> None:
        self.policy, self.events = policy, events
        self.observes, self.schedule = policy.observes, policy.schedule
        self.made: dict[int, int] = {}
        self.kept = self.agreed = 0

    @property
    def whole_model(self) -> bool:
        """Whether the policy decides about all layers at once."""
        return needs_all_layers(self.policy)

    def decide(self, view: LayerView) -> Decision:
        """Return the recorded decision; the slots must be those that it was made about."""
        return self._replayed(view, self.policy.decide(view))

    def decide_all(self, views: Sequence[LayerView]) -> list[Decision]:
        """Return the recorded decisions about all layers; see `decide`."""
        return [
            self._replayed(view, decision) for view, decision in zip(views, decide_all(self.policy, views), strict=True)
        ]

    def _replayed(self, view: LayerView, decision: Decision) -> Decision:
        number = self.made.get(view.layer, 0)
        self.made[view.layer] = number + 1
        event = self.events[view.layer][number]
        same_tensors(f"slots of layer {view.layer} at decision {number}", view.slots, event.slots)
        mine, theirs = decision.keep & view.valid, event.keep & view.valid
        self.kept, self.agreed = self.kept + int(theirs.sum()), self.agreed + int((mine & theirs).sum())
        if decision.keys is not None:
            raise ConformanceError("the manager writes into slots, which a replay of decisions does not compare")
        return Decision(event.keep, event.decay, decision.evicted)

    def require_agreement(self, label: str) -> None:
        """Raise `ConformanceError` unless the policy would have kept `AGREEMENT` of the slots itself."""
        if self.agreed < AGREEMENT * self.kept:
            raise ConformanceError(
                f"{label}: of {self.kept} slots that are kept when all is read at once, only {self.agreed} are kept"
            )
