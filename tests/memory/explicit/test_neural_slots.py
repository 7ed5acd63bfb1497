"""A neural memory about which a manager decides: against plain loops, as the model by itself, saved, and refused."""

from __future__ import annotations

import math

import pytest
import torch

from evomem.errors import CacheError, ConfigError, ModelError
from evomem.evaluation import Evaluator
from evomem.evaluation.measurement import EXACT, EvaluationProtocol
from evomem.managers import build
from evomem.memory.explicit.neural_slots import NeuralSlots
from evomem.memory.view import Decision
from evomem.models import LoadedModel
from evomem.models.architectures.titans import Titans, TitansConfig
from evomem.plugins import load_cache, save_cache
from evomem.tasks import Split
from evomem.tasks import build as build_task
from evomem.testing.models import tiny
from experiments.zoo.data import zoo_tokenizer
from tests.models.test_titans import MODELS, close, every_variant, ids_of
from tests.models.test_titans import tiny as tiny_titans
from tests.support.slow_titans import SlowDecided

WEIGHTS = [
    [[0.4, 0.5, 0.3], [-0.5, 0.6, -0.2], [0.7, -0.9, 0.1], [0.9, 0.1, 0.05]],
    [[-0.8, 0.2, 0.1], [0.5, -0.6, 0.3], [-0.7, 0.4, 0.5], [1.0, -0.1, 0.1]],
]
"""Of two points of depth, so of two layers; a head's are of 1, surprise_ratio and rate_gate."""


def gate_of(weights=WEIGHTS, *, every=4, **options):
    """A manager of these weights (knots, heads, 1 + features)."""
    features = ("surprise_ratio", "rate_gate")[: len(weights[0][0]) - 1]
    manager = build("surprise_gate", every=every, knots=len(weights), features=features, **options)
    with torch.no_grad():
        manager.weights.copy_(torch.tensor(weights))
    return manager


def logits_of(model, manager, ids, ends=None, mask=None):
    """Logits under a manager, the text in pieces, and the memory."""
    ends = [ids.shape[1]] if ends is None else ends
    with torch.no_grad(), manager.attach(model) as cache:
        parts = [
            model(ids[:, a:b], attention_mask=None if mask is None else mask[:, :b], past_key_values=cache).logits
            for a, b in zip([0, *ends], ends, strict=False)
        ]
    return torch.cat(parts, 1), cache


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def slow_judge(weights, slope=None):
    """What `surprise_gate` says of one token, in numbers: (α, η, θ), or None; the model's largest θ is 1."""

    def judge(token):
        x = [1.0, math.log1p(token["ratio"]), token["logits"][2]]
        forget, momentum, rate, threshold = (sum(w * f for w, f in zip(row, x, strict=True)) for row in weights)
        own = [sigmoid(z) for z in token["logits"]]
        below = min(max(threshold, 0.0), 4.0) - token["ratio"]
        part = 1.0 - (slope or math.inf) * below if below > 0 else 1.0
        if part < 0:
            return None
        alpha = min(sigmoid(token["logits"][0] + forget), max(own[0], 0.5))
        eta = min(sigmoid(token["logits"][1] + momentum), max(own[1], 0.99))
        theta = max(min(own[2] * math.exp(rate), max(own[2], 1.5)), min(own[2], 1e-3))
        return alpha, eta, theta * part

    return judge


