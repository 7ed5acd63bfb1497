"""Rows of a memory matrix that a manager decides about: against a list of rows, in pieces, saved, copied."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from evomem.errors import CacheError, ConfigError, ModelError
from evomem.managers import build
from evomem.memory.explicit.matrix_rows import MatrixRows, MatrixRowsCache, row_of
from evomem.memory.explicit.matrix_rules import RULES, Write
from evomem.memory.view import Decision
from evomem.models.architectures.memory_matrix import MemoryMatrix, MemoryMatrixConfig
from tests.support.slow_matrix import dot, softmax

SIZES = {
    "vocab_size": 20, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24, "window": 4,
    "matrix_slots": 5, "matrix_width": 6, "matrix_heads": 2, "initializer_range": 0.4, "matrix_layers": [1],
}  # fmt: skip
FIELD = (
    "full", "random(budget=3,every=2)", "streaming_llm(budget=3,every=1,sinks=1)", "knorm(budget=3,every=1)",
    "h2o(budget=3,every=3)", "feature_scorer(budget=3,every=2,features=[frequency,recency,novelty,value_norm])",
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MemoryMatrix(MemoryMatrixConfig(**SIZES)).eval().double().requires_grad_(False)


def ids_of(seed, tokens, batch=2):
    return torch.randint(0, 20, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def fed(model, ids, manager, cuts=(), **rest):
    """Logits of ids in pieces, and the cache after them."""
    cache, ends = model.decided_cache(manager), [*cuts, ids.shape[1]]
    parts = [model(ids[:, a:b], past_key_values=cache, **rest).logits for a, b in zip([0, *ends], ends, strict=False)]
    return torch.cat(parts, 1), cache


def same(one, two):
    (facts, first), (others, second) = one.state(), two.state()
    sizes = {"bytes_peak", "_byte_tokens"}
    plain = [[{k: v for k, v in fact.items() if k not in sizes} for fact in part] for part in (facts, others)]
    return (
        plain[0] == plain[1]
        and first.keys() == second.keys()
        and all(torch.allclose(first[name], second[name], rtol=1e-5, atol=1e-5) for name in first)
    )


@examples(max_examples=10)
@given(seed=st.integers(0, 1000), kept=st.integers(1, 4), gamma=st.floats(0, 2))
def test_reads_and_evictions_are_those_of_a_list(seed, kept, gamma):
    """Newest rows stay, fading by their age; every token reads before it writes."""
    draw, tokens, width = torch.Generator().manual_seed(seed), 7, 3

    def normal():
        return torch.randn(1, 1, tokens, width, generator=draw, dtype=torch.float64)

    class Newest:
        observes, schedule = frozenset(), None

        def decide(self, view):
            ages = view.age
            return Decision((ages < kept) & view.valid, -gamma * ages.float())

    keys, writes = normal(), Write(normal(), normal(), torch.rand(1, 1, tokens, generator=draw, dtype=torch.float64))
    memory, policy, rows = MatrixRows(), Newest(), []
    for token in range(tokens):
        parts = {field.name: getattr(writes, field.name) for field in fields(writes)}
        one = Write(**{name: part[:, :, token : token + 1] for name, part in parts.items() if part is not None})
        seen = memory.exchange(one, keys[:, :, token : token + 1], "erase_add", None, None, None)
        query = keys[0, 0, token].tolist()
        shares = softmax([dot(row, query) - fade for row, fade in rows]) if rows else []
        context = [dot(shares, [row[d] for row, _ in rows]) if rows else 0.0 for d in range(width)]
        torch.testing.assert_close(seen.context[0, 0, 0].tolist(), context, rtol=1e-6, atol=1e-6)
        memory.finish(1)
        store = float(writes.store[0, 0, token])
        rows.append(([store * number for number in writes.value[0, 0, token].tolist()], 0.0))
        rows = [(row, gamma * (len(rows) - 1 - i)) for i, (row, _) in enumerate(rows)][-kept:]
        memory.decide(policy)
        torch.testing.assert_close(memory.keys[0, 0].tolist(), [row for row, _ in rows])


@pytest.mark.parametrize("spec", FIELD)
def test_pieces_are_the_whole_and_what_is_saved_goes_on(model, spec):
    manager, ids = build(spec), ids_of(1, 14)
    whole, cache = fed(model, ids, manager)
    logits, pieces = fed(model, ids, manager, (3, 4, 11))
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
    assert same(cache, pieces)
    _, first = fed(model, ids[:, :9], manager)
    facts, tensors = first.state()
    again = model.decided_cache(manager)
    again.load_state(facts, {name: tensor.clone() for name, tensor in tensors.items()})
    one, two, three = (model(ids[:, 9:], past_key_values=kept).logits for kept in (first.clone(), again, first))
    assert torch.equal(one, two)
    assert torch.equal(one, three)
    if manager.options.budget is not None:
        assert int(cache.slots_held()[0].max()) <= 3 + manager.options.every


@pytest.mark.parametrize("spec", FIELD[1:4])
def test_rows_of_a_batch_do_not_see_each_other(model, spec):
    manager, ids = build(spec), ids_of(2, 12, 3)
    whole, cache = fed(model, ids, manager)
    for row in range(3):
        alone, other = fed(model, ids[row : row + 1], manager)
        torch.testing.assert_close(whole[row : row + 1], alone, rtol=1e-4, atol=1e-4)
        assert int(cache.bytes_by_row()[row]) == int(other.bytes_by_row()[0]) == other.nbytes()
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([2, 0]))
    turned = torch.stack((ids[1], ids[0]))
    assert same(cache, fed(model, turned, manager)[1])
    cache.reset()
    assert cache.nbytes() == 0


def test_one_row_becomes_many(model):
    """As candidates of a population do: what was read before is shared."""
    manager, ids = build("knorm(budget=3,every=1)"), ids_of(3, 12, 1)
    _, cache = fed(model, ids[:, :6], manager)
    for layer in cache.layers:
        layer.expand(4)
    logits = model(ids[:, 6:].expand(4, -1), past_key_values=cache).logits
    torch.testing.assert_close(logits, fed(model, ids, manager)[0][:, 6:].expand(4, -1, -1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_a_row_is_what_a_write_makes_of_an_empty_slot(rule):
    value, store = torch.randn(1, 1, 2, 3), torch.rand(1, 1, 2)
    row = row_of(Write(value, value, store, torch.rand(1, 1, 2, 3)), rule)
    torch.testing.assert_close(row, store[..., None] * (value.tanh() if rule == "gated" else value))


def test_padding_is_neither_written_nor_seen(model):
    manager, ids = build("full"), ids_of(4, 8)
    padded = torch.cat((ids_of(5, 3), ids), 1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    logits, cache = fed(model, padded, manager, attention_mask=mask)
    torch.testing.assert_close(logits[:, 3:], fed(model, ids, manager)[0], rtol=1e-6, atol=1e-6)
    assert cache.slots_held()[0].tolist() == [[8, 8], [8, 8]]


def test_a_row_is_held_and_counted_once(model):
    """Beside it a slot has the index of its token, and what is observed of it; a manager sees it as key and value."""
    _, cache = fed(model, ids_of(7, 12), build("random(budget=3,every=2)"))
    (layer,) = cache.layers
    slots = int(layer.counts().sum())
    beside = sum(part.numel() * part.element_size() for part in layer.beside().values())
    assert layer.nbytes() == slots * (6 * 8 + 8) + beside
    assert torch.equal(layer.view().values, layer.view().keys)
    facts, tensors = cache.state()
    with pytest.raises(CacheError, match="holds its rows twice"):
        model.decided_cache(cache.policy).load_state(facts, {**tensors, "0.even.values": tensors["0.even.keys"]})


def rows_kept(directions, tokens, padding=0):
    """Rows that stay by the rate of keys not read lately, where reads take so many directions in turn."""
    manager = build("fifo(budget=8, allocation='by_distinct_rate(total=[0.25, 4], window=16)')")
    with torch.no_grad():
        manager.allocation.coefficients[0] = 6.0
    memory, length = MatrixRows(observes=manager.observes), padding + tokens
    keys = torch.eye(64)[torch.arange(-padding, tokens) % directions][None, None]
    real = (torch.arange(length) >= padding)[None] if padding else None
    memory.exchange(Write(keys, keys, torch.ones(1, 1, length)), keys, "leaky", None, None, real)
    memory.finish(length)
    memory.decide(manager)
    return int(memory.counts())


def test_more_rows_stay_where_more_different_keys_are_read():
    """N(x): it rises with the rate of distinct keys, and neither length nor padding moves it."""
    counts = [rows_kept(directions, 64) for directions in (4, 17, 64)]
    assert counts[0] < counts[1] == counts[2]  # 17 in turn are never among the 16 reads before
    assert rows_kept(4, 64) <= rows_kept(4, 20) <= 8
    assert rows_kept(4, 128) == rows_kept(4, 256)
    assert rows_kept(4, 64, padding=9) == rows_kept(4, 64)


def test_generate_decides(model):
    manager, ids = build("knorm(budget=3,every=1)"), ids_of(6, 8)
    slow = ids
    for _ in range(4):
        slow = torch.cat((slow, fed(model, slow, manager)[0][:, -1:].argmax(-1)), 1)
    cache = model.decided_cache(manager)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, past_key_values=cache), slow)
    assert cache.slots_held()[0].tolist() == [[3, 3], [3, 3]]


def test_what_cannot_be_is_refused(model):
    with pytest.raises(ConfigError, match="query_statistics"):
        model.decided_cache(build("expected_attention(budget=3,every=1)"))
    with pytest.raises(ModelError, match="no memory matrix"):
        MemoryMatrix(MemoryMatrixConfig(**{**SIZES, "matrix_slots": 0})).decided_cache(build("full"))
    _, cache = fed(model, ids_of(0, 5), build("full"))
    facts, tensors = cache.state()
    for name, wrong in (("0.tail", None), ("0.tail", torch.zeros(3, 1, 16)), ("window.0.window_keys", None)):
        broken = {key: value for key, value in {**tensors, name: wrong}.items() if value is not None}
        with pytest.raises(CacheError):
            model.decided_cache(build("full")).load_state(facts, broken)
    cache.windows[0].seen = 3
    with pytest.raises(CacheError, match="cut short"):
        model(ids_of(0, 2), past_key_values=cache)
    assert isinstance(cache, MatrixRowsCache)
