"""Pair memories: equal to lists of Python token by token, however tokens come in pieces, rows move, and slots leave."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from evomem.errors import CacheError, ConfigError
from evomem.managers import build
from evomem.memory.explicit import ExplicitCache, PairMemory
from evomem.memory.view import Decision
from tests.support.slow_pairs import SlowPairs

HALF_LIFE, WIDTH = 5, 3
OBSERVES = frozenset({"frequency", f"frequency_decayed:{HALF_LIFE}", "recency", "surprise", f"relevance:{WIDTH}"})
BATCH, HEADS, DIM = 2, 2, 4
BETAS = pytest.mark.parametrize("beta", [None, 3.0], ids=["by name", "softmax"])


def tokens(count, seed, names=6):
    """Return random tokens for every row and head; keys of one name are the same."""
    draw = torch.Generator().manual_seed(seed)
    table = torch.randn(names, DIM, generator=draw)
    name = torch.randint(0, names, (BATCH, HEADS, count), generator=draw)
    mark = torch.randint(0, 2, (BATCH, HEADS, count), generator=draw)
    reads, writes = torch.rand(2, BATCH, HEADS, count, generator=draw) < 0.7
    values = torch.randn(BATCH, HEADS, count, DIM + 1, generator=draw)
    return {"keys": table[name], "values": values, "names": name, "marks": mark, "reads": reads, "writes": writes}


def part(fed, begin, end):
    """Return some of the tokens."""
    return {name: tensor[:, :, begin:end] for name, tensor in fed.items()}


def feed_slowly(slow, fed, absent):
    """Feed tokens to a `SlowPairs` of every row and head; returns what each of them read."""
    count = fed["names"].shape[2]
    return [
        [
            [slow[b][h].feed(*(fed[n][b, h, t].tolist() for n in fed), absent) for t in range(count)]
            for h in range(HEADS)
        ]
        for b in range(BATCH)
    ]  # fmt: skip


def require_equal(memory, slow):
    """Require that a memory holds, and has observed, what the lists have."""
    view = memory.view()
    assert memory.counts().tolist() == [[len(head.slots) for head in row] for row in slow]
    for b, row in enumerate(slow):
        for h, head in enumerate(row):
            there = view.valid[b, h]
            assert view.slots[b, h][there].tolist() == [slot.token for slot in head.slots]
            assert memory.storage.whole("names")[b, h][there].tolist() == [slot.name for slot in head.slots]
            if not head.slots:
                continue
            torch.testing.assert_close(view.keys[b, h][there], torch.tensor([slot.key for slot in head.slots]))
            torch.testing.assert_close(view.values[b, h][there], torch.tensor([slot.value for slot in head.slots]))
            for name, numbers in head.observed(HALF_LIFE, WIDTH).items():
                measured = view.recorded[name][b, h][there]
                torch.testing.assert_close(
                    measured.double(), torch.tensor(numbers).double(), rtol=1e-4, atol=1e-5, msg=name
                )


def thinned(memory, slow, seed):
    """Let random slots leave both, differently many in every head; returns the mask."""
    slots = memory.slots
    mask = torch.rand(slots.shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    memory.keep(mask)
    for b, row in enumerate(slow):
        for h, head in enumerate(row):
            head.keep(set(slots[b, h][mask[b, h]].tolist()))
    return mask


@BETAS
@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("piece", [1, 3, 12])
def test_a_memory_is_the_lists_whatever_the_pieces(beta, absent, piece):
    memory = PairMemory(observes=OBSERVES, beta=beta)
    slow = [[SlowPairs(beta) for _ in range(HEADS)] for _ in range(BATCH)]
    for turn in range(3):
        fed = tokens(12, turn)
        expected = feed_slowly(slow, fed, absent)
        for begin in range(0, 12, piece):
            some = part(fed, begin, begin + piece)
            read = memory.feed(**some, absent=absent, wants_values=True)
            for b in range(BATCH):
                for h in range(HEADS):
                    marks = [one[0] for one in expected[b][h][begin : begin + piece]]
                    assert read.mark[b, h].tolist() == [-1 if mark is None else mark for mark in marks]
                    assert read.hit[b, h].tolist() == [mark is not None for mark in marks]
                    wanted = torch.tensor([one[1] for one in expected[b][h][begin : begin + piece]]).float()
                    torch.testing.assert_close(read.values[b, h], wanted, rtol=1e-4, atol=1e-5)
        require_equal(memory, slow)
        thinned(memory, slow, seed=turn)
        require_equal(memory, slow)


def test_softmax_reads_sum_to_one_where_there_is_anything_to_read():
    memory = PairMemory(beta=2.0)
    fed = tokens(9, 0)
    fed["reads"] = fed["writes"] = torch.ones_like(fed["reads"])
    read = memory.feed(**fed, wants_values=True)
    sums = read.weights.sum(-1)
    assert (sums[:, :, 0] == 0).all()  # the first token has nothing before it
    torch.testing.assert_close(sums[:, :, 1:], torch.ones_like(sums[:, :, 1:]))


def test_a_large_beta_reads_by_name():
    fed = tokens(9, 0)
    fed["keys"] = torch.nn.functional.normalize(fed["keys"], dim=-1)
    fed["reads"] = fed["writes"] = torch.ones_like(fed["reads"])
    fed["marks"] = fed["names"]
    exact, near = (PairMemory(beta=beta).feed(**fed, absent=True, wants_values=True) for beta in (None, 1e4))
    assert exact.hit.any()
    assert not exact.hit.all()
    torch.testing.assert_close(near.values[exact.hit], exact.values[exact.hit], rtol=1e-4, atol=1e-4)


def test_what_fades_entirely_is_not_read():
    memory, less = PairMemory(beta=1.0), PairMemory(beta=1.0)
    fed = tokens(5, 1)
    fed["writes"] = torch.ones_like(fed["writes"])
    memory.feed(**fed)
    less.feed(**fed)
    gone = torch.tensor([True, False, True, True, True]).expand(BATCH, HEADS, 5)
    memory.decay(torch.where(gone, 0.0, -torch.inf))
    less.keep(gone)
    query = torch.randn(BATCH, HEADS, 3, DIM)
    torch.testing.assert_close(memory.read(query), less.read(query))


@BETAS
def test_saved_in_the_middle_it_goes_on_to_the_bit(beta):
    memory = PairMemory(observes=OBSERVES, beta=beta)
    memory.feed(**tokens(10, 0))
    memory.keep(torch.rand(memory.slots.shape, generator=torch.Generator().manual_seed(1)) < 0.5)
    memory.feed(**tokens(3, 1))
    facts, tensors = memory.state()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    again, clone = PairMemory(observes=OBSERVES, beta=beta), memory.clone()
    again.load_state(facts, tensors)
    for one in (memory, again, clone):
        one.feed(**tokens(8, 2))
    wanted = memory.view().tensors()
    for other in (again, clone):
        assert all(torch.equal(wanted[name], tensor) for name, tensor in other.view().tensors().items())
        assert (other.nbytes(), other.bytes_peak, other.bytes_mean) == (
            memory.nbytes(), memory.bytes_peak, memory.bytes_mean,
        )  # fmt: skip


def test_a_damaged_state_is_refused():
    memory = PairMemory(observes=OBSERVES)
    memory.feed(**tokens(10, 0))
    memory.keep(torch.rand(memory.slots.shape, generator=torch.Generator().manual_seed(1)) < 0.5)
    facts, tensors = memory.state()
    with pytest.raises(CacheError, match="records"):
        PairMemory().load_state(facts, tensors)
    for changed in ({"seen": -1}, {"dense": 1}, {"_byte_tokens": float("nan")}):
        with pytest.raises(CacheError, match=next(iter(changed))):
            PairMemory(observes=OBSERVES).load_state({**facts, **changed}, tensors)
    for name in ("start", "even.slots", "lengths", "slotwise.recency", "rowwise.queries"):
        with pytest.raises(CacheError, match="missing, or no part"):
            PairMemory(observes=OBSERVES).load_state(facts, {**tensors, name: tensors[name][:1]})
        with pytest.raises(CacheError, match="missing, or no part"):
            PairMemory(observes=OBSERVES).load_state(facts, {k: v for k, v in tensors.items() if k != name})


@BETAS
def test_rows_move_as_rows_of_a_tensor(beta):
    memory = PairMemory(observes=OBSERVES, beta=beta)
    slow = [[SlowPairs(beta) for _ in range(HEADS)] for _ in range(BATCH)]
    fed = tokens(10, 0)
    feed_slowly(slow, fed, False)
    memory.feed(**fed)
    thinned(memory, slow, 0)
    cache = ExplicitCache([memory], policy=Nobody())
    cache.reorder_cache(torch.tensor([1, 0]))
    require_equal(memory, slow[::-1])
    cache.batch_repeat_interleave(2)
    require_equal(memory, [slow[1], slow[1], slow[0], slow[0]])
    cache.batch_select_indices(torch.tensor([3]))
    require_equal(memory, [slow[0]])
    assert int(cache.bytes_by_row().sum()) == cache.nbytes()


class Nobody:
    """A policy that observes what the memories record and decides nothing."""

    observes = OBSERVES


def test_bytes_are_those_of_the_tensors():
    memory = PairMemory(beta=1.0)
    memory.feed(**tokens(10, 0))
    memory.keep(torch.rand(memory.slots.shape, generator=torch.Generator().manual_seed(1)) < 0.5)
    slots = int(memory.counts().sum())
    each = 4 * DIM + 4 * (DIM + 1) + 3 * 8  # key, value, token, name, mark
    assert memory.nbytes() == int(memory.bytes_by_row().sum()) == slots * each
    memory.decay(torch.zeros(memory.slots.shape))
    assert memory.nbytes() == slots * (each + 4)


def test_the_match_is_with_the_queries_of_the_tokens_that_read():
    memory = PairMemory(observes=frozenset({"relevance:6"}))
    keys, names = torch.randn(2, 1, 9, 4), torch.arange(9).expand(2, 1, 9)
    reads = torch.rand(2, 1, 9, generator=torch.Generator().manual_seed(3)) < 0.5
    reads[1, :, 3:] = False  # in one row none of the last six reads
    memory.feed(keys, keys, names, reads=reads)
    match = memory.view().recorded["relevance:6"]
    for row in range(2):
        queries = [keys[row, 0, token] for token in range(3, 9) if reads[row, 0, token]]
        for slot in range(9):
            cosines = [float(F.cosine_similarity(keys[row, 0, slot], query, dim=0)) for query in queries]
            assert float(match[row, 0, slot]) == pytest.approx(sum(cosines) / max(len(cosines), 1), abs=1e-6)


def test_attention_of_last_queries_is_observed_where_reads_are_a_softmax():
    keys, names = torch.randn(2, 1, 9, 4), torch.arange(9).expand(2, 1, 9)
    memory = PairMemory(observes=frozenset({"window_attention:1"}), beta=3.0)
    memory.feed(keys, keys, names)
    wanted = (3.0 * keys[:, :, -1:] @ keys.transpose(-1, -2)).softmax(-1)[:, :, 0]
    torch.testing.assert_close(memory.view().recorded["window_attention:1"], wanted)
    with pytest.raises(ConfigError, match="reads that are one softmax over all slots, which a pair memory does not"):
        PairMemory(observes=frozenset({"window_attention:1"}))


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ConfigError, match="'query_statistics' needs queries at positions"):
        PairMemory(observes=frozenset({"query_statistics"}))
    memory = PairMemory()
    with pytest.raises(CacheError, match="nothing has been read"):
        memory.view()
    with pytest.raises(CacheError, match="attention"):
        memory.update(torch.zeros(1), torch.zeros(1))
    fed = tokens(4, 0)
    memory.feed(**fed)
    with pytest.raises(CacheError, match="cannot take tokens back"):
        memory.crop(-1)
    memory.crop(4)
    with pytest.raises(CacheError, match="rows"):
        memory.feed(**{name: tensor[:1] for name, tensor in fed.items()})
    with pytest.raises(CacheError, match="names of at least 0"):
        memory.feed(**{**fed, "names": fed["names"] - 9})
    with pytest.raises(CacheError, match="by names"):
        memory.read(fed["keys"])
    with pytest.raises(ConfigError, match="read by names, which finds a slot however far it has faded"):
        memory.apply(Decision(memory.slots >= 0, torch.zeros(memory.slots.shape)))
    with pytest.raises(CacheError, match="observes"):
        ExplicitCache([memory], policy=Nobody())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"marks": torch.zeros(BATCH, HEADS, 2, dtype=torch.int64)}, "marks"),
        ({"marks": torch.zeros(BATCH, HEADS, 3)}, "marks"),
        ({"reads": torch.ones(BATCH, HEADS, 3, dtype=torch.int64)}, "reads"),
        ({"writes": torch.ones(3, dtype=torch.bool)}, "writes"),
        ({"names": torch.zeros(BATCH, HEADS, 3)}, "int64"),
        ({"keys": torch.full((BATCH, HEADS, 3, DIM), torch.nan)}, "keys: some are no finite"),
        ({"values": torch.full((BATCH, HEADS, 3, DIM + 1), torch.inf)}, "values: some are no finite"),
        ({"keys": torch.ones(BATCH, HEADS, 3, DIM, dtype=torch.float64)}, "float64 for a memory of torch.float32"),
        ({"values": torch.ones(BATCH, HEADS, 3, DIM + 1, dtype=torch.int64)}, "floats of one type"),
    ],
)
def test_tokens_that_do_not_fit_are_refused_and_leave_no_trace(changed, message):
    memory = PairMemory(beta=3.0)
    memory.feed(**tokens(4, 1))
    before = memory.clone()
    with pytest.raises(CacheError, match=message):
        memory.feed(**(tokens(3, 2) | changed))
    assert memory.seen == 4
    assert torch.equal(memory.keys, before.keys)


def test_no_tokens_are_refused_and_a_refusal_does_not_fix_the_rows():
    memory = PairMemory()
    with pytest.raises(CacheError, match="at least one token"):
        memory.feed(**part(tokens(2, 1), 0, 0))
    wrong = tokens(2, 1)
    with pytest.raises(CacheError, match="give the same"):
        memory.feed(**(wrong | {"keys": wrong["keys"][:1]}))
    memory.feed(**tokens(2, 1))
    assert memory.seen == 2


@pytest.mark.parametrize("beta", [-1.0, torch.nan, torch.inf, True, "8"])
def test_a_beta_that_is_none_is_refused(beta):
    with pytest.raises(ConfigError, match="at least 0"):
        PairMemory(beta=beta)


@pytest.mark.parametrize(("saved", "own"), [(None, 3.0), (3.0, None), (3.0, 2.0)])
def test_a_state_of_other_reads_is_refused(saved, own):
    memory = PairMemory(beta=saved)
    memory.feed(**tokens(3, 1))
    with pytest.raises(CacheError, match="beta: it was read with"):
        PairMemory(beta=own).load_state(*memory.state())
    facts, held = memory.state()
    again = PairMemory(beta=saved)
    again.load_state({name: value for name, value in facts.items() if name != "beta"}, held)  # of an older version
    assert again.seen == 3


def test_queries_fading_and_masks_that_do_not_fit_are_refused():
    memory = PairMemory(beta=3.0)
    memory.feed(**tokens(3, 1) | {"writes": torch.ones(BATCH, HEADS, 3, dtype=torch.bool)})
    for shape in ((BATCH + 1, HEADS, 1, DIM), (BATCH, HEADS, 1, DIM + 1), (BATCH, HEADS, DIM)):
        with pytest.raises(CacheError, match="queries"):
            memory.read(torch.ones(shape))
    slots = tuple(memory.slots.shape)
    for decay in (torch.full(slots, torch.nan), torch.ones(slots), torch.zeros(1)):
        with pytest.raises(CacheError, match="log-decay"):
            memory.decay(decay)
    with pytest.raises(CacheError, match="bool"):
        memory.keep(torch.full(slots, 2))
    with pytest.raises(CacheError, match="at least one"):
        ExplicitCache([], build("lru", budget=2))
