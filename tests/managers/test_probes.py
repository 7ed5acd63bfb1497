"""What heads do on synthetic text, against the stock model's own attention, and that it is never another model's."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from evomem.errors import CacheError, ConfigError, ModelError, PluginError
from evomem.evaluation import EvaluationProtocol, Evaluator
from evomem.managers import build
from evomem.managers.allocation import PROBES, HeadProbes, probes
from evomem.managers.allocation.probed import keep_probes
from evomem.managers.allocation.probes import DRAWS, GRID, SINKS, Texts, fingerprint, head_probes, measure
from evomem.models import LoadedModel
from evomem.plugins import load, load_cache, save, save_cache
from evomem.runs.bench import calibrate_manager
from evomem.search_space.space import SearchSpace, SpaceConfig
from evomem.testing.models import FAMILIES, tiny, tiny_tokenizer
from tests.evaluation.test_evaluation import TASK, make_sample

SPEC = "keydiff(budget=6,allocation=probe_shares(power=1))"
MODELS = {
    **{family: (family, {}) for family in FAMILIES},
    "windows": ("mistral", {"sliding_window": 32}),
    "ungrouped": ("llama", {"num_key_value_heads": 4}),
}


def stock_attention(model, ids):
    """The stock model's probabilities: one (draws, query heads, tokens, tokens) a layer."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return [a.double() for a in model(input_ids=ids, output_attentions=True).attentions]
    finally:
        model.set_attn_implementation(before)


