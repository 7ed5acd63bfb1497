"""Evaluation: which tokens the model reads for a sample, and what a sample must have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from evomem.errors import TaskError
from evomem.evaluation import Evaluator
from evomem.evaluation.measurement import EXACT, LOGLIK, EvaluationProtocol
from evomem.evaluation.objectives import Attention
from evomem.models import LoadedModel
from evomem.testing.models import tiny, tiny_tokenizer
from tests.evaluation.test_evaluation import PROTOCOLS, READ, TASK, equal, every_protocol, made, make_sample


@pytest.fixture(scope="module")
def llama():
    return LoadedModel("llama", tiny("llama", layers=2), tiny_tokenizer(), "llama")


@pytest.fixture(scope="module")
def gpt2():
    return LoadedModel("gpt2", tiny("gpt2", layers=2), tiny_tokenizer(), "gpt2")


@every_protocol
@pytest.mark.parametrize("exact", [False, True])
def test_tokens_are_what_the_model_read(llama, protocol, exact):
    read = []
    hook = llama.model.register_forward_hook(
        lambda module, arguments, inputs, output: read.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    try:
        evaluator, crowd = Evaluator(llama, protocol), [made("knorm"), made("h2o"), made("feature_scorer")]
        for _ in range(2):  # the second time the context need not be read again
            read.clear()
            found = evaluator.evaluate(crowd, make_sample(), TASK, EXACT if exact else LOGLIK)
            assert sum(e.tokens for e in found) == sum(read)
        read.clear()
        assert evaluator.evaluate_plainly(crowd[0], make_sample(), TASK, EXACT if exact else LOGLIK).tokens == sum(read)
        if protocol.kind == "compress_once":
            read.clear()
            found = Evaluator(llama, protocol).evaluate(crowd, make_sample(), TASK, Attention.measurement)
            assert sum(e.tokens for e in found) == sum(read)
    finally:
        hook.remove()


def test_extra_observations_let_calls_share_a_reading(llama):
    evaluator, sample = Evaluator(llama), make_sample()
    names = frozenset({"attention_sum", "window_attention:8"})
    evaluator.evaluate([made("h2o")], sample, TASK, LOGLIK.observing(names))
    for spec in ("snapkv(window=8)", "knorm"):
        evaluator.evaluate([made(spec)], sample, TASK, LOGLIK.observing(names))
        evaluator.evaluate([made(spec)], sample, TASK, Attention.measurement.observing(names))
    assert evaluator.store.misses == 1
    evaluator.evaluate([made("knorm")], sample, TASK)
    assert evaluator.store.misses == 2


def test_query_aware_reads_all_but_the_last_token_of_the_question(llama):
    sample = make_sample()
    aware, blind = (Evaluator(llama, PROTOCOLS[name]).tokens(sample) for name in ("once, aware", "once"))
    assert (aware.read.shape[1], aware.prompt.shape[1]) == (READ + 4, 1)
    assert (blind.read.shape[1], blind.prompt.shape[1]) == (READ, 5)
    assert torch.equal(torch.cat((aware.read, aware.prompt), 1), torch.cat((blind.read, blind.prompt), 1))
    assert torch.equal(aware.answer, blind.answer)


@every_protocol
def test_without_a_question_the_last_token_of_the_context_asks(llama, protocol):
    sample, evaluator = replace(make_sample(), question=""), Evaluator(llama, protocol)
    crowd = [made("keydiff"), made("full")]
    found = evaluator.evaluate(crowd, sample, TASK, EXACT)
    for manager, fast in zip(crowd, found, strict=True):
        equal(fast, evaluator.evaluate_plainly(manager, sample, TASK, EXACT))
    tokens = evaluator.tokens(sample)
    assert (tokens.read.shape[1], tokens.prompt.shape[1]) == (READ - 1, 1)
    fed = torch.cat((tokens.read, tokens.prompt, tokens.answer), 1)
    chosen = llama.model(fed).logits[0, READ - 1 : -1].log_softmax(-1).gather(-1, tokens.answer[0, :, None])
    assert found[1].loglik == pytest.approx(float(chosen.mean()), abs=1e-5)


def test_one_token_answers(llama):
    for protocol in PROTOCOLS.values():
        evaluator, sample = Evaluator(llama, protocol), make_sample(4, question=1, answer=1)
        equal(evaluator.evaluate([made("h2o")], sample, TASK)[0], evaluator.evaluate_plainly(made("h2o"), sample, TASK))


def test_samples_that_measure_nothing_are_refused(llama):
    evaluator, sample = Evaluator(llama), make_sample()
    for field in ("context", "answer"):
        with pytest.raises(TaskError, match=f"words/0.*{field}"):
            evaluator.evaluate([made("knorm")], replace(sample, **{field: ""}), TASK)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loglik_without_context(request, family):
    loaded = request.getfixturevalue(family)
    sample, evaluator = make_sample(), Evaluator(loaded)
    tokens = evaluator.tokens(sample)
    fed = torch.cat((tokens.prompt, tokens.answer), 1)
    chosen = loaded.model(fed).logits[0, 4:-1].log_softmax(-1).gather(-1, tokens.answer[0, :, None])
    assert evaluator.loglik_without_context(sample) == pytest.approx(float(chosen.mean()), abs=1e-5)
    assert evaluator.loglik_without_context(replace(sample, question="")) < 0


def test_evaluations_are_plain_numbers(llama):
    for measurement in (LOGLIK, EXACT, Attention.measurement):
        found = Evaluator(llama).evaluate([made("knorm")], make_sample(), TASK, measurement)[0].to_json()
        assert {type(v) for k, v in found.items() if k not in ("sample", "head_attention")} == {float, int}
        assert ("loglik" in found, "exact" in found) == (measurement in (LOGLIK, EXACT), measurement == EXACT)


def test_samples_without_a_decision_are_warned_of(llama, caplog):
    sample = make_sample()
    length = Evaluator(llama, PROTOCOLS["once"]).length_of(sample)
    for every, warned in ((length, False), (length + 1, True)):
        caplog.clear()
        Evaluator(llama, EvaluationProtocol(kind="streaming", every=every)).check_positions([sample])
        assert ("1 of 1 samples" in caplog.text and "measured as the full memory" in caplog.text) == warned
    caplog.clear()
    Evaluator(llama, PROTOCOLS["once"]).check_positions([sample])
    assert not caplog.text
