"""A mosaic whose pairs a manager decides about: against the mosaic that keeps all, and against a reach of its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from evomem.errors import CacheError, ConfigError
from evomem.evaluation import Evaluator
from evomem.evaluation.measurement import EXACT, EvaluationProtocol
from evomem.managers import build
from evomem.models import LoadedModel
from evomem.models.architectures.mosaic import MemoryMosaic, MosaicConfig
from evomem.plugins import load_cache, save_cache
from evomem.tasks import Split
from evomem.tasks import build as build_task
from evomem.testing.memories import CHECKS, Subject
from experiments.zoo.data import zoo_tokenizer
from tests.models.test_mosaic import MODELS, tiny_mosaic, tokens

FIFO = "streaming_llm(sinks=0, budget=6, every=1)"


@examples(max_examples=8, deadline=None)
@given(
    form=st.sampled_from(["v1", "v2"]), cuts=st.lists(st.integers(1, 23), max_size=4), every=st.integers(1, 9),
    padding=st.lists(st.integers(0, 9), min_size=2, max_size=2),
)  # fmt: skip
def test_a_manager_that_keeps_all_changes_nothing(form, cuts, every, padding):
    model, ids = MODELS[form], tokens(2, 24, seed=5)
    real = torch.arange(24) >= torch.tensor(padding)[:, None]
    cache, parts = model.decided_cache(build("full", every=every)), []
    for begin, end in zip(sorted({0, *cuts}), [*sorted({0, *cuts})[1:], 24], strict=True):
        passed = model(ids[:, begin:end], attention_mask=real[:, :end].long(), past_key_values=cache)
        parts.append(passed.logits)
    whole = model(ids, attention_mask=real.long()).logits
    for row, pad in enumerate(padding):
        torch.testing.assert_close(torch.cat(parts, 1)[row, pad:], whole[row, pad:])


@pytest.mark.parametrize("every", [1, 4])
def test_the_newest_pairs_are_a_reach(every):
    """Of 6 pairs kept and one that comes with each token, a token reads at most 6 + ``every``."""
    model, ids = tiny_mosaic("v1").double(), tokens(2, 30)
    manager = build(FIFO).with_options(every=every)
    cache = model.decided_cache(manager)
    decided = model(ids, past_key_values=cache).logits
    assert {tuple(one.flatten().tolist()) for one in cache.slots_held()} <= {
        (held,) * 6 for held in range(6, 7 + every)
    }
    if every == 1:
        for layer in model.layers:
            layer.contextual[0].farthest = 7
        torch.testing.assert_close(decided, model(ids).logits)


def test_surprise_is_the_error_of_what_was_read():
    model, ids = MODELS["v1"], tokens(1, 15)
    manager = build("feature_scorer(features=['surprise'])", every=4)
    pieces, cache = (1, 2, 3, 9, 15), model.decided_cache(manager)
    for begin, end in zip((0, *pieces[:-1]), pieces, strict=True):
        model(ids[:, begin:end], past_key_values=cache)
    plain = model.new_cache()
    model(ids, past_key_values=plain)
    view, stored = cache.layers[0].view(), plain.layers[0]
    torch.testing.assert_close(view.keys, stored.keys)
    torch.testing.assert_close(view.values, stored.values)
    beta = model.layers[0].contextual[0].bandwidth(torch.ones(1))[0, :, 0]
    for head in range(3):
        for t in range(14):
            value, read = stored.values[0, head, t], torch.zeros(8).double()
            if t:
                weights = (beta[head] * stored.keys[0, head, :t] @ stored.keys[0, head, t]).softmax(0)
                read = weights @ stored.values[0, head, :t]
            error = float((value - read).norm() / value.norm())
            assert float(view.recorded["surprise"][0, head, t]) == pytest.approx(error, abs=1e-5)


def test_new_pairs_can_be_refused():
    """The newest pair has arrived since the last decision, though the newest token is in none."""
    model, ids = MODELS["v1"], tokens(2, 12)
    for every in (1, 5):
        cache = model.decided_cache(build("kv_policy(actions=['store'], features=['age'], odds=-20)", every=every))
        model(ids[:, :10], past_key_values=cache)
        assert all(int(one.sum()) == 0 for one in cache.slots_held())
        model(ids[:, 10:], past_key_values=cache)


@pytest.mark.parametrize("form", MODELS)
def test_a_saved_memory_goes_on_to_the_bit(form):
    model, ids = tiny_mosaic(form), tokens(2, 26)
    manager = build("feature_scorer(features=['surprise', 'frequency', 'relevance:4'])", budget=5, every=2)
    for cut in (1, 13):
        cache, again = model.decided_cache(manager), model.decided_cache(manager)
        model(ids[:, :cut], past_key_values=cache)
        again.load_state(*cache.state())
        assert again.nbytes() == cache.nbytes() == int(cache.bytes_by_row().sum())
        copied = cache.clone()
        for begin, end in ((cut, cut + 1), (cut + 1, 26)):
            going_on, *others = (model(ids[:, begin:end], past_key_values=one).logits for one in (cache, again, copied))
            assert all(torch.equal(going_on, other) for other in others)


def test_a_file_brings_the_memory_back(tmp_path):
    model, ids = tiny_mosaic("v1"), tokens(2, 20)
    with build("feature_scorer(features=['surprise'])", budget=5, every=2).attach(model) as cache:
        model(ids[:, :9], past_key_values=cache)
        save_cache(cache, tmp_path / "memory.safetensors", model=model)
        again = load_cache(tmp_path / "memory.safetensors", model)
        logits = [model(ids[:, 9:], past_key_values=one).logits for one in (cache, again)]
    assert torch.equal(*logits)
    facts, tensors = cache.state()
    tensors["0.next_key"] = tensors["0.next_key"][..., 1:]
    with pytest.raises(CacheError, match="'next_key' has shape"):
        cache.load_state(facts, tensors)


@pytest.mark.parametrize("form", MODELS)
def test_rows_go_their_own_ways(form):
    model, ids = MODELS[form], tokens(3, 20)
    cache = model.decided_cache(build(FIFO))
    model(ids[:, :9], past_key_values=cache)
    order = torch.tensor([2, 0, 2])
    chosen, repeated = cache.clone(), cache.clone()
    chosen.reorder_cache(order)
    repeated.batch_repeat_interleave(2)
    alone = model(ids, past_key_values=model.decided_cache(build(FIFO))).logits[:, 9:]
    torch.testing.assert_close(model(ids[order, 9:], past_key_values=chosen).logits, alone[order])
    twice = torch.arange(3).repeat_interleave(2)
    torch.testing.assert_close(model(ids[twice, 9:], past_key_values=repeated).logits, alone[twice])


def test_a_pass_that_was_cut_short_is_not_gone_on_from(monkeypatch):
    model, cache = MODELS["v1"], MODELS["v1"].decided_cache(build(FIFO))
    with monkeypatch.context() as patch:
        patch.setattr(type(cache), "decide", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(tokens(1, 5), past_key_values=cache)
    with pytest.raises(CacheError, match="cut short"):
        model(tokens(1, 5), past_key_values=cache)
    cache.reset()
    model(tokens(1, 5), past_key_values=cache)
    facts, tensors = cache.state()
    del tensors["other.0"]
    with pytest.raises(CacheError, match="units that store no pairs"):
        cache.load_state(facts, tensors)
    with pytest.raises(ConfigError, match="queries at positions"):
        model.decided_cache(build("expected_attention", budget=4, every=1))


@pytest.mark.parametrize(
    ("form", "spec"),
    [
        ("v1", "feature_scorer(features=['recency', 'frequency_decayed:8', 'relevance:4', 'surprise'], sinks=0)"),
        ("v2", "h2o(allocation=per_head_shares(points=3,heads=2))"),
    ],
)
def test_the_store_conforms(form, spec):
    ids = tokens(3, 26, seed=7)

    def feed(cache, rows, begin, end):
        MODELS[form](ids[list(rows), begin:end], past_key_values=cache)

    for check in CHECKS.values():
        check(Subject(MODELS[form].decided_cache, feed, 3, 26), build(spec, budget=6))


@pytest.mark.parametrize(("form", "every"), [("v1", 1), ("v2", 3)])
def test_candidates_of_a_batch_are_each_alone(form, every):
    """The likelihood is that of one pass over context, question and answer with the manager's own cache."""
    tokenizer = zoo_tokenizer()
    torch.manual_seed(0)
    config = MosaicConfig(
        form=form, vocab_size=len(tokenizer), hidden_size=16, num_attention_heads=2, persistent_size=8, short_window=8,
        long_delay=3, longest_delay=3, initializer_range=0.4,
    )  # fmt: skip
    loaded = LoadedModel("tiny", MemoryMosaic(config).eval().requires_grad_(False), tokenizer, "0" * 64)
    evaluator = Evaluator(loaded, EvaluationProtocol(kind="streaming", every=every))
    task = build_task("zoo_recall", loaded.tokenizer, 32)
    (sample,) = task.samples(Split.SELECT, 1, 0)
    managers = [build(f"{name}(budget=4)") for name in ("full", "streaming_llm", "h2o", "keydiff")]
    managers.append(build("keydiff(budget=4, allocation=per_head_shares(points=3,heads=2))"))
    for manager, result in zip(managers, evaluator.evaluate(managers, sample, task, EXACT), strict=True):
        read = evaluator.tokens(sample)
        ids = torch.cat((read.read, read.prompt, read.answer), 1)
        with manager.with_options(every=every).attach(loaded.model) as cache:
            logits = loaded.model(ids[:, :-1], past_key_values=cache).logits
        answer = read.answer.shape[1]
        plain = logits[:, -answer:].log_softmax(-1).gather(-1, ids[:, -answer:, None]).mean()
        assert result.loglik == pytest.approx(float(plain), abs=1e-4)