def slow_probes(model, kv_heads: int) -> list[dict[str, float]]:
    """One head after the other, one query after the other, from the definitions."""
    texts = Texts.of(model)
    count, begin = texts.count, texts.begin
    twice, pairs = texts.repeated(), texts.pairs()
    window = min(64, count // 2)
    found = []
    for attention, paired in zip(stock_attention(model, twice), stock_attention(model, pairs), strict=True):
        group = attention.shape[1] // kv_heads
        for head in range(kv_heads):
            sums: dict[str, list[list[float]]] = {name: [] for name in PROBES}
            for draw in range(DRAWS):
                of_heads: dict[str, list[float]] = {name: [] for name in PROBES}
                for query_head in range(head * group, (head + 1) * group):
                    rows: dict[str, list[float]] = {name: [] for name in PROBES}
                    for at in range(begin + count, begin + 2 * count):
                        row, ids = attention[draw, query_head, at].tolist(), twice[draw].tolist()
                        first = ids.index(ids[at], begin)
                        assert first < at
                        rows["echo"].append(row[first])
                        rows["induction"].append(row[first + 1])
                        rows["sinks"].append(sum(row[:SINKS]))
                        rows["beyond_window"].append(sum(row[SINKS : max(SINKS, at - window + 1)]))
                        rows["entropy"].append(-sum(p * math.log(p) for p in row if p > 0) / math.log(at + 1))
                    ids = pairs[draw].tolist()
                    for at in range(begin + count, begin + 2 * count, 2):
                        key = ids.index(ids[at], begin)
                        assert ids[key + 1] == ids[at + 1]
                        rows["retrieval"].append(paired[draw, query_head, at, key + 1].item())
                    for name in PROBES:
                        of_heads[name].append(sum(rows[name]) / len(rows[name]))
                for name, values in of_heads.items():
                    mean = name in ("sinks", "entropy")
                    sums[name].append([sum(values) / len(values) if mean else max(values)])
            found.append({name: sum(v[0] for v in values) / DRAWS for name, values in sums.items()})
    return found


@pytest.mark.parametrize("name", MODELS)
def test_probes_are_those_of_the_stock_model_head_by_head(name):
    family, changes = MODELS[name]
    # Few tokens, so that loops are fast: those of the middle of the vocabulary, half of the positions.
    model = tiny(family, layers=2, **changes, **{"vocab_size": 48})
    measured = measure(model)
    slow = slow_probes(model, measured.heads[0])
    assert measured.heads == (measured.heads[0],) * 2
    assert len(slow) == len(measured.values)
    wanted = torch.tensor([[one[probe] for probe in PROBES] for one in slow])
    torch.testing.assert_close(measured.values, wanted, rtol=0, atol=1 / GRID + 1e-5)
    assert measured.values.dtype == torch.float32
    assert measured.values.std(0).min() > 0, "heads that all do the same tell nothing apart"
    assert torch.equal(measured["echo"], measured.values[:, PROBES.index("echo")])
    assert torch.equal(torch.cat(measured.by_layer()), measured.values)


def test_texts_repeat_what_they_say_and_no_special_token():
    texts = Texts.of(tiny("llama"))
    assert texts.first == 1
    assert texts.begin == 1
    for ids in (texts.repeated(), texts.pairs()):
        assert ids.shape == (DRAWS, 1 + 2 * texts.count)
        assert bool((ids[:, 0] == 1).all())
        for row in ids[:, 1:].tolist():
            assert sorted(row) == sorted(2 * row[: texts.count])
            assert len(set(row)) == texts.count
            assert min(row) >= 32
            assert max(row) < 120
    twice = texts.repeated()[:, 1:]
    assert torch.equal(twice[:, : texts.count], twice[:, texts.count :])
    assert Texts.of(tiny("gpt2", max_position_embeddings=21, n_positions=21)).count == 10
    assert replace(texts, first=None).begin == 0
    assert replace(texts, first=None).repeated().shape[1] == 2 * texts.count


def test_a_head_that_looks_at_the_token_after_the_earlier_one_is_an_induction_head():
    texts = Texts.of(tiny("llama"))
    size = 1 + 2 * texts.count
    attention = torch.zeros(1, 3, 2, size, size)
    attention[..., 0] = 1.0
    for at in range(1 + texts.count, size):
        attention[0, 0, 1, at] = torch.nn.functional.one_hot(torch.tensor(at - texts.count + 1), size)
        attention[0, 1, 0, at] = torch.nn.functional.one_hot(torch.tensor(at - texts.count), size)
    scores = dict(zip(texts.REPEATED, texts.repeated_scores(attention)[0].T.tolist(), strict=True))
    assert scores["induction"] == [1, 0, 0]
    assert scores["echo"] == [0, 1, 0]
    assert scores["sinks"][2] == 1
    assert 0.5 <= scores["sinks"][0] < 0.53
    assert scores["entropy"] == [0, 0, 0]


def test_too_small_a_model_is_refused():
    with pytest.raises(ModelError, match="too few for a text that repeats 8 tokens"):
        head_probes(tiny("llama", vocab_size=14))
    with pytest.raises(ModelError, match="positions"):
        head_probes(tiny("gpt2", max_position_embeddings=16, n_positions=16))


def test_probes_are_of_the_model_and_not_of_the_moment():
    model = tiny("llama", layers=2)
    first = measure(model)
    model.train()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        inside = measure(model)
    assert model.training
    assert all(part.training for part in model.modules())
    assert torch.equal(first.values, inside.values)
    assert not inside.values.is_inference()
    half = measure(tiny("llama", layers=2).bfloat16())
    assert half.values.dtype == torch.float32
    assert half.fingerprint != first.fingerprint
    torch.testing.assert_close(half.values, first.values, atol=0.05, rtol=0)


def test_a_model_is_measured_once_and_anew_when_its_weights_change(monkeypatch):
    model, counted = tiny("llama", seed=5), []
    monkeypatch.setattr(probes, "measure", lambda m, key: counted.append(key) or measure(m, key))
    first = head_probes(model)
    assert head_probes(model) is first
    assert head_probes(tiny("llama", seed=5)) is first
    assert len(counted) == 1
    assert first.fingerprint == fingerprint(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(0.5)
    assert not torch.equal(head_probes(model).values, first.values)
    assert len(counted) == 2


def test_measuring_is_no_use_of_the_block_around_it():
    """A model that ran over no cache of slots is told of, although it was measured inside the block."""

    def without_cache(manager, model):
        with build("keydiff(budget=4)").attach(model):
            manager.new_cache(model)
            model(input_ids=torch.arange(40, 50)[None])

    with pytest.raises(CacheError, match="nothing was managed"):
        without_cache(build(SPEC), tiny("llama", seed=6))


# ---- allocations that look at probes ---------------------------------------------------------------------------------


def kept_slots(manager, model, ids=None):
    with manager.attach(model) as cache, torch.no_grad():
        model(input_ids=torch.arange(40, 70)[None] if ids is None else ids, past_key_values=cache)
    return torch.stack(cache.slots_held()).flatten()


def slow_shares(measured: HeadProbes, total: int, power: float, most: int) -> torch.Tensor:
    """Slots of every head, before rounding: one at a time, to whoever lacks most of its share."""
    weights = ((measured["induction"].double() + 0.001) ** power).tolist()
    given = [1.0] * len(weights)
    step = 1 / 64
    for _ in range(int((total - len(weights)) / step)):
        open_heads = [h for h in range(len(weights)) if given[h] < most]
        least = min(open_heads, key=lambda h: (given[h] - 1) / weights[h])
        given[least] += step
    return torch.tensor(given)


def test_shares_follow_the_probe_and_no_head_gets_more_than_it_holds():
    model = tiny("llama", seed=1)
    for budget in (6, 25):
        held = kept_slots(build(f"keydiff(budget={budget},allocation=probe_shares(power=2))"), model)
        assert int(held.sum()) == 6 * budget
        wanted = slow_shares(head_probes(model), 6 * budget, 2, 30)
        assert (held - wanted).abs().max() <= 1.1
    with_least = kept_slots(build("keydiff(budget=6,allocation=probe_shares(power=8,least=4))"), model)
    assert int(with_least.min()) == 4
    assert int(with_least.sum()) == 36


def test_a_manager_never_uses_another_models_probes():
    """Of the same shape, so that nothing but the fingerprint tells them apart."""
    one, other = tiny("llama", seed=1), tiny("llama", seed=2)
    manager = build(SPEC)
    keep_probes(manager, one)
    assert manager.for_model(one) is manager
    before = {name: tensor.clone() for name, tensor in manager.state_dict().items()}
    assert torch.equal(kept_slots(manager, other), kept_slots(build(SPEC), other))
    assert not torch.equal(kept_slots(manager, other), kept_slots(manager, one))
    assert all(torch.equal(tensor, before[name]) for name, tensor in manager.state_dict().items())
    twin = manager.for_model(other)
    assert torch.equal(twin.allocation.probes, head_probes(other).values)
    assert twin.allocation is not manager.allocation
    assert torch.equal(kept_slots(build(SPEC), tiny("qwen3", layers=2)), kept_slots(manager, tiny("qwen3", layers=2)))


def test_a_twin_shares_parameters():
    manager = build("feature_scorer(features=[keydiff],budget=6,allocation=probe_shares)").for_model(tiny("llama"))
    again = manager.for_model(tiny("llama", seed=3))
    assert [id(p) for p in again.parameters()] == [id(p) for p in manager.parameters()]
    assert list(again.parameters())


def test_views_without_a_model_need_probes_of_their_shape():
    model = tiny("llama", seed=1)
    with build("full").attach(model) as cache, torch.no_grad():
        model(input_ids=torch.arange(40, 60)[None], past_key_values=cache)
    views = [layer.view() for layer in cache.layers]
    with pytest.raises(ConfigError, match=r"nothing is known yet about what the model's heads do; .*for_model"):
        build(SPEC).decide_all(views)
    with pytest.raises(ConfigError, match=r"3 layers of 4 KV heads, and these views are of one that has 3 layers of 2"):
        build(SPEC).for_model(tiny("gpt2")).decide_all(views)
    kept = [decision.keep.sum() for decision in build(SPEC).for_model(model).decide_all(views)]
    assert sum(kept) == 36


def test_plugins_and_saved_caches_have_the_probes(tmp_path, monkeypatch):
    one, other = tiny("llama", seed=1), tiny("llama", seed=2)
    manager = build(SPEC)
    save(manager, tmp_path / "unmeasured")
    assert load(tmp_path / "unmeasured").allocation.model_fingerprint is None
    keep_probes(manager, one)
    save(manager, tmp_path / "plugin")
    loaded = load(tmp_path / "plugin")
    assert loaded.allocation.model_fingerprint == fingerprint(one)
    assert torch.equal(loaded.allocation.probes, head_probes(one).values)
    assert torch.equal(loaded.with_options(budget=9).allocation.probes, loaded.allocation.probes)
    uniform = loaded.with_options(allocation="uniform")
    assert uniform.with_options(allocation="probe_shares").allocation.model_fingerprint is None
    wanted = kept_slots(manager, one)
    with loaded.attach(one) as cache, torch.no_grad():
        one(input_ids=torch.arange(40, 60)[None], past_key_values=cache)
        save_cache(cache, tmp_path / "cache")
        resumed = load_cache(tmp_path / "cache", one)
        assert resumed.policy.allocation.model_fingerprint == fingerprint(one)
    refuse = lambda *_: pytest.fail("measured again")  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr(probes, "measure", refuse)
        probes._remembered.clear()
        assert torch.equal(kept_slots(loaded, one), wanted)
    assert torch.equal(kept_slots(loaded, other), kept_slots(build(SPEC), other))


@pytest.mark.parametrize(("field", "change", "message"), [
    ("probes", lambda t: t[:5], "5 rows for 3 layers of 2 KV heads"),
    ("probes", lambda t: t * 9, "outside of"),
    ("probes", lambda t: t[:, :4], "has shape"),
    ("layer_heads", lambda t: t - 1, "6 rows for 3 layers of 1"),
    ("measured_on", lambda t: t * 0, "names no model"),
    ("measured_on", lambda t: t[:8], "has shape"),
])  # fmt: skip
def test_probes_that_contradict_themselves_are_refused(tmp_path, field, change, message):
    manager = build(SPEC)
    keep_probes(manager, tiny("llama", seed=1))
    save(manager, tmp_path / "plugin")
    file = tmp_path / "plugin" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors[f"allocation.{field}"] = change(tensors[f"allocation.{field}"]).contiguous()
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(PluginError, match=message):
        load(tmp_path / "plugin")


# ---- evaluation and search -------------------------------------------------------------------------------------------


def evaluator_of(model, digest, kind="compress_once"):
    return Evaluator(LoadedModel("tiny", model, tiny_tokenizer(), digest), EvaluationProtocol(kind=kind, every=16))


@pytest.mark.parametrize("kind", ["compress_once", "streaming"])
def test_evaluations_measure_the_model_that_they_are_on(kind):
    one, other = tiny("llama", seed=1), tiny("llama", seed=2)
    known = build(SPEC)
    keep_probes(known, one)
    crowd = [build(SPEC), known, build("feature_scorer(features=[keydiff],budget=6,allocation=probe_shares(power=1))")]
    sample, values = make_sample(), []
    for model in (one, other):
        evaluator = evaluator_of(model, f"{model is one}", kind)
        together = evaluator.evaluate(crowd, sample, TASK)
        assert together[0].loglik == together[1].loglik
        for manager, found in zip(crowd, together, strict=True):
            plain = evaluator.evaluate_plainly(manager, sample, TASK)
            assert found.loglik == pytest.approx(plain.loglik, abs=1e-5)
            assert found.slots == plain.slots == (6 if kind == "compress_once" else 18)  # 12 tokens came since
            assert found.bytes_mean == pytest.approx(plain.bytes_mean)
        values.append(together[0].loglik)
    assert values[0] != values[1]
    assert known.allocation.model_fingerprint == fingerprint(one)


def test_a_search_keeps_the_probes_of_its_model():
    model = tiny("llama", seed=1)
    space = {"manager": {"name": "feature_scorer", "options": {"features": ["keydiff"], "allocation": "probe_shares"}}}
    config = SpaceConfig.model_validate(space)
    searched = SearchSpace(config)
    calibrate_manager(searched.template, [(evaluator_of(model, "a"), [])])
    resumed = SearchSpace(config, searched.template.state_dict())
    candidate = resumed.decode(resumed.start)
    assert torch.equal(candidate.allocation.probes, head_probes(model).values)
    assert candidate.for_model(model) is candidate
