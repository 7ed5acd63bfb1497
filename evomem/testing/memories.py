"""Testing: the conformance kit of explicit memories: any memory and any manager that decides about it.

A `Subject` says how an empty memory is made and how it is fed. Every check raises `ConformanceError` with what differs:

>>> import pytest                                                        # doctest: +SKIP
>>> from evomem.testing.memories import CHECKS, Subject
>>> @pytest.mark.parametrize("check", CHECKS)                            # doctest: +SKIP
... def test_my_memory(check):
...     CHECKS[check](Subject(make_memory, feed_memory, rows=3, tokens=40), MyManager(budget=8))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from evomem.errors import CacheError
from evomem.evaluation.population import PopulationPolicy
from evomem.managers.base import MemoryManager
from evomem.memory import LayerView
from evomem.memory.explicit import ExplicitCache, ExplicitLayer
from evomem.memory.kv.policy import CachePolicy
from evomem.testing.comparing import ConformanceError

TOLERANCE = 1e-4
"""Largest difference of observations where two right ways differ by rounding."""


@dataclass(frozen=True)
class Subject:
    """A memory to be checked.

    Attributes
    ----------
    make : returns an empty memory about which a manager decides.
    feed : lets rows of a fixed text be read: (memory, numbers of the rows, first token, one past the last).
    rows, tokens : of that text: at least 2 and 24.
    """

    make: Callable[[CachePolicy], ExplicitCache]
    feed: Callable[[ExplicitCache, Sequence[int], int, int], None]
    rows: int
    tokens: int

    def read(self, manager: MemoryManager, pieces: int = 1, rows: Sequence[int] | None = None) -> ExplicitCache:
        """Return a memory that has read half of the text in pieces, without a decision."""
        cache, end = self.make(manager), self.tokens // 2
        for piece in range(pieces):
            self.feed(cache, self._rows(rows), end * piece // pieces, end * (piece + 1) // pieces)
        return cache

    def go_on(self, cache: ExplicitCache, rows: Sequence[int] | None = None) -> None:
        """Let a memory read the rest of the text, with a decision every third token."""
        for begin in range(self.tokens // 2, self.tokens, 3):
            self.feed(cache, self._rows(rows), begin, min(begin + 3, self.tokens))
            cache.decide()

    def _rows(self, rows: Sequence[int] | None) -> Sequence[int]:
        return range(self.rows) if rows is None else rows


def check_pieces(subject: Subject, manager: MemoryManager) -> None:
    """Tokens read at once leave what tokens read in pieces leave."""
    whole = subject.read(manager)
    for pieces in (3, subject.tokens // 2):
        _same(whole, subject.read(manager, pieces), f"read in {pieces} pieces")


def check_keep(subject: Subject, manager: MemoryManager) -> None:
    """What is not kept leaves, with its bytes and what was observed of it; all else stays as it is."""
    cache = subject.read(manager)
    draw = torch.Generator().manual_seed(0)
    for layer in cache.layers:
        before = layer.view()
        mask = (torch.rand(before.slots.shape, generator=draw) < 0.6).to(before.slots.device)
        # What is said of a slot among those held, such as its share of attention, may change when others leave.
        kept = {n: t for n, t in before.recorded.items() if n in layer.recorder.slotwise}
        wanted = _slots(replace(before, recorded=kept), before.valid & mask)
        bytes_before, slots_before = _bytes_of_slots(layer), int(layer.counts().sum())
        each = layer.bytes_per_token() // before.slots.shape[1]
        layer.keep(mask)
        after = layer.view()
        after = replace(after, recorded={name: after.recorded[name] for name in kept})
        _require(_equal(_slots(after, after.valid), wanted), "after keep: other slots than the mask's")
        gone = slots_before - int(layer.counts().sum())
        left = _bytes_of_slots(layer)
        right = bytes_before - left == gone * each
        _require(right, f"after keep: {gone} slots of {each} bytes are gone, and {left} of {bytes_before} bytes stay")


def check_decisions(subject: Subject, manager: MemoryManager) -> None:
    """A decision keeps what the manager says, and every row is decided about as if it were alone."""
    together = subject.read(manager)
    wanted = [manager.decide(layer.view()) for layer in together.layers] if not manager.whole_model else None
    views = [layer.view() for layer in together.layers]
    decisions = wanted if wanted is not None else manager.decide_all(views)
    kept = [_slots(view, decision.keep) for view, decision in zip(views, decisions, strict=True)]
    together.decide()
    for layer, slots in zip(together.layers, kept, strict=True):
        view = layer.view()
        same = torch.equal(view.slots[view.valid], slots["slots"]) and torch.equal(view.valid.sum(-1), slots["counts"])
        _require(same, "after a decision: other slots than decided")
    subject.go_on(together)
    for row in range(subject.rows):
        alone = subject.read(manager, rows=[row])
        alone.decide()
        subject.go_on(alone, [row])
        for one, many in zip(alone.layers, together.layers, strict=True):
            mine, theirs = (view.slots[index] for view, index in ((one.view(), 0), (many.view(), row)))
            same = all(torch.equal(a[a >= 0], b[b >= 0]) for a, b in zip(mine, theirs, strict=True))
            _require(same, f"row {row} holds other slots in a batch than alone")


def check_population(subject: Subject, manager: MemoryManager) -> None:
    """Candidates that differ in their parameters decide, each about its own row, as each does alone."""
    population = [_varied(manager, seed) for seed in range(3)]
    together = subject.make(PopulationPolicy(population))
    subject.feed(together, [0] * 3, 0, subject.tokens // 2)
    together.decide()
    subject.go_on(together, [0] * 3)
    for number, one in enumerate(population):
        alone = subject.read(one, rows=[0])
        alone.decide()
        subject.go_on(alone, [0])
        for mine, many in zip(alone.layers, together.layers, strict=True):
            pairs = zip(mine.view().slots[0], many.view().slots[number], strict=True)
            same = all(torch.equal(a[a >= 0], b[b >= 0]) for a, b in pairs)
            _require(same, f"candidate {number} holds other slots in a population than alone")


def check_rows(subject: Subject, manager: MemoryManager) -> None:
    """Rows that are selected and repeated go on as if they had been read so."""
    cache = subject.read(manager)
    last = subject.rows - 1
    cache.batch_select_indices(torch.tensor([last, 0]))
    cache.batch_repeat_interleave(2)
    order = [last, last, 0, 0]
    _same(cache, subject.read(manager, rows=order), "rows that were selected and repeated")
    subject.go_on(cache, order)
    again = subject.read(manager, rows=order)
    subject.go_on(again, order)
    _same(cache, again, "rows that were selected and repeated, and went on")


def check_state(subject: Subject, manager: MemoryManager) -> None:
    """A memory made of its state, or a clone, goes on to the bit; taking tokens back is exact or refused."""
    cache = subject.read(manager)
    cache.decide()
    facts, tensors = cache.state()
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    again, clone = subject.make(manager), cache.clone()
    again.load_state(facts, saved)
    for one in (cache, again, clone):
        subject.go_on(one)
    for other, name in ((again, "made of a state"), (clone, "cloned")):
        same = all(
            _equal(_slots(a.view(), a.view().valid), _slots(b.view(), b.view().valid), exactly=True)
            for a, b in zip(cache.layers, other.layers, strict=True)
        )
        _require(same and cache.nbytes() == other.nbytes(), f"a memory {name} goes on as another one")
    for layer in cache.layers:
        try:
            layer.crop(-1)
        except CacheError:
            continue
        _require(layer.is_croppable, "crop(-1) was neither refused nor is the memory said to be croppable")
    cache.reset()
    _require(cache.get_seq_length() == 0 and cache.nbytes() == 0, "reset() leaves something")


CHECKS: dict[str, Callable[[Subject, MemoryManager], None]] = {
    "pieces": check_pieces,
    "keep": check_keep,
    "decisions": check_decisions,
    "population": check_population,
    "rows": check_rows,
    "state": check_state,
}
"""Every check by name: a function of subject and manager, whose budget must be less than half of the tokens."""


# ---- parts ---------------------------------------------------------------------------------------------------------


def _varied(manager: MemoryManager, seed: int) -> MemoryManager:
    """Return a manager of the same kind with other parameters; itself where it has none."""
    other = manager.with_options()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw).to(parameter))
    return other


def _slots(view: LayerView, chosen: Tensor) -> dict[str, Tensor]:
    """Return what is known of some slots, those of all heads one after the other, and how many each head has."""
    slotwise = {"keys": view.keys, "values": view.values, "slots": view.slots}
    slotwise |= {n: t for n, t in view.recorded.items() if t.shape[:3] == view.slots.shape}
    return {name: tensor[chosen] for name, tensor in slotwise.items()} | {"counts": chosen.sum(-1)}


def _bytes_of_slots(layer: ExplicitLayer) -> int:
    """Return the bytes of slots, without those of a row: a memory may remember more of what has left."""
    of_rows = sum(tensor.numel() * tensor.element_size() for tensor in layer.recorder.rowwise.values())
    return int(layer.bytes_by_row().sum()) - of_rows


def _equal(mine: dict[str, Tensor], theirs: dict[str, Tensor], *, exactly: bool = False) -> bool:
    if mine.keys() != theirs.keys() or any(mine[name].shape != theirs[name].shape for name in mine):
        return False
    close = torch.equal if exactly else lambda a, b: torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)
    return all(
        close(mine[name], theirs[name]) if mine[name].is_floating_point() else torch.equal(mine[name], theirs[name])
        for name in mine
    )


def _same(one: ExplicitCache, other: ExplicitCache, what: str) -> None:
    for index, (mine, theirs) in enumerate(zip(one.layers, other.layers, strict=True)):
        views = mine.view(), theirs.view()
        same = _equal(*(_slots(view, view.valid) for view in views))
        _require(same and views[0].seen == views[1].seen, f"layer {index}: {what}: another memory")


def _require(right: bool, what: str) -> None:
    if not right:
        raise ConformanceError(what)