@every_variant
@pytest.mark.parametrize(("every", "slope"), [(4, None), (2, None), (1, 3.0)])
def test_decisions_are_those_of_plain_loops(variant, every, slope):
    """The segment is learnt again, from what it began with, token after token with gradients by autograd."""
    model = tiny_titans(variant, num_hidden_layers=1)
    block, tokens = model.blocks[0], 11
    hidden = torch.randn(2, tokens, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    manager = gate_of(WEIGHTS[:1], slope=slope)
    layer = model.decided_cache(manager).layers[0]
    layer.begin_rows(2, hidden.device)
    mixed, stored = [], []
    for begin in range(0, tokens, every):
        part = hidden[:, begin : begin + every]
        layer.begin(block.memory.initial, 2)
        mixed.append(block.mix(part, torch.arange(begin, begin + part.shape[1])[None], None, layer))
        layer.finish(part.shape[1])
        if layer.seen % every == 0:
            layer.decide(manager)
            stored.append(layer.counts().tolist())
    for row in range(2):
        slow, wanted, counts = SlowDecided(block, window=5), [], []
        for number, one in enumerate(hidden[row]):
            wanted.append(slow(one))
            if number % every == every - 1:
                slow.decide(slow_judge(WEIGHTS[0], slope))
                counts.append([len(tokens) for tokens in slow.held])
        exact = 1e-6 if slope is None else 1e-4  # ratios and log-odds are recorded in fp32, and a slope widens that
        close(torch.cat(mixed, 1)[row], torch.stack(wanted), exact)
        assert [one[row] for one in stored] == counts
        weights = [torch.cat([matrix.flatten() for matrix in one.matrices]) for one in slow.memories]
        close(layer.memory[row], torch.stack(weights), exact)
    whole = 2 * 2 * sum(min(every * (n % (4 // every) + 1), 4) for n in range(len(stored)))
    assert 0 < sum(sum(map(sum, one)) for one in stored) < whole  # some are stored, and some are not


@every_variant
@pytest.mark.parametrize("every", [4, 2])
@pytest.mark.parametrize("spec", ["full", "surprise_gate(features=['surprise', 'forget_gate'], knots=2)"])
@torch.no_grad()
def test_what_decides_nothing_leaves_the_model_as_it_is(variant, every, spec):
    """To the bit, in the same pieces, in a batch with padding."""
    model, ids, pads = tiny_titans(variant).float(), ids_of(0, 14, 3), (0, 3, 6)
    mask = (torch.arange(14) >= torch.tensor(pads)[:, None]).long()
    ends = sorted({5, 14} | {pad + turn for pad in pads for turn in range(every, 14 - pad, every)})
    decided, cache = logits_of(model, build(spec, every=every), ids, ends, mask)
    plain, parts = model.new_cache(), []
    for a, b in zip([0, *ends], ends, strict=False):
        parts.append(model(ids[:, a:b], past_key_values=plain, attention_mask=mask[:, :b]).logits)
    assert torch.equal(decided, torch.cat(parts, 1))
    for mine, theirs in zip(cache.layers, plain.layers, strict=True):
        assert torch.equal(mine.memory, theirs.memory)
        assert torch.equal(mine.momentum, theirs.momentum)


@every_variant
def test_pieces_and_batches_are_as_each_row_alone(variant):
    """Rows with their own padding have turns of their own."""
    model, ids, pads = MODELS[variant], ids_of(3, 19, 3), (0, 3, 6)
    mask = (torch.arange(19) >= torch.tensor(pads)[:, None]).long()
    for every in (4, 2):
        manager = gate_of(every=every)
        whole, cache = logits_of(model, manager, ids, mask=mask)
        parts, _ = logits_of(model, manager, ids, [2, 3, 9, 10, 19], mask=mask)
        for row, pad in enumerate(pads):
            alone, single = logits_of(model, manager, ids[row : row + 1, pad:])
            close(whole[row, pad:], alone[0], 1e-6)
            close(parts[row, pad:], alone[0], 1e-6)
            for many, one in zip(cache.layers, single.layers, strict=True):
                close(many.memory[row], one.memory[0], 1e-6)
                assert many.counts()[row].tolist() == one.counts()[0].tolist()
    assert float((whole - model(ids, attention_mask=mask).logits).abs().max()) > 1e-3


def test_a_token_that_leaves_was_never_there():
    """All tokens of a segment out: M and S are those that it began with; one out: it is passed over."""
    model, ids = MODELS["mal"], ids_of(5, 12)
    cache = model.decided_cache(build("full"))
    model(ids[:, :8], past_key_values=cache)
    before = [(layer.memory, layer.momentum) for layer in cache.layers]
    model(ids[:, 8:11], past_key_values=cache)
    for layer, (memory, momentum) in zip(cache.layers, before, strict=True):
        assert not torch.equal(layer.memory, memory)
        layer.keep(torch.zeros(2, 2, 3, dtype=torch.bool))
        assert torch.equal(layer.memory, memory)
        assert torch.equal(layer.momentum, momentum)
        assert not layer.counts().any()
    model(ids[:, 11:], past_key_values=cache)


def test_a_gate_moves_within_its_limits():
    """α to at most .5, η to .99, θ to 1.5 and at least 1e-3; those of the model that are beyond do not move out."""
    rule = MODELS["lmm"].decided_cache(build("full")).rule
    logits = torch.tensor([[-5.0, -1.0, 0.0], [3.0, 8.0, -9.0]])[None, None]
    for far in (1e9, torch.inf):
        up, down = (rule.gates(logits, torch.full_like(logits, sign * far)) for sign in (1.0, -1.0))
        torch.testing.assert_close(up.forget[0, 0], torch.tensor([0.5, torch.sigmoid(torch.tensor(3.0))]))
        torch.testing.assert_close(up.momentum[0, 0], torch.tensor([0.99, torch.sigmoid(torch.tensor(8.0))]))
        torch.testing.assert_close(up.rate[0, 0], torch.tensor([1.5, 1.5]))
        torch.testing.assert_close(down.rate[0, 0], torch.tensor([1e-3, torch.sigmoid(torch.tensor(-9.0))]))
        assert float(down.forget.max()) < 1e-8
    same = rule.gates(logits, torch.zeros_like(logits))
    assert torch.equal(torch.stack((same.forget, same.momentum, same.rate), -1), torch.sigmoid(logits))


@every_variant
def test_a_saved_memory_goes_on_to_the_bit(variant, tmp_path):
    model, manager, ids = tiny_titans(variant).float(), gate_of(), ids_of(4, 22)
    for read in (10, 12):
        with torch.no_grad():
            cache = model.decided_cache(manager)
            model(ids[:, :read], past_key_values=cache)
            save_cache(cache, tmp_path / "memory.safetensors", model=model)
            again = load_cache(tmp_path / "memory.safetensors", model)
            one, two = (model(ids[:, read:], past_key_values=part).logits for part in (cache, again))
        assert torch.equal(one, two)
        assert cache.nbytes() == again.nbytes()


def test_its_bytes_do_not_grow_with_the_text():
    model, sizes = MODELS["mag"], []
    for tokens in (16, 64):
        _, cache = logits_of(model, build("full", every=4), ids_of(0, tokens))
        sizes.append(cache.nbytes())
    assert sizes[0] == sizes[1]


@pytest.fixture(scope="module")
def loaded():
    tokenizer = zoo_tokenizer()
    torch.manual_seed(0)
    config = TitansConfig(
        variant="mal", vocab_size=len(tokenizer), hidden_size=16, num_attention_heads=2, intermediate_size=24,
        segment=8, window=4, initializer_range=0.4,
    )  # fmt: skip
    return LoadedModel("tiny-titans", Titans(config).eval().requires_grad_(False), tokenizer, "0" * 64)


def test_candidates_of_a_batch_are_each_alone(loaded):
    """The likelihood is that of one pass over context, question and answer with the manager's own cache."""
    evaluator = Evaluator(loaded, EvaluationProtocol(kind="streaming", every=8))
    task = build_task("zoo_recall", loaded.tokenizer, 48)
    (sample,) = task.samples(Split.SELECT, 1, 0)
    gates = [gate_of(every=8), gate_of([[[-w for w in row] for row in part] for part in WEIGHTS], every=8)]
    policy = build("kv_policy(features=['surprise', 'age'], actions=['evict', 'store', 'forget'])", budget=5)
    managers = [*gates, build("full"), build("lru(budget=2)"), build("lru", budget=0.5), policy]
    tokens = evaluator.tokens(sample)
    ids, answer = torch.cat((tokens.read, tokens.prompt, tokens.answer), 1), tokens.answer.shape[1]
    results = evaluator.evaluate(managers, sample, task, EXACT)
    for manager, result in zip(managers, results, strict=True):
        with manager.with_options(every=8).attach(loaded.model) as cache:
            logits = loaded.model(ids[:, :-1], past_key_values=cache).logits
        plain = logits[:, -answer:].log_softmax(-1).gather(-1, ids[:, -answer:, None]).mean()
        assert result.loglik == pytest.approx(float(plain.detach()), abs=1e-4)
        assert result.loglik == pytest.approx(evaluator.evaluate_plainly(manager, sample, task, EXACT).loglik, abs=1e-4)
    assert len({round(result.loglik, 4) for result in results}) == len(results)


def test_a_budget_counts_the_tokens_of_a_segment():
    model, ids = MODELS["lmm"], ids_of(1, 11)
    for budget, counts in ((3, [3, 3]), (0.5, [2, 2])):
        _, cache = logits_of(model, build("lru", budget=budget, every=4), ids[:, :8])
        assert [int(layer.counts().max()) for layer in cache.layers] == counts
    _, cache = logits_of(model, build("surprise_gate", every=4), ids[:, :8])  # which takes none: test_refit.py
    assert [int(layer.counts().min()) for layer in cache.layers] == [4, 4]


def test_what_cannot_be_decided_is_refused():
    model, ids = MODELS["lmm"], ids_of(5, 11)
    for every in (3, 8):
        with pytest.raises(ConfigError, match="every=4"):
            model.decided_cache(build("full", every=every))
    for spec in ("h2o", "lfu"):
        with pytest.raises(ConfigError, match="nobody attends to the tokens of a neural memory"):
            model.decided_cache(build(spec, budget=4))
    for spec in ("snapkv(budget=4)", "expected_attention(budget=4)", "write_gate"):
        with pytest.raises(ConfigError, match="which a neural memory does not have"):
            model.decided_cache(build(spec))
    cache = model.decided_cache(build("full"))
    model(ids[:, :9], past_key_values=cache)
    with pytest.raises(CacheError, match="every=4"):
        cache.decide()
    view = cache.layers[0].view()
    with pytest.raises(CacheError, match="which only its model writes"):
        cache.layers[0].apply(Decision(view.valid, keys=view.keys, values=view.values), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ModelError, match=r"or model\.decided_cache"):
        model(ids, past_key_values=tiny_titans("lmm", num_hidden_layers=1).decided_cache(build("full")))
    with pytest.raises(CacheError, match=r"learn by .*segment=2.*segment=4.*decided_cache"):
        model(ids, past_key_values=tiny_titans("lmm", segment=2).decided_cache(build("full")))
    with pytest.raises(ConfigError, match="'surprise_ratio' needs gates, which a KV cache does not have"):
        build("surprise_gate").new_cache(tiny("llama"))
    with pytest.raises(ConfigError, match="one and the same"):
        build("surprise_gate", features=("change", "change"))
    with pytest.raises(ConfigError, match="allocation"):
        build("surprise_gate", allocation="pyramid")


def test_gates_are_refused_where_there_are_none():
    from evomem.memory.explicit.pairs import PairMemory

    memory = PairMemory()
    with pytest.raises(CacheError, match="a pair memory has none"):
        memory.apply(Decision(torch.ones(1, 1, 1, dtype=torch.bool), gates=torch.zeros(1, 1, 1, 3)))


@pytest.mark.parametrize(
    ("part", "harm", "message"),
    [
        ("memory", lambda x: x[..., 1:], "has shape"),
        ("momentum_before", lambda x: x[..., 1:], "'momentum_before' is"),
        ("altered", lambda x: x.float(), "'altered' is"), ("mean_error", lambda x: x * torch.nan, "no number"),
        ("even.slots", lambda x: x - 4, "earlier segment|even.slots"),
        ("even.keys", lambda x: x[..., 1:], "of width 8"), ("start", lambda x: x + 50, "'start'"),
        ("slotwise.gates", lambda x: x[..., :2], "slotwise.gates"),
    ],
)  # fmt: skip
def test_a_changed_state_is_refused(part, harm, message):
    model, manager, ids = tiny_titans("mac").float(), build("lru", budget=2, every=4), ids_of(0, 10)
    cache, again = model.decided_cache(manager), model.decided_cache(manager)
    model(ids, past_key_values=cache)
    facts, tensors = cache.state()
    again.load_state(facts, tensors)
    with pytest.raises(CacheError, match=message):
        again.load_state(facts, tensors | {f"0.{part}": harm(tensors[f"0.{part}"])})
    del tensors["0.memory"]
    with pytest.raises(CacheError, match="'memory' is missing"):
        again.load_state(facts, tensors)


def test_beams_and_generation_follow_the_rows():
    model, ids, manager = tiny_titans("mag").float(), ids_of(0, 9), gate_of()
    with manager.attach(model) as cache:
        together = model.generate(ids, past_key_values=cache, max_new_tokens=9, do_sample=False, num_beams=2)
    for row in range(2):
        with manager.attach(model) as cache:
            alone = model.generate(
                ids[row : row + 1], past_key_values=cache, max_new_tokens=9, do_sample=False, num_beams=2
            )
        assert torch.equal(together[row : row + 1], alone)


def test_a_manager_moves_to_a_model_of_another_width_and_depth():
    """Weights of two points of depth; the layer in the middle of three has their mean."""
    ids, other = ids_of(0, 12), tiny_titans("mac", hidden_size=32, num_hidden_layers=3)
    _, cache = logits_of(other, gate_of(), ids)
    middle = cache.layers[1].view()
    mean = (torch.tensor(WEIGHTS[0]) + torch.tensor(WEIGHTS[1])) / 2
    got, wanted = (manager.outputs(middle) for manager in (gate_of(), gate_of([mean.tolist()])))
    torch.testing.assert_close(got, wanted)


def test_a_layer_is_copied_with_its_rule():
    cache = MODELS["lmm"].decided_cache(gate_of())
    assert isinstance(cache.copy_empty().layers[1], NeuralSlots)
    assert cache.clone().rule == cache.rule


def test_gates_that_a_decision_moved_are_not_undone_by_hand():
    """keep and decay learn the segment again, and do not know by how much gates were moved."""
    ids, model = ids_of(0, 4), MODELS["lmm"]
    _, cache = logits_of(model, gate_of(every=4), ids)
    layer = cache.layers[0]
    before = layer.memory.clone()
    with pytest.raises(CacheError, match="moved the gates"):
        layer.keep(layer.slots >= 0)
    with pytest.raises(CacheError, match="moved the gates"):
        layer.decay(torch.zeros(layer.storage.shape))
    assert torch.equal(layer.memory, before)


def test_who_is_not_asked_is_said(caplog):
    ids, model = ids_of(0, 16), MODELS["lmm"]
    with torch.no_grad():
        cache = model.decided_cache(build("keydiff", budget=2))
        model(ids[:, :4], past_key_values=cache)
        assert "was not asked" not in caplog.text  # decide() can still be called
        cache.decide()
        model(ids[:, 4:], past_key_values=cache)
    assert caplog.text.count("a segment of 4 tokens ended within a pass and the manager was not asked") == 1
