"""The neural memory: chunks against single tokens by autograd, its limits, and what its layer keeps."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from evomem.errors import CacheError
from evomem.memory.explicit.neural import NeuralCache, NeuralLayer
from evomem.memory.explicit.neural_rules import (
    Gates,
    answer,
    coefficients,
    count,
    linear_scan,
    matrices,
    surprise,
    widths_of,
)
from tests.support.slow_neural import SlowNeural

BATCH, HEADS, SIZE = 2, 2, 4


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens_of(seed, tokens):
    """Keys of length 1, values and queries."""
    keys, values, queries = normal(seed, 3, BATCH, HEADS, tokens, SIZE)
    return F.normalize(keys, dim=-1), values, F.normalize(queries, dim=-1)


def gates_of(seed, tokens):
    return Gates(*torch.sigmoid(normal(seed, 3, BATCH, HEADS, tokens)))


def layer_of(widths, seed=0):
    layer = NeuralLayer()
    layer.begin(normal(seed, HEADS, count(widths)) / SIZE**0.5, BATCH)
    layer.start = torch.zeros(BATCH, dtype=torch.int64)
    return layer


def fed(layer, parts, gates, widths, segment, cuts=(), limit=None):
    """What every token reads, segment after segment, and in further pieces."""
    keys, values, queries = parts
    tokens = keys.shape[2]
    ends, at, reads = sorted({*range(segment, tokens, segment), *cuts, tokens} - {0}), 0, []
    for end in ends:
        now = slice(at, end)
        part = Gates(*(getattr(gates, name)[:, :, now] for name in ("forget", "momentum", "rate")))
        reads.append(layer.exchange(*(x[:, :, now] for x in (keys, values, queries)), part, widths, limit)[0])
        if end % segment == 0:
            layer.end_segment(None)
        layer.finish(end - at)
        at = end
    return torch.cat(reads, 2)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@examples(max_examples=6)
@given(
    seed=st.integers(0, 1000), tokens=st.integers(1, 9), segment=st.integers(1, 5),
    cuts=st.lists(st.integers(1, 8), max_size=2), limit=st.sampled_from([None, 0.7]),
)  # fmt: skip
def test_chunks_are_single_tokens(depth, seed, tokens, segment, cuts, limit):
    """Any segment, cut anywhere: what is read, the weights and the momentum; no row or head sees another's."""
    widths = widths_of(SIZE, depth, expansion=2)
    parts, gates, layer = tokens_of(seed, tokens), gates_of(seed + 1, tokens), layer_of(widths, seed)
    initial = layer.memory
    reads = fed(layer, parts, gates, widths, segment, [cut for cut in cuts if cut < tokens], limit)
    for row in range(BATCH):
        for head in range(HEADS):
            slow = SlowNeural(matrices(initial[row, head], widths), segment, limit)
            for token in range(tokens):
                key, value, query = (part[row, head, token] for part in parts)
                slow.write(key, value, *(getattr(gates, n)[row, head, token] for n in ("forget", "momentum", "rate")))
                torch.testing.assert_close(reads[row, head, token], slow.read(query), rtol=1e-8, atol=1e-8)
            for numbers, slow_matrices in ((layer.memory, slow.matrices), (layer.momentum, slow.momentum)):
                torch.testing.assert_close(matrices(numbers[row, head], widths), slow_matrices, rtol=1e-8, atol=1e-8)


