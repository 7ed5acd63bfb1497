"""Evaluation: the attention that falls on what was kept, against a full eager run of the model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from evomem.errors import ConfigError
from evomem.evaluation import Evaluator
from evomem.evaluation.future import sample_key
from evomem.evaluation.objectives import Attention
from evomem.managers import MemoryManager
from evomem.memory.observations import USED
from evomem.models import LoadedModel
from evomem.testing.models import tiny, tiny_tokenizer
from tests.evaluation.test_evaluation import BUDGET, PROTOCOLS, READ, SPECS, TASK, made, make_sample, recorded, text

ATTENTION = Attention.measurement


def heads_of(evaluation):
    return evaluation.values["head_attention"]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def loaded(request):
    return LoadedModel(request.param, tiny(request.param, layers=2), tiny_tokenizer(), request.param)


@pytest.fixture(scope="module")
def llama():
    return LoadedModel("llama", tiny("llama", layers=2), tiny_tokenizer(), "llama")


class Parity(MemoryManager):
    """Keeps the even or the odd tokens."""

    name = "parity"

    def __init__(self, odd):
        super().__init__(budget=READ // 2)
        self.odd = odd

    def with_options(self, **changes):
        return self

    def describe(self):
        return {"name": self.name, "options": {"odd": self.odd}}

    def score(self, view):
        return (view.position % 2 == self.odd).float()


def future(family, tokens):
    """(layers, kv_heads, context): mean attention of what follows the context, from a whole eager run."""
    model = tiny(family, layers=2)
    model.set_attn_implementation("eager")
    fed = torch.cat((tokens.read, tokens.prompt, tokens.answer[:, :-1]), 1)
    attentions = model(fed, output_attentions=True).attentions
    kv_heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    read = tokens.read.shape[1]
    return [a[0, :, read:, :read].double().mean(1).view(kv_heads, -1, read).mean(1) for a in attentions]


@pytest.mark.parametrize("name", ["once", "once, aware"])
def test_shares_equal_a_full_eager_run(loaded, name):
    evaluator, sample = Evaluator(loaded, PROTOCOLS[name]), make_sample()
    crowd = [made(spec, seed) for seed, spec in enumerate(SPECS)]
    found = evaluator.evaluate(crowd, sample, TASK, ATTENTION)
    tokens = evaluator.tokens(sample)
    paid = future(loaded.name, tokens)
    for manager, evaluation in zip(crowd, found, strict=True):
        with evaluator.scheduled(manager).attach(loaded.model) as cache, cache.reading():
            loaded.model(tokens.read, past_key_values=cache)
        held = cache.nbytes() - recorded(cache)
        assert len(heads_of(evaluation)) == 2
        for layer, slots, shares in zip(
            paid, (one.slots[0] for one in cache.layers), heads_of(evaluation), strict=True
        ):
            assert len(shares) == len(slots)
            for row, kept, share in zip(layer, slots, shares, strict=True):
                assert share == pytest.approx(float(row[kept[kept >= 0]].sum() / row.sum()), abs=2e-5)
        assert evaluation.slots == pytest.approx(
            float(torch.stack([s.float().mean() for s in cache.slots_held()]).mean())
        )
        assert evaluation.bytes_peak == evaluation.bytes_mean == held
        assert evaluation.values.keys() == {"head_attention"}


def test_peak_and_next_use_equal_a_full_eager_run(loaded):
    evaluator, sample = Evaluator(loaded), make_sample()
    tokens = evaluator.tokens(sample)
    found = evaluator.future.of(evaluator, tokens, sample_key(tokens), frozenset())
    model = tiny(loaded.name, layers=2)
    model.set_attn_implementation("eager")
    fed = torch.cat((tokens.read, tokens.prompt, tokens.answer[:, :-1]), 1)
    attentions = model(fed, output_attentions=True).attentions
    uses = 0
    for layer, attention in enumerate(attentions):
        shape = found.paid[layer].shape
        assert shape == found.peak[layer].shape == found.next_use[layer].shape == (1, shape[1], READ)
        by_head = attention[0, :, READ:, :READ].view(shape[1], -1, fed.shape[1] - READ, READ).double()
        torch.testing.assert_close(found.paid[layer][0].double(), by_head.mean((1, 2)), atol=1e-6, rtol=1e-4)
        largest = by_head.amax(1)
        torch.testing.assert_close(found.peak[layer][0].double(), largest.sum(1), atol=1e-6, rtol=1e-4)
        for head in range(shape[1]):
            for slot in range(READ):
                used = [n for n, share in enumerate(largest[head, :, slot].tolist()) if share >= USED]
                assert found.next_use[layer][0, head, slot] == (used[0] if used else len(largest[head]))
                uses += bool(used)
    assert uses


def test_keeping_all_is_exactly_one_and_halves_add_up(loaded):
    evaluator = Evaluator(loaded)
    whole, even, odd, wide = evaluator.evaluate(
        [made("full"), Parity(0), Parity(1), made("knorm").with_options(budget=READ)],
        make_sample(), TASK, ATTENTION,
    )  # fmt: skip
    assert np.all(np.array(heads_of(whole)) == 1.0)
    assert np.all(np.array(heads_of(wide)) == 1.0)
    np.testing.assert_allclose(np.array(heads_of(even)) + np.array(heads_of(odd)), 1.0, atol=1.1e-5)
    assert (even.slots, odd.slots) == (READ / 2, READ / 2)


def test_a_larger_budget_keeps_more(llama):
    crowd = [made(spec).with_options(budget=n) for spec in ("keydiff", "feature_scorer") for n in (4, 12, 30)]
    found = Evaluator(llama).evaluate(crowd, make_sample(), TASK, ATTENTION)
    heads = np.array([heads_of(e) for e in found]).reshape(2, 3, -1)
    assert np.all(np.diff(heads, axis=1) >= 0)
    assert np.all(heads.mean(-1)[:, -1] > heads.mean(-1)[:, 0] + 0.1)


def test_same_alone_in_company_and_again(llama):
    evaluator = Evaluator(llama)
    crowd = [made(spec, seed) for seed, spec in enumerate(SPECS)]
    found = [heads_of(e) for e in evaluator.evaluate(crowd, make_sample(), TASK, ATTENTION)]
    assert found == [heads_of(e) for e in evaluator.evaluate(crowd, make_sample(), TASK, ATTENTION)]
    fresh = Evaluator(llama)
    for manager, heads in zip(crowd, found, strict=True):
        (alone,) = fresh.evaluate([manager], make_sample(), TASK, ATTENTION)
        np.testing.assert_allclose(heads_of(alone), heads, atol=1.1e-5)


def test_a_head_depends_on_its_own_weights_only(llama):
    """What lets a search improve all heads side by side."""
    one = made("feature_scorer(layers=2, heads=2, knots=1)")
    other = one.with_options(budget=BUDGET)
    with torch.no_grad():
        other.own[1, 0] += torch.randn(other.own.shape[-1], generator=torch.Generator().manual_seed(3))
    a, b = (np.array(heads_of(e)) for e in Evaluator(llama).evaluate([one, other], make_sample(), TASK, ATTENTION))
    assert a[1, 0] != b[1, 0]
    a[1, 0] = b[1, 0] = 0
    assert np.array_equal(a, b)


def test_samples_of_one_name_are_told_apart(llama):
    """A task at another length calls its samples the same."""
    evaluator, long = Evaluator(llama), make_sample()
    short = replace(long, context=text(9, 20))
    other = replace(long, answer=text(8, 3))
    for sample in (long, short, other, long):
        found = evaluator.evaluate([made("keydiff")], sample, TASK, ATTENTION)
        expected = Evaluator(llama).evaluate([made("keydiff")], sample, TASK, ATTENTION)
        assert found[0].values["head_attention"] == expected[0].values["head_attention"]


def test_context_and_future_are_read_once(llama):
    evaluator = Evaluator(llama)
    calls = [evaluator.evaluate([made("knorm"), made("tova")], make_sample(), TASK, ATTENTION) for _ in range(2)]
    assert [e.tokens for e in calls[0]] == [READ + 5 + 4 - 1, 0]
    assert [e.tokens for e in calls[1]] == [0, 0]


def test_streaming_is_refused(llama):
    with pytest.raises(ConfigError, match="compress_once"):
        Evaluator(llama, PROTOCOLS["streaming"]).evaluate([made("knorm")], make_sample(), TASK, ATTENTION)


def test_heads_that_look_at_nothing_lose_nothing():
    """A window that ends after the context: the share of no attention is not the worst there is."""
    blind = LoadedModel("mistral", tiny("mistral", layers=2, sliding_window=1), tiny_tokenizer(), "mistral")
    manager = made("keydiff").with_options(budget=7)
    (found,) = Evaluator(blind).evaluate([manager], make_sample(), TASK, ATTENTION)
    assert {share for row in heads_of(found) for share in row} == {1.0}
