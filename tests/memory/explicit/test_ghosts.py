"""Histories of names, in slots and as ghosts: lists of Python say the same; they are saved, counted, and refused."""

from __future__ import annotations

import pytest
import torch

from evomem.errors import CacheError, ConfigError
from evomem.managers import build
from evomem.memory.explicit import ExplicitCache, PairMemory
from evomem.memory.observations import ghosts
from evomem.testing.models import tiny
from tests.support.slow_ghosts import SlowGhosts

ROWS, HEADS, TOKENS, DIM, NAMES, LONGEST = 2, 2, 60, 4, 9, 25
FREQUENCY, DISTANCE = "ghost_frequency", f"backward_distance:{LONGEST}"
BOTH = frozenset({FREQUENCY, DISTANCE})


def requests(changing=0.2, seed=0):
    """Return random requests; with probability ``changing`` one gives its item a new value."""
    draw = torch.Generator().manual_seed(seed)
    shape = (ROWS, HEADS, TOKENS)
    names = torch.randint(0, NAMES, shape, generator=draw)
    marks = (torch.rand(shape, generator=draw) < changing).long().cumsum(-1) % 3
    reads, writes = (torch.rand(shape, generator=draw) < share for share in (0.8, 0.6))
    return {"names": names, "marks": marks, "reads": reads, "writes": writes}


def fed(memory, drawn, begin, end):
    part = {name: tensor[:, :, begin:end] for name, tensor in drawn.items()}
    vectors = torch.ones(*part["names"].shape, DIM)
    memory.feed(vectors, vectors, absent=True, **part)


def check(memory, slow):
    """Compare what is observed of every slot, and the ghosts of every head."""
    view = memory.view()
    names = memory.recorder.rowwise[ghosts.GHOSTS]
    for row in range(ROWS):
        for head in range(HEADS):
            one, tokens = slow[row][head], view.slots[row, head].tolist()
            observed = (view.recorded[name][row, head].tolist() for name in (FREQUENCY, DISTANCE))
            mine = {t: (int(n), d) for t, n, d in zip(tokens, *observed, strict=True) if t >= 0}
            assert mine == one.observed(LONGEST)
            assert [name for name in names[row, head].tolist() if name >= 0] == one.ghosts


@pytest.mark.parametrize("changing", [0.0, 0.3], ids=["fixed values", "new values"])
@pytest.mark.parametrize("even", [True, False], ids=["even heads", "uneven heads"])
@pytest.mark.parametrize("piece", [1, 3, 10])
def test_lists_say_the_same(piece, even, changing):
    drawn, memory = requests(changing), PairMemory(observes=BOTH)
    slow = [[SlowGhosts() for _ in range(HEADS)] for _ in range(ROWS)]
    remembered = 0
    for begin in range(0, TOKENS, piece):
        fed(memory, drawn, begin, min(begin + piece, TOKENS))
        slots = memory.view().slots
        worth = torch.rand(slots.shape, generator=torch.Generator().manual_seed(begin)).masked_fill(slots < 0, -1.0)
        most = min(4, int((slots >= 0).sum(-1).min()))
        keep = torch.zeros_like(slots, dtype=torch.bool).scatter(-1, worth.topk(most, -1).indices, value=True)
        keep = keep if even else worth > 0.2
        memory.keep(keep)
        for row in range(ROWS):
            for head in range(HEADS):
                one = slow[row][head]
                for token in range(begin, min(begin + piece, TOKENS)):
                    one.feed(*(drawn[n][row, head, token].item() for n in drawn))
                one.keep(set(slots[row, head][keep[row, head]].tolist()))
                remembered += len(one.ghosts)
        check(memory, slow)
    assert remembered > 0


def test_what_comes_back_has_its_history_again():
    memory = PairMemory(observes=BOTH)
    one = {"marks": 0, "reads": True, "writes": True}

    def ask(*names):
        for name in names:
            fed(memory, {n: torch.tensor([[[x]]]) for n, x in {"names": name, **one}.items()}, 0, 1)

    ask(7, 7, 7, 8)
    memory.keep(memory.view().slots == 3)  # item 7 leaves
    ask(7)
    recorded = memory.view().recorded
    assert recorded[FREQUENCY].tolist() == [[[1.0, 4.0]]]
    assert recorded[DISTANCE].tolist() == [[[LONGEST, 2]]]


def test_ghosts_are_as_many_as_slots_and_counted_in_bytes():
    memory, drawn = PairMemory(observes=BOTH), requests(0.0)
    fed(memory, {**drawn, "writes": torch.ones_like(drawn["writes"])}, 0, TOKENS)
    ranks = torch.arange(NAMES).expand(ROWS, HEADS, -1)
    before = memory.bytes_by_row()
    memory.keep(ranks < 5)
    gone, ghost = (NAMES - 5) * memory.bytes_per_token(), 8 + 4 + 2 * 4
    assert (memory.recorder.rowwise[ghosts.GHOSTS] >= 0).sum(-1).unique().tolist() == [NAMES - 5]
    left = memory.recorder.rowwise[ghosts.GHOSTS].shape[-1]
    assert (memory.bytes_by_row() - before == HEADS * left * ghost - gone).all()
    memory.keep(torch.arange(5).expand(ROWS, HEADS, -1) < 2)
    assert (memory.recorder.rowwise[ghosts.GHOSTS] >= 0).sum(-1).unique().tolist() == [2]


def test_a_state_without_its_ghosts_is_refused():
    memory = PairMemory(observes=BOTH)
    fed(memory, requests(), 0, 20)
    facts, tensors = memory.state()
    for name in (f"rowwise.{ghosts.GHOSTS}", f"rowwise.ghosts.{DISTANCE}", f"slotwise.{FREQUENCY}"):
        with pytest.raises(CacheError, match="is missing"):
            PairMemory(observes=BOTH).load_state(facts, {n: t for n, t in tensors.items() if n != name})
    long = {**tensors, f"rowwise.ghosts.{DISTANCE}": torch.zeros(ROWS, HEADS, 3, 2, dtype=torch.int32)}
    with pytest.raises(CacheError, match="is missing, or no part"):
        PairMemory(observes=BOTH).load_state(facts, long)


def test_times_that_do_not_fit_are_refused():
    memory = PairMemory(observes=BOTH)
    fed(memory, requests(), 0, 20)
    memory.seen = ghosts.LAST_TOKEN
    with pytest.raises(CacheError, match="counted for the first 2147483647 tokens"):
        fed(memory, requests(), 20, 21)


@pytest.mark.parametrize("spec", [FREQUENCY, DISTANCE])
def test_it_is_refused_where_keys_have_no_names(spec):
    manager = build(f"feature_scorer(features=['{spec}'])", budget=8)
    with pytest.raises(ConfigError, match="needs reads by name, which a KV cache does not have"):
        manager.attach(tiny("llama", layers=1)).__enter__()
    with pytest.raises(ConfigError, match="needs reads by name, which a pair memory does not have"):
        ExplicitCache([PairMemory(observes=manager.observes, beta=2.0)], manager)