@examples(max_examples=10)
@given(seed=st.integers(0, 1000), tokens=st.integers(1, 9))
def test_the_associative_scan_is_a_loop(seed, tokens):
    keep, inputs = normal(seed, 2, tokens), normal(seed, 2, tokens, 3)
    keep[0, tokens // 2], state = 0, torch.zeros(2, 3, dtype=torch.float64)
    scanned = linear_scan(keep, inputs)
    for token in range(tokens):
        state = keep[:, token, None] * state + inputs[:, token]
        torch.testing.assert_close(scanned[:, token], state)


# ---- what it is in its limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("forgets", [False, True], ids=["delta rule", "gated delta net"])
def test_a_linear_memory_without_momentum_is_a_delta_rule(forgets):
    """M_t = M_{t-1} - θ (M_{t-1} k - v) kᵀ (DeltaNet); the old M times 1 - α where it forgets (Gated DeltaNet).

    In the latter the error is that of the faded M; here it is that of M itself, which is the same at θ (1 - α) and a
    value that is larger by 1 / (1 - α).
    """
    widths, tokens = widths_of(SIZE, 1), 7
    (keys, values, queries), gates = tokens_of(3, tokens), gates_of(4, tokens)
    alpha = gates.forget * 0.5 * forgets
    gates = Gates(alpha, torch.zeros_like(alpha), gates.rate * (1 - alpha))
    layer = layer_of(widths)
    state = layer.memory.unflatten(-1, (SIZE, SIZE))
    given_values = values / (1 - alpha)[..., None]
    reads = fed(layer, (keys, given_values, queries), gates, widths, segment=1)
    for token in range(tokens):
        key, value, query = (part[:, :, token, :, None] for part in (keys, values, queries))
        rate = (gates.rate / (1 - alpha))[:, :, token, None, None]
        state = (1 - alpha[:, :, token, None, None]) * state
        state = state - rate * (state @ key - value) @ key.mT
        torch.testing.assert_close(reads[:, :, token], (state @ query)[..., 0], rtol=1e-10, atol=1e-10)


def test_forgetting_all_keeps_the_surprise_only():
    widths, tokens = widths_of(SIZE, 2), 6
    gates = gates_of(1, tokens)
    gates = Gates(torch.ones_like(gates.forget), gates.momentum, gates.rate)
    layer = layer_of(widths)
    fed(layer, tokens_of(0, tokens), gates, widths, segment=3)
    torch.testing.assert_close(layer.memory, layer.momentum, rtol=1e-12, atol=1e-12)


def test_gates_that_are_shut_change_nothing():
    widths, tokens = widths_of(SIZE, 3), 6
    zero = torch.zeros(BATCH, HEADS, tokens, dtype=torch.float64)
    layer = layer_of(widths)
    before, (keys, values, queries) = layer.memory, tokens_of(0, tokens)
    reads = fed(layer, (keys, values, queries), Gates(zero, zero, zero), widths, segment=4)
    assert torch.equal(layer.memory, before)
    torch.testing.assert_close(reads, answer(before, queries, widths))
    kept = Gates(zero, zero + 1, zero)  # past surprise goes on for ever; there was none
    assert torch.equal(coefficients(kept).memory[..., 2:], torch.zeros(BATCH, HEADS, tokens, tokens).double())


def test_sequences_and_heads_have_memories_of_their_own():
    widths, gates = widths_of(SIZE, 2), gates_of(2, 6)
    keys, values, queries = tokens_of(1, 6)
    other = values.clone()
    other[0, 1] += 1
    one, two = (layer_of(widths) for _ in range(2))
    first = fed(one, (keys, values, queries), gates, widths, 4)
    second = fed(two, (keys, other, queries), gates, widths, 4)
    same = (first == second).all(-1).all(-1)
    assert same.tolist() == [[True, False], [True, True]]
    assert (one.memory == two.memory).all(-1).tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_it_stays_finite_on_4096_tokens(depth):
    """The same token again and again, at the largest rate, nothing forgotten: without a limit weights overflow."""
    widths, tokens = widths_of(8, depth), 4096
    key = F.normalize(torch.ones(1, 1, 1, 8), dim=-1).expand(-1, -1, tokens, -1)
    one = torch.ones(1, 1, tokens)
    gates = Gates(0 * one, 0.99 * one, 1.5 * one)
    ends = {}
    for limit in (10.0, None) if depth == 1 else (10.0,):
        layer = NeuralLayer()
        layer.begin(torch.randn(1, count(widths), generator=torch.Generator().manual_seed(0)), 1)
        reads = fed(layer, (key, 3 * key, key), gates, widths, 64, limit=limit)
        ends[limit] = bool(torch.isfinite(reads).all() and torch.isfinite(layer.memory).all())
    assert ends == ({10.0: True, None: False} if depth == 1 else {10.0: True})


def test_what_the_surprise_is():
    widths = widths_of(SIZE, 2)
    keys, values, _ = tokens_of(0, 5)
    numbers = normal(1, BATCH, HEADS, count(widths))
    learnt = surprise(numbers, keys, values, widths, limit=0.5)
    torch.testing.assert_close(learnt.residual, answer(numbers, keys, widths) - values)
    for error, put in zip(learnt.errors, learnt.inputs, strict=True):
        assert float((error.norm(dim=-1) * put.norm(dim=-1)).max()) <= 0.5 + 1e-12


# ---- the layer -------------------------------------------------------------------------------------------------------


def filled():
    """A cache of two layers after 5 tokens."""
    cache, widths = NeuralCache(2), widths_of(SIZE, 2)
    for seed, layer in enumerate(cache.layers):
        layer.begin(normal(seed, HEADS, count(widths)), BATCH)
        layer.start = torch.tensor([0, 1])
        fed(layer, tokens_of(seed, 5), gates_of(seed, 5), widths, 4)
        layer.tail_key = layer.tail_value = layer.tail_query = normal(seed, BATCH, 3, 8)
        layer.window_keys = layer.window_values = normal(seed, BATCH, 2, 3, 4)
        layer.window_real = torch.ones(BATCH, 3, dtype=torch.bool)
    return cache


def same(one, two):
    first, second = one.tensors(), two.tensors()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_rows_are_selected_repeated_and_reordered():
    cache = filled()
    other = copy.deepcopy(cache)
    other.batch_repeat_interleave(2)
    assert other.layers[1].memory.shape[0] == 4
    other.reorder_cache(torch.tensor([3, 0]))
    other.batch_select_indices(torch.tensor([1, 0]))
    assert same(other, cache)
    assert cache.nbytes() == sum(t.numel() * t.element_size() for t in list(cache.tensors().values())[1:])
    cache.reset()
    assert not cache.nbytes()
    assert cache.get_seq_length() == 0
    with pytest.raises(CacheError, match="nothing has been read"):
        cache.layers[0].end_segment(None)


def test_what_is_saved_is_checked_when_it_is_read():
    cache = filled()
    saved = cache.tensors()
    assert same(NeuralCache.of(saved, 2), cache)
    assert NeuralCache.of(NeuralCache(2).tensors(), 2).get_seq_length() == 0
    numbers = saved["0.memory"]
    for name, wrong, message in (
        ("seen", torch.tensor(-1), "no count"),
        ("0.memory", None, "missing"),
        ("0.memory", numbers[0], "axes"),
        ("0.anchor", numbers[..., 1:], "instead of"),
        ("1.start", torch.tensor([0]), "instead of"),
        ("1.start", torch.tensor([0, 9]), "behind the last"),
        ("0.tail_key", None, "missing"),
        ("0.momentum", torch.full_like(numbers, torch.nan), "no number"),
        ("1.window_real", torch.ones(BATCH, 3), "float32"),
        ("1.window_real", None, "together"),
        ("0.window_keys", None, "together"),
        ("0.window_keys", torch.zeros(BATCH, 2, 9, 4), "after 5 tokens"),
        ("5.window_real", torch.ones(2, 3), "no layer"),
    ):
        broken = {key: value for key, value in {**saved, name: wrong}.items() if value is not None}
        with pytest.raises(CacheError, match=message):
            NeuralCache.of(broken, 2)
