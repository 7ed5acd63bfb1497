"""A feedback memory about which a manager decides: gates against plain loops, turns, saved, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from evomem.errors import CacheError, ConfigError, ModelError
from evomem.evaluation import Evaluator
from evomem.evaluation.measurement import EXACT, EvaluationProtocol
from evomem.managers import build
from evomem.models import LoadedModel
from evomem.models.architectures.fam import Fam, FamConfig
from evomem.plugins import load_cache, save_cache
from evomem.tasks import Split
from evomem.tasks import build as build_task
from evomem.testing.models import tiny
from experiments.zoo.data import zoo_tokenizer
from tests.models.test_fam import close, ids_of, tiny_fam
from tests.support.slow_fam import slow_fam


@pytest.fixture(scope="module")
def model():
    return tiny_fam()


def gate_of(weights, **options):
    """A gate with weights (knots, 1 + features)."""
    manager = build("write_gate", every=4, knots=len(weights), **options)
    with torch.no_grad():
        manager.weights.copy_(torch.tensor(weights))
    return manager


def logits_of(model, manager, ids, ends=None):
    """Logits under a manager, the text in pieces, and the memory."""
    ends = [ids.shape[1]] if ends is None else ends
    with manager.attach(model) as cache:
        parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in zip([0, *ends], ends, strict=False)]
    return torch.cat(parts, 1), cache


def slow_gate(weights):
    """The gate of one layer: σ(w · [1, |ΔF| / |F|, cos, log τ]), of numbers."""

    def gate(old, new, number):
        old, new = old.tolist(), new.tolist()
        size = math.sqrt(sum(x * x for x in old))
        moved = math.sqrt(sum((y - x) ** 2 for x, y in zip(old, new, strict=True)))
        dot = sum(x * y for x, y in zip(old, new, strict=True))
        seen = [1.0, moved / size, dot / size / math.sqrt(sum(y * y for y in new)), math.log(number)]
        return 1 / (1 + math.exp(-sum(w * x for w, x in zip(weights, seen, strict=True))))

    return gate


@pytest.mark.parametrize("every", [4, 2, 1])
def test_a_manager_that_keeps_all_leaves_the_model_as_it_is(model, every):
    ids = ids_of(0, 18)
    for spec in ("full", "lru(budget=3)"):
        logits, _ = logits_of(model, build(spec, every=every), ids, [5, 6, 18])
        close(logits, model(ids).logits)
    close(model(ids, past_key_values=model.decided_cache(build("full"))).logits, model(ids).logits)


@pytest.mark.parametrize("constant", [-100.0, -0.5, 100.0])
def test_a_constant_gate_is_that_of_plain_loops(model, constant):
    """Nothing written, a part, and everything."""
    ids = ids_of(1, 14)
    manager = build("write_gate", features=(), bias=constant, every=4)
    share = 1 / (1 + math.exp(-constant))
    for row in range(2):
        slow, _ = slow_fam(model, ids[row].tolist(), [lambda *_: share] * 2)
        torch.testing.assert_close(logits_of(model, manager, ids)[0][row], slow, rtol=1e-5, atol=1e-5)


def test_a_gate_is_that_of_plain_loops(model):
    """Observations are fp32, so that a gate is; in pieces it is the same."""
    weights, ids = [[-1.0, 0.7, 1.5, -0.4], [0.5, -0.6, -1.0, 0.8]], ids_of(2, 18)
    logits, cache = logits_of(model, gate_of(weights), ids, [3, 4, 11, 18])
    whole, _ = logits_of(model, gate_of(weights), ids)
    for row in range(2):
        slow, ends = slow_fam(model, ids[row].tolist(), [slow_gate(one) for one in weights])
        for fast in (logits, whole):
            torch.testing.assert_close(fast[row], slow, rtol=1e-4, atol=1e-4)
        for layer, feedback in zip(cache.layers, ends, strict=True):
            torch.testing.assert_close(layer.feedback[row], torch.stack(feedback), rtol=1e-4, atol=1e-4)
    assert float((logits - model(ids).logits).abs().max().detach()) > 0.1


def test_slots_that_leave_are_not_read_and_cost_nothing(model):
    """With one slot of three, the memory is one whose others have faded away, and holds their bytes no more."""
    ids, cache = ids_of(3, 12), model.decided_cache(build("full"))
    model(ids[:, :4], past_key_values=cache)
    before = cache.nbytes()
    for layer in cache.layers:
        layer.keep(torch.tensor([True, False, False]).expand(2, 1, 3))
    assert before - cache.nbytes() == 2 * 2 * 2 * (2 * 16 * 8 + 8 + 8)  # layers, rows, slots; F twice, index, number
    got = model(ids[:, 4:], past_key_values=cache).logits
    for layer in cache.layers:  # it stands where the first of three does
        assert layer.numbers.unique().tolist() == [0]
        assert layer.slots.unique().tolist() == [12 - 3]
    other = model.decided_cache(build("full"))
    model(ids[:, :4], past_key_values=other)
    for layer in other.layers:  # faded beyond every other one
        layer.decay(torch.tensor([0.0, -1e9, -1e9]).expand(2, 1, 3))
    close(got, model(ids[:, 4:], past_key_values=other).logits)


def test_a_saved_memory_goes_on_to_the_bit(tmp_path):
    torch.manual_seed(0)
    model = Fam(FamConfig(vocab_size=20, hidden_size=16, num_attention_heads=2, block=4, initializer_range=0.4)).eval()
    manager, ids = gate_of([[0.3, 0.2, -0.5, 0.1]]), ids_of(4, 22)
    with torch.no_grad():
        cache = model.decided_cache(manager)
        model(ids[:, :10], past_key_values=cache)
        save_cache(cache, tmp_path / "memory.safetensors", model=model)
        again = load_cache(tmp_path / "memory.safetensors", model)
        one, two = (model(ids[:, 10:], past_key_values=part).logits for part in (cache, again))
    assert torch.equal(one, two)


@pytest.mark.parametrize("spec", ["full", "write_gate(features=[],bias=100)", "write_gate(bias=100)"])
def test_gradients_through_a_decided_memory_are_those_of_the_models_own(spec):
    """A manager that writes everything leaves them as they are, those of what feedback begins with too."""
    gradients = []
    for manager in (None, build(spec, every=4)):
        model, ids = tiny_fam().requires_grad_(True), ids_of(6, 14)
        cache = None if manager is None else model.decided_cache(manager)
        model(ids, past_key_values=cache).logits[:, 6:].square().mean().backward()
        gradients.append({name: one.grad for name, one in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert float(gradient.abs().sum()) > 0
        close(gradients[1][name], gradient)


@pytest.fixture(scope="module")
def loaded():
    tokenizer = zoo_tokenizer()
    torch.manual_seed(0)
    config = FamConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_attention_heads=2, intermediate_size=24, block=8, feedback=2,
        initializer_range=0.4,
    )  # fmt: skip
    return LoadedModel("tiny-fam", Fam(config).eval().requires_grad_(False), tokenizer, "0" * 64)


def test_candidates_of_a_batch_are_each_alone(loaded):
    """The likelihood is that of one pass over context, question and answer with the manager's own cache."""
    evaluator = Evaluator(loaded, EvaluationProtocol(kind="streaming", every=8))
    task = build_task("zoo_recall", loaded.tokenizer, 48)
    (sample,) = task.samples(Split.SELECT, 1, 0)
    gates = [build("write_gate", every=8) for _ in range(2)]
    with torch.no_grad():
        for gate in gates:
            gate.weights.normal_(generator=torch.Generator().manual_seed(len(gates)))
        gates[1].weights.neg_()
    managers = [*gates, build("full"), build("lru(budget=1)")]
    tokens = evaluator.tokens(sample)
    ids, answer = torch.cat((tokens.read, tokens.prompt, tokens.answer), 1), tokens.answer.shape[1]
    results = evaluator.evaluate(managers, sample, task, EXACT)
    for manager, result in zip(managers, results, strict=True):
        with manager.with_options(every=8).attach(loaded.model) as cache:
            logits = loaded.model(ids[:, :-1], past_key_values=cache).logits
        plain = logits[:, -answer:].log_softmax(-1).gather(-1, ids[:, -answer:, None]).mean()
        assert result.loglik == pytest.approx(float(plain.detach()), abs=1e-4)
    assert len({round(result.loglik, 4) for result in results}) == len(results)


def test_what_cannot_be_decided_is_refused(model, loaded):
    ids = ids_of(5, 9)
    for every in (3, 8):
        with pytest.raises(ConfigError, match="every=4"):
            model.decided_cache(build("full", every=every))
    with pytest.raises(ModelError, match="no feedback memory"):
        tiny_fam(feedback=0).decided_cache(build("full", every=4))
    for read in (9, 5):  # two blocks, and one with a token behind it
        cache = model.decided_cache(build("full"))
        model(ids[:, :read], past_key_values=cache)
        with pytest.raises(CacheError, match="every=4"):
            cache.decide()
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    with pytest.raises(CacheError, match="rows of one length"):
        model(ids, attention_mask=mask, past_key_values=model.decided_cache(build("full", every=4)))
    with pytest.raises(ConfigError, match="updates of what its slots hold"):
        build("write_gate").new_cache(tiny("llama"))
    with pytest.raises(ConfigError, match="one and the same"):
        build("write_gate", features=("change", "change"))
