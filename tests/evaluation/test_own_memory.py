"""A model with a memory of its own: the evaluator against one candidate alone, in one pass over its own cache."""

from __future__ import annotations

import pytest
import torch

from evomem.errors import CacheError, ConfigError, UnsupportedModelError
from evomem.evaluation import Evaluator
from evomem.evaluation.measurement import EXACT, EvaluationProtocol
from evomem.evaluation.population import Recording
from evomem.managers import build
from evomem.memory import attached
from evomem.memory.kv.snapshot import take
from evomem.models import LoadedModel
from evomem.models.architectures.memory_matrix import MemoryMatrix, MemoryMatrixConfig
from evomem.runs.bench import calibrate_manager
from evomem.tasks import Split
from evomem.tasks import build as build_task
from experiments.zoo.data import zoo_tokenizer

FIELD = ("full", "knorm(budget=4)", "streaming_llm(budget=4)", "h2o(budget=4)", "lava(budget=4)")


@pytest.fixture(scope="module")
def loaded():
    tokenizer = zoo_tokenizer()
    torch.manual_seed(0)
    config = MemoryMatrixConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, window=4, matrix_slots=8, matrix_width=6,
        matrix_heads=2, initializer_range=0.4, matrix_layers=[1],
    )  # fmt: skip
    return LoadedModel("tiny-matrix", MemoryMatrix(config).eval().requires_grad_(False), tokenizer, "0" * 64)


@pytest.mark.parametrize("every", [1, 3])
def test_candidates_of_a_batch_are_each_alone(loaded, every):
    """The likelihood is that of one pass over context, question and answer with the manager's own cache."""
    evaluator = Evaluator(loaded, EvaluationProtocol(kind="streaming", every=every))
    task = build_task("zoo_recall", loaded.tokenizer, 48)
    (sample,) = task.samples(Split.SELECT, 1, 0)
    managers = [build(spec) for spec in FIELD]
    for manager, result in zip(managers, evaluator.evaluate(managers, sample, task, EXACT), strict=True):
        tokens = evaluator.tokens(sample)
        ids = torch.cat((tokens.read, tokens.prompt, tokens.answer), 1)
        with manager.with_options(every=every).attach(loaded.model) as cache:
            logits = loaded.model(ids[:, :-1], past_key_values=cache).logits
        answer = tokens.answer.shape[1]
        plain = logits[:, -answer:].log_softmax(-1).gather(-1, ids[:, -answer:, None]).mean()
        assert result.loglik == pytest.approx(float(plain), abs=1e-4)
        assert result.exact is not None
        whole = evaluator.evaluate_plainly(manager, sample, task, EXACT)
        assert (whole.exact, whole.slots) == (result.exact, pytest.approx(result.slots))
        assert whole.loglik == pytest.approx(result.loglik, abs=1e-4)
        if manager.options.budget is not None:
            assert result.slots <= 4 + every
            assert result.bytes_peak < 2 * result.bytes_mean


def test_statistics_are_measured_with_everything_kept(loaded):
    """A manager with statistics gets those of memories in which every write stays, whatever the protocol."""
    evaluator = Evaluator(loaded, EvaluationProtocol(kind="streaming", every=4))
    task = build_task("zoo_recall", loaded.tokenizer, 48)
    samples = task.samples(Split.TRAIN, 2, 0)
    policy, by_hand = (build("kv_policy(features=[recency, novelty], scale=model, budget=4)") for _ in range(2))
    calibrate_manager(policy, [(evaluator, samples)])
    views = []
    for sample in samples:
        cache = loaded.model.decided_cache(Recording(policy.observes))
        with torch.no_grad():
            loaded.model(evaluator.tokens(sample).read, past_key_values=cache)
        views += [layer.view() for layer in cache.layers]
    by_hand.calibrate(views)
    measured = dict(policy.named_buffers())
    assert measured
    for name, value in by_hand.named_buffers():
        assert torch.equal(measured[name], value)
    fresh = dict(build("kv_policy(features=[recency, novelty], scale=model, budget=4)").named_buffers())
    assert any(not torch.equal(fresh[name], value) for name, value in measured.items())


def test_what_cannot_be_measured_is_refused(loaded):
    task = build_task("zoo_recall", loaded.tokenizer, 48)
    (sample,) = task.samples(Split.SELECT, 1, 0)
    with pytest.raises(ConfigError, match="streaming:1"):
        Evaluator(loaded).evaluate([build("full")], sample, task)
    with pytest.raises(UnsupportedModelError, match="attention heads"):
        build("knorm(budget=4,every=1,allocation=razor)").for_model(loaded.model)
    with build("full(every=4)").attach(loaded.model) as cache, pytest.raises(CacheError, match="state"):
        take(cache)
    with pytest.raises(ConfigError, match="every=1"), build("knorm(budget=4)").attach(loaded.model):
        pass
    with pytest.raises(CacheError, match="pass"), build("knorm(budget=4,every=1)").attach(loaded.model):
        loaded.model(torch.zeros(1, 3, dtype=torch.int64))
    with attached(loaded.model):  # any cache of its own, or none, is as outside
        loaded.model(torch.zeros(1, 3, dtype=torch.int64))
    assert loaded.model.config._attn_implementation != "evomem"
