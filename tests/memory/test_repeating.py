"""KVzip: what a second reading attends to, against a stock pass over both; refused wherever there was none."""

from __future__ import annotations

import pytest
import torch

from evomem.errors import CacheError
from evomem.evaluation import Evaluator
from evomem.evaluation.compare import NamedManager, Scenario, compare
from evomem.evaluation.measurement import EXACT, EvaluationProtocol
from evomem.evaluation.sample_tokens import REQUEST
from evomem.managers import build
from evomem.memory import SlotCache
from evomem.memory.kv import repeating
from evomem.models import LoadedModel
from evomem.report.tables import notes
from evomem.testing.models import tiny, tiny_tokenizer
from tests.evaluation.test_evaluation import BUDGET, TASK, make_sample

READ, PROMPT = 40, 6


def ids_of(rows=1, length=READ, seed=0):
    return torch.randint(5, 120, (rows, length), generator=torch.Generator().manual_seed(seed))


def slow_largest(model, context, repeated):
    """Return per layer the largest attention of the repeated tokens to the context, by a stock pass over both."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        layers = model(torch.cat((context, repeated), 1), output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    heads = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
    read, found = context.shape[1], []
    for attention in layers:
        rows, query_heads = attention.shape[:2]
        grouped = attention.reshape(rows, heads, query_heads // heads, *attention.shape[2:])
        found.append(grouped[:, :, :, read:, :read].amax((2, 3)))
    return found


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_a_second_reading_shows_what_a_stock_pass_attends_to(family, monkeypatch):
    model, context = tiny(family, layers=2), ids_of(rows=2)
    repeated = torch.cat((ids_of(2, PROMPT, 1), context), 1)
    expected = slow_largest(model, context, repeated)
    monkeypatch.setattr(repeating, "PIECE", 17)  # pieces that do not divide what is read
    manager = build("kvzip", budget=BUDGET)
    with manager.attach(model) as cache, cache.reading():
        model(context, past_key_values=cache)
        before = [layer.keys.clone() for layer in cache.layers]
        cache.repeat(repeated)
        views = [layer.view() for layer in cache.layers]
        assert cache.get_seq_length() == READ
        assert all(torch.equal(view.keys, keys) for view, keys in zip(views, before, strict=True))
        for view, largest in zip(views, expected, strict=True):
            assert torch.allclose(view.recorded["repeated_attention"], largest, atol=1e-5)
    for row in range(2):  # the sinks, and of all others the best of the whole model
        scores = [largest[row].clone() for largest in expected]
        for layer in scores:
            layer[:, :4] = torch.inf
        order = torch.cat([layer.flatten() for layer in scores]).sort(descending=True).values
        least = order[BUDGET * sum(len(layer) for layer in scores) - 1]
        for layer, score in zip(cache.layers, scores, strict=True):
            for head in range(score.shape[0]):
                kept = sorted(t for t in layer.slots[row, head].tolist() if t >= 0)
                assert kept == (score[head] >= least - 1e-6).nonzero().flatten().tolist()


def evaluator(**protocol):
    loaded = LoadedModel("llama", tiny("llama", layers=2), tiny_tokenizer(), "llama")
    return Evaluator(loaded, EvaluationProtocol(**protocol))


@pytest.mark.parametrize("spec", ["kvzip", "kvzip(allocation=uniform, sinks=0)", "adakv(kvzip(allocation=uniform))"])
@pytest.mark.parametrize("mode", ["query_agnostic", "query_aware"])
def test_an_evaluation_equals_the_plain_way_and_counts_what_is_read_again(spec, mode):
    here, sample = evaluator(mode=mode), make_sample()
    managers = [build(spec, budget=BUDGET), build("keydiff", budget=BUDGET)]
    fast = here.evaluate(managers, sample, TASK, EXACT)
    plain = [here.evaluate_plainly(manager, sample, TASK, EXACT) for manager in managers]
    for one, other in zip(fast, plain, strict=True):
        assert one.loglik == pytest.approx(other.loglik, abs=1e-4)
        assert (one.exact, one.slots) == (other.exact, pytest.approx(other.slots))
        assert one.bytes_mean == pytest.approx(other.bytes_mean)
    assert fast[0].tokens == plain[0].tokens
    read = here.tokens(sample).read
    assert here.repetition(read).shape[1] >= read.shape[1] - 1
    without = evaluator(mode=mode).evaluate(managers[1:], sample, TASK, EXACT)[0]
    assert fast[0].tokens == without.tokens + here.repetition(read).shape[1]


def test_the_request_is_left_out_where_the_tokenizer_does_not_know_its_words():
    here = evaluator()
    read = here.tokens(make_sample()).read
    unknown = here.loaded.tokenizer.unk_token_id
    assert unknown in here.encoder.following(REQUEST)
    prefix = len(here.encoder.prefix)
    assert torch.equal(here.repetition(read), read[:, prefix:])
    here.loaded.tokenizer.unk_token = None
    again = here.repetition(read)
    assert torch.equal(again[:, -read.shape[1] + prefix :], read[:, prefix:])
    assert again.shape[1] == read.shape[1] - prefix + len(here.encoder.following(REQUEST))


def test_a_comparison_says_what_the_second_reading_costs():
    here = evaluator()
    task = type("Words", (type(TASK),), {
        "samples": lambda self, split, count, seed: [make_sample(n) for n in range(count)],
        "describe": lambda self: {}, "has_exact": False,
    })()  # fmt: skip
    subjects = [NamedManager("keydiff", build("keydiff"))]
    found = compare(
        subjects, [Scenario("llama", "t", here, task)], samples=2, budgets=[8], against=["kvzip"], exact=False
    )
    counts = {row.manager: row.repeated_tokens for row in found.rows}
    assert counts["keydiff"] is counts["full"] is None
    assert counts["kvzip"] == here.repetition(here.tokens(make_sample()).read).shape[1]
    (note,) = [note for note in notes(found.rows) if "read again" in note]
    assert note == f"kvzip on t: before it decides, {counts['kvzip']:.0f} tokens are read again after the context."


def test_without_a_second_reading_nothing_is_decided():
    model, context = tiny("llama", layers=2), ids_of()
    manager = build("kvzip", budget=BUDGET)
    with manager.attach(model) as cache:
        with pytest.raises(CacheError, match="second time"):
            model(context, past_key_values=cache)
        cache = manager.new_cache(model)
        reading = cache.reading()
        reading.__enter__()
        model(context, past_key_values=cache)
        cache.repeat(context)
        model(ids_of(1, 3), past_key_values=cache)  # what came since was not repeated
        with pytest.raises(CacheError, match="second time"):
            reading.__exit__(None, None, None)
    assert "compress_once" in evaluator(kind="streaming", every=8).refusal(manager)
    assert not evaluator().refusal(manager)


def test_what_cannot_be_repeated_is_refused():
    model, context = tiny("gpt2", layers=1, max_position_embeddings=60), ids_of(rows=2)
    manager = build("kvzip", budget=BUDGET)
    with manager.attach(model) as cache, cache.reading():
        with pytest.raises(CacheError, match="read the context first"):
            cache.repeat(context)
        model(context, past_key_values=cache)
        for wrong in (context[:1], context[0], context[:, :0]):
            with pytest.raises(CacheError, match="rows, tokens"):
                cache.repeat(wrong)
        with pytest.raises(CacheError, match="80 positions, and the model has 60"):
            cache.repeat(context)
        cache.repeat(context[:, :5])
        cache.repeat(context[:, :20])
    with manager.attach(model):
        with pytest.raises(CacheError, match="decided about this context"):
            cache.repeat(context[:, :5])
        padded, mask = manager.new_cache(model), torch.ones_like(context)
        mask[1, :3] = 0
        reading = padded.reading()
        reading.__enter__()
        model(context, attention_mask=mask, past_key_values=padded)
        with pytest.raises(CacheError, match="padded"):
            padded.repeat(context[:, :5])
    with build("keydiff", budget=4).attach(model) as other, other.reading():
        model(context, past_key_values=other)
        with pytest.raises(CacheError, match="does not observe"):
            other.repeat(context[:, :5])
    assert isinstance(cache, SlotCache)
