"""The memory matrix: its rules against plain loops, their limits, and what its layer keeps."""

from __future__ import annotations

import copy
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from evomem.errors import CacheError, ConfigError
from evomem.managers.heuristics.replacement import relevance
from evomem.memory.explicit.matrix import MatrixCache, MatrixLayer
from evomem.memory.explicit.matrix_rules import RULES, Write, check_rule, latest, read, scan, write_weights
from tests.support.slow_matrix import SlowMatrix

BATCH, HEADS, TOKENS, SLOTS, WIDTH = 2, 2, 5, 4, 3
ONE = torch.tensor(1.0, dtype=torch.float64)


def random_writes(seed, tokens=TOKENS):
    """Writes of random tokens, fp64."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(BATCH, HEADS, tokens, *shape, generator=draw, dtype=torch.float64)

    gates = {"store": normal().sigmoid(), "erase": normal(WIDTH).sigmoid()}
    return Write(
        normal(WIDTH), normal(WIDTH), input_bias=normal(), forget_key=normal(WIDTH), forget_bias=normal(), **gates
    )


def random_matrix(seed):
    return torch.randn(BATCH, HEADS, SLOTS, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rule", RULES)
@examples(max_examples=5)
@given(seed=st.integers(0, 1000), tokens=st.integers(1, 6))
def test_rules_are_those_of_plain_loops(rule, seed, tokens):
    matrix, writes = random_matrix(seed), random_writes(seed, tokens)
    decay = torch.rand(HEADS, SLOTS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    before, weights, after = scan(matrix, writes, rule, decay)
    for row in range(BATCH):
        for head in range(HEADS):
            slow = SlowMatrix(matrix[row, head].tolist(), rule, decay[head].tolist())
            for token in range(tokens):
                torch.testing.assert_close(before[row, head, token].tolist(), slow.rows)
                key = writes.key[row, head, token]
                content, shares = read(before[row, head, token], key)
                torch.testing.assert_close((content.tolist(), shares.tolist()), slow.read(key.tolist()))
                one = {field.name: getattr(writes, field.name)[row, head, token].tolist() for field in fields(writes)}
                torch.testing.assert_close(weights[row, head, token].tolist(), slow.write(one))
            torch.testing.assert_close(after[row, head].tolist(), slow.rows)


@pytest.mark.parametrize("rule", ["leaky", "ema", "erase_add"])
def test_weights_sum_to_one_and_to_what_is_stored(rule):
    matrix, writes = random_matrix(0), random_writes(0)
    write = writes.token(0)
    assert write.store is not None
    torch.testing.assert_close(write_weights(matrix, write, rule).sum(-1), write.store)
    whole = Write(write.key, write.value)
    torch.testing.assert_close(write_weights(matrix, whole, rule).sum(-1), torch.ones_like(write.store))
    torch.testing.assert_close(read(matrix, write.key)[1].sum(-1), torch.ones_like(write.store))


def test_limits_of_decay():
    """λ = 1 forgets nothing, λ = 0 all that was there before the last write."""
    matrix, writes = random_matrix(1), random_writes(1)
    zero, last = torch.zeros_like(ONE), writes.token(TOKENS - 1)
    for rule in RULES:
        _, weights, after = scan(matrix, writes, rule, zero)
        added = torch.tanh(last.value) if rule == "gated" else last.value
        torch.testing.assert_close(after, weights[:, :, -1, :, None] * added[..., None, :])
    _, weights, after = scan(matrix, writes, "leaky", ONE)
    torch.testing.assert_close(after, matrix + torch.einsum("bhtn,bhtd->bhnd", weights, writes.value))
    assert torch.equal(scan(matrix, writes, "ema", ONE)[2], matrix)
    slots = torch.tensor([1.0, 0, 1, 0], dtype=torch.float64)  # a λ for every slot
    _, weights, after = scan(matrix, writes, "leaky", slots)
    torch.testing.assert_close(after[:, :, 1::2], (weights[:, :, -1, :, None] * last.value[..., None, :])[:, :, 1::2])


def test_limits_of_gates():
    matrix, writes = random_matrix(2), random_writes(2)
    write = writes.token(0)
    one_hot = torch.eye(SLOTS, dtype=torch.float64)[1].expand(BATCH, HEADS, SLOTS)
    erased = Write(write.key, write.value, erase=torch.ones_like(write.value))
    after = RULES["erase_add"](matrix, one_hot, erased, ONE)
    assert torch.equal(after[:, :, 1], write.value)
    assert torch.equal(after[:, :, [0, 2, 3]], matrix[:, :, [0, 2, 3]])
    added = RULES["erase_add"](matrix, one_hot, Write(write.key, write.value, erase=torch.zeros_like(write.value)), ONE)
    torch.testing.assert_close(added, RULES["leaky"](matrix, one_hot, write, ONE))
    shut = torch.full_like(writes.store, -1e9)
    closed = Write(writes.key, writes.value, input_bias=shut, forget_key=writes.key, forget_bias=-shut)
    assert torch.equal(scan(matrix, closed, "gated", ONE)[2], matrix)
    for rule in ("leaky", "erase_add", "gated"):  # a write that is not stored changes nothing
        skipped = Write(writes.key, writes.value, torch.zeros_like(writes.store), writes.erase)
        assert torch.equal(scan(matrix, skipped, rule, ONE)[2], matrix)
    with pytest.raises(ConfigError, match="erase_add"):
        check_rule("overwrite")


def test_padding_changes_nothing():
    matrix, writes = random_matrix(3), random_writes(3)
    real = torch.tensor([[False, False, True, True, True], [True] * 5])
    _, weights, after = scan(matrix, writes, "ema", ONE / 2, real)
    parts = {field.name: getattr(writes, field.name)[:1, :, 2:] for field in fields(writes)}
    torch.testing.assert_close(after[:1], scan(matrix[:1], Write(**parts), "ema", ONE / 2)[2])
    assert not bool(weights[0, :, :2].any())


# ---- who is replaced -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0)])
@examples(max_examples=10)
@given(requests=st.lists(st.integers(0, 7), min_size=1, max_size=40))
def test_relevance_replaces_as_lfu_and_lru_do(weights, requests):
    """A trace of sharp reads: who leaves is who a cache with counters and a clock would let go."""
    layer, items = MatrixLayer(), [None] * SLOTS
    layer.begin(torch.zeros(1, 1, SLOTS, WIDTH, dtype=torch.float64))
    counts, times = [0] * SLOTS, [-1] * SLOTS
    for clock, item in enumerate(requests):
        hit = item in items
        if hit:
            slot = items.index(item)
        else:
            slow = counts if weights[0] else times
            slot = slow.index(min(slow))
            score = relevance(layer.frequency, layer.recency, torch.zeros(1, 1, SLOTS), weights)[0, 0]
            assert slot == int(score.argmin())
            items[slot], counts[slot] = item, 0
            layer.frequency[..., slot] = 0
        counts[slot], times[slot] = counts[slot] + 1, clock
        touched = torch.eye(SLOTS, dtype=torch.float64)[slot].expand(1, 1, 1, SLOTS)
        layer.advance(layer.matrix, touched * (not hit), touched)
        layer.seen += 1
    assert layer.frequency[0, 0].tolist() == counts
    assert layer.last_read[0, 0].tolist() == times


@examples(max_examples=10)
@given(seed=st.integers(0, 1000), cut=st.integers(0, 6))
def test_the_last_touch_is_that_of_a_loop(seed, cut):
    weights = torch.rand(1, 1, 6, SLOTS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    slow = torch.full((1, 1, SLOTS), -1.0, dtype=torch.float64)
    begin = slow
    for token in range(6):
        slow = slow + weights[:, :, token] * (10 + token - slow)
    halves = begin
    for first, part in ((10, weights[:, :, :cut]), (10 + cut, weights[:, :, cut:])):
        if part.shape[2]:
            halves = latest(halves, part, first)
    torch.testing.assert_close(halves, slow)


# ---- the layer -------------------------------------------------------------------------------------------------------


def filled(rows=2):
    """A cache of two layers after 5 tokens."""
    cache, draw = MatrixCache(2), torch.Generator().manual_seed(0)
    cache.begin_rows(rows, torch.device("cpu"))
    for layer in cache.layers:
        layer.begin(torch.randn(rows, 1, SLOTS, WIDTH, generator=draw))
        touched = torch.rand(rows, 1, 5, SLOTS, generator=draw)
        layer.advance(layer.matrix + 1, touched, touched)
        layer.window_keys = layer.window_values = torch.randn(rows, 2, 3, 4, generator=draw)
        layer.window_real, layer.tail, layer.seen = torch.ones(rows, 3, dtype=torch.bool), torch.randn(rows, 1, 8), 5
    return cache


def same(one, two):
    first, second = one.tensors(), two.tensors()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_rows_are_selected_repeated_and_reordered():
    cache = filled()
    other = copy.deepcopy(cache)
    other.batch_repeat_interleave(2)
    assert other.layers[1].matrix.shape[0] == 4
    other.reorder_cache(torch.tensor([3, 0]))
    other.batch_select_indices(torch.tensor([1, 0]))
    assert same(other, cache)
    assert cache.nbytes() == sum(t.numel() * t.element_size() for t in list(cache.tensors().values())[1:])
    cache.reset()
    assert not cache.nbytes()
    assert cache.get_seq_length() == 0


def test_tokens_cannot_be_taken_back():
    cache = filled()
    for whole in (5, 9, 0):
        cache.crop(whole)
    for fewer in (-1, 3):
        with pytest.raises(CacheError, match="deepcopy"):
            cache.crop(fewer)
    with pytest.raises(CacheError, match="another model"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
    with pytest.raises(CacheError, match="nothing has been read"):
        _ = MatrixLayer().age


def test_what_is_saved_is_checked_when_it_is_read():
    cache = filled()
    saved = cache.tensors()
    assert same(MatrixCache.of(saved, 2), cache)
    assert MatrixCache.of(MatrixCache(2).tensors(), 2).get_seq_length() == 0
    for name, wrong, message in (
        ("seen", torch.tensor(-1), "no count"),
        ("0.matrix", None, "missing"),
        ("0.matrix", torch.zeros(2, 1, SLOTS + 1, WIDTH), "shape"),
        ("0.matrix", torch.zeros(3, 1, SLOTS, WIDTH), "instead of"),
        ("0.window_real", None, "missing"),
        ("1.frequency", torch.full((2, 1, SLOTS), torch.nan), "no number"),
        ("1.window_real", torch.ones(2, 3), "float32"),
        ("5.window_real", torch.ones(2, 3), "no layer"),
        ("0.window_keys", torch.zeros(2, 2, 9, 4), "after 5 tokens"),
        ("1.tail", torch.zeros(3, 1, 8), "instead of"),
    ):
        broken = {key: value for key, value in {**saved, name: wrong}.items() if value is not None}
        with pytest.raises(CacheError, match=message):
            MatrixCache.of(broken, 2)
    cache.layers[0].seen = 6
    with pytest.raises(CacheError, match="cut short"):
        cache.tensors()
