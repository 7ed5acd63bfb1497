"""Devices: what runs on accelerators gives the processor's numbers, on one, and on two that share the layers."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from torch import nn

from evomem.errors import ConfigError, ModelError, UnsupportedModelError
from evomem.evaluation import Evaluator
from evomem.evaluation.compare import NamedManager, Scenario, compare
from evomem.evaluation.costs import ranking_costs
from evomem.evaluation.measurement import EXACT, LOGLIK, Measurement, Quantity
from evomem.evaluation.measures import Draws
from evomem.evaluation.objectives import Attention, TraceCost
from evomem.evaluation.oracle import evaluate_oracle
from evomem.evaluation.store import PrefillStore
from evomem.evaluation.traces.recording import record
from evomem.evaluation.traces.store import Traces
from evomem.managers import MemoryManager, build
from evomem.managers.selection import Ends
from evomem.models import LoadedModel, load
from evomem.models.sharing import assemble, dismantle, why_not_shareable
from evomem.runs import Bench, search
from evomem.runs.bench import calibrate_manager, model_bench
from evomem.testing.conformance import CHECKS, run_check
from evomem.testing.models import tiny, tiny_tokenizer
from evomem.testing.pretend import PretendDevices, PretendTensor
from evomem.workers.context_exchange import to_arrays, to_reading
from tests.cli.test_cli import error, run
from tests.evaluation.test_evaluation import (
    BUDGET,
    FEATURES,
    PROTOCOLS,
    SPECS,
    TASK,
    Admitting,
    Fading,
    made,
    make_sample,
    randomised,
    text,
)
from tests.runs.test_block_search import SETTINGS, SPACE, STAGES, Words
from tests.support.synthetic_search import experiment

SPLIT = {
    "model.embed_tokens": "pretend:0", "model.rotary_emb": "pretend:0", "model.layers.0": "pretend:0",
    "model.layers.1": "pretend:1", "model.norm": "pretend:1", "lm_head": "pretend:1",
}  # fmt: skip
PLACES = {"one": {"": "pretend:0"}, "two": SPLIT}
every_place = pytest.mark.parametrize("place", PLACES)
every_protocol = pytest.mark.parametrize("protocol", ["once", "streaming"])


@pytest.fixture
def devices():
    with PretendDevices(2) as found:
        yield found


def loaded(place=None):
    model = tiny("llama", layers=2)
    if place == "one":
        model.to("pretend:0")
    elif place == "two":
        model = dispatch_model(model, SPLIT)
    return LoadedModel("llama", model, tiny_tokenizer(), "llama")


def plain(evaluations):
    """Everything but the time, as text: NaN equals NaN."""
    return [repr(replace(one, seconds=0.0)) for one in evaluations]


# ---- the pretend devices themselves ---------------------------------------------------------------------------------


MIXES = {
    "two devices": lambda a, b: a + b.to("pretend:1"),
    "device and processor": lambda a, b: a * b,
    "stacked": lambda a, b: torch.stack((a, b)),
    "indices on the device, numbers on the processor": lambda a, b: b[a.long()],
    "gathered": lambda a, b: a.gather(0, b.long()),
    "a number of another device": lambda a, b: a + b.sum().to("pretend:1"),
    "written by index": lambda a, b: a.index_put_((torch.tensor([0, 1, 2]),), b),
    "a generator of the processor": lambda a, b: torch.rand(3, device=a.device, generator=torch.Generator()),
    "a weight of the processor": lambda a, b: torch.nn.functional.linear(a, torch.ones(2, 3)),
    "a stranger": lambda a, b: a.to("pretend:5"),
}  # fmt: skip


@pytest.mark.parametrize("mix", MIXES)
def test_mixes_of_devices_are_refused_as_cuda_refuses_them(mix, devices):
    a = torch.arange(3.0, device="pretend:0")
    with pytest.raises(RuntimeError, match="device"):
        MIXES[mix](a, torch.arange(3.0))


def test_what_cuda_allows_is_allowed_and_logged(devices):
    a = torch.arange(3.0, device="pretend:0")
    assert (a + torch.tensor(2.0)).tolist() == [2, 3, 4]
    assert a[torch.tensor([2, 0])].tolist() == [2, 0]
    assert torch.where(a > 1, a, torch.tensor(7.0)).tolist() == [7, 7, 2]
    with pytest.raises(TypeError, match=r"Use Tensor\.cpu"):
        np.asarray(a)
    devices.log.clear()
    assert bool(a.sum() == 3)
    b = a.cpu().to("pretend:1")
    assert devices.log.copies == [("pretend:0", "cpu", 12), ("cpu", "pretend:1", 12)]
    assert devices.log.syncs == ["_local_scalar_dense"]
    assert devices.log.launches["pretend:0", "sum"] == 1
    assert (b.device, type(b)) == (torch.device("pretend:1"), PretendTensor)


def test_memory_is_counted_and_runs_out():
    with PretendDevices(2, capacity=1000) as devices:
        a = torch.zeros(100, device="pretend:0")
        b = a[:50]
        del a
        assert devices.allocated(0) == 400  # a part keeps the whole
        with pytest.raises(torch.OutOfMemoryError, match="pretend:0"):
            torch.zeros(200, device="pretend:0")
        torch.zeros(200, device="pretend:1")
        del b
        assert (devices.allocated(0), devices.peak(0), devices.allocated(1), devices.peak(1)) == (0, 400, 0, 800)


def test_gradients_go_back_to_where_the_parameters_are(devices):
    weight = torch.randn(3, requires_grad=True)
    (weight.to("pretend:1") * torch.arange(3.0, device="pretend:1")).sum().backward()
    assert weight.grad.device.type == "cpu"
    assert weight.grad.tolist() == [0, 1, 2]


EVERY = {spec.split("(")[0]: spec for spec in reversed(SPECS)}.values()
"""One of every kind of manager."""
CROWD = (
    "keydiff", "namm(scorer=bam, selection=capped)", "feature_scorer(knots=3, hidden=4, allocation=2)",
    "kv_policy(actions=[store, evict, forget], hidden=3, scale=model)", "adakv(keydiff)",
    "snapkv(window=6, allocation=slots(window=8, total=[0.5, 2], per_head=per_head_shares(layers=2, heads=2)))",
)  # fmt: skip


# ---- managers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["two"])
def test_every_manager_attached_generates_what_it_does_on_the_processor(place, devices):
    here, there = loaded(), loaded(place)
    ids = here.tokenizer(make_sample().context, return_tensors="pt").input_ids
    for manager in [made(spec) for spec in EVERY] + [randomised(kind(budget=12), 0) for kind in (Admitting, Fading)]:
        found = []
        manager = manager.with_options(every=None)
        for model, given in ((here.model, ids), (there.model, ids.to("pretend:0"))):
            with manager.attach(model) as cache:
                text = model.generate(given, past_key_values=cache, max_new_tokens=2)
                found.append((text.tolist(), [s.tolist() for s in cache.slots_held()], cache.bytes_by_row().tolist()))
        assert found[0] == found[1], manager


@pytest.mark.parametrize(("place", "protocol"), [("one", "once"), ("two", "streaming")])
def test_a_population_is_evaluated_as_on_the_processor(place, protocol, devices):
    sample = make_sample()
    crowd = [made(spec, seed) for spec in CROWD for seed in range(2)]
    crowd += [randomised(kind(budget=BUDGET), seed) for kind in (Admitting, Fading) for seed in range(2)]
    found = []
    for one in (loaded(), loaded(place)):
        evaluator = Evaluator(one, PROTOCOLS[protocol])
        found.append(plain(evaluator.evaluate(crowd, sample, TASK, EXACT)))
        found.append(plain([evaluator.evaluate_plainly(m, sample, TASK, EXACT) for m in crowd[::5]]))
    assert found[0] == found[2]
    assert found[1] == found[3]


@pytest.mark.parametrize("place", ["two"])
def test_other_measures_are_what_they_are_on_the_processor(place, devices):
    crowd = [made("kv_policy", seed) for seed in range(2)] + [made("feature_scorer(knots=3, allocation=2)")]
    found = []
    for one in (loaded(), loaded(place)):
        evaluator, sample = Evaluator(one), make_sample()
        found.append(
            [
                plain(evaluator.evaluate(crowd, sample, TASK, Attention.measurement)),
                plain(evaluator.evaluate(crowd, sample, TASK, TraceCost.measurement.also(Measurement.of("oracle")))),
                plain([evaluate_oracle(evaluator, sample, TASK, 9, EXACT)]),
                plain(ranking_costs(evaluator, crowd, sample, "expected", gradient=True)),
                plain(ranking_costs(evaluator, crowd[:1] * 3, sample, "drawn", seeds=[1, 2, 3], gradient=True)),
                evaluator.loglik_without_context(sample),
            ]
        )
    assert found[0] == found[1]


@pytest.mark.parametrize(("place", "protocol"), [("two", "streaming")])
def test_rollouts_and_their_gradients_are_what_they_are_on_the_processor(place, protocol, devices):
    options = {"features": FEATURES, "budget": 12, "hidden": 2, "actions": ("evict", "store", "forget")}
    new, old, reference = (randomised(build("kv_policy", **options, allocation=2), seed) for seed in range(3))
    found = []
    for one in (loaded(), loaded(place)):
        evaluator = Evaluator(one, PROTOCOLS[protocol])
        for behaviour in (None, old):
            wanted = EXACT.also(Measurement.of(Quantity.of("rollout", listens=True)))
            drawn = evaluator.evaluate([new, new], make_sample(), TASK, wanted, Draws([3, 4], behaviour, reference))
            found.append(plain(drawn))
    assert found[:2] == found[2:]


# ---- contexts that were read ----------------------------------------------------------------------------------------


@every_place
def test_spilled_and_exchanged_contexts_come_back_to_their_devices(place, devices, tmp_path):
    observes = frozenset({"attention_sum", "query_statistics"})
    store = PrefillStore(limit=1, folder=tmp_path)
    evaluator = Evaluator(loaded(place), store=store)
    tokens = [evaluator.tokens(make_sample(seed)).read for seed in range(2)]
    first = evaluator.reading(tokens[0], observes)
    evaluator.reading(tokens[1], observes)
    again = evaluator.reading(tokens[0], observes)
    assert store.spills
    for other in (again, to_reading(to_arrays(first))):
        for one, two in zip(first.views, other.views, strict=True):
            for name in ("keys", "values", "slots", "start"):
                assert getattr(two, name).device == one.keys.device
                assert torch.equal(getattr(one, name), getattr(two, name))
            assert {n: (t.device, t.dtype) for n, t in two.recorded.items()} == {
                n: (t.device, t.dtype) for n, t in one.recorded.items()
            }
    crowd = [made("h2o"), made("kv_policy")]
    fresh = Evaluator(loaded(place))
    values = [[e.loglik for e in one.evaluate(crowd, make_sample(0), TASK)] for one in (evaluator, fresh)]
    assert values[0] == values[1]


@pytest.mark.parametrize("place", ["two"])
def test_traces_are_those_of_the_processor(place, devices, tmp_path):
    for name, one in (("here", loaded()), ("there", loaded(place))):
        record(one, Described(), "words", tmp_path / name, samples=2)
    names = sorted(path.name for path in (tmp_path / "here").glob("*.safetensors"))
    assert names
    for name in names:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()
    evaluator = Evaluator(loaded(place))
    plainly = ranking_costs(evaluator, [policy()], Described().samples("train", 1, 0)[0], "expected", gradient=True)
    evaluator.traces = Traces.open(tmp_path / "there")
    traced = ranking_costs(evaluator, [policy()], Described().samples("train", 1, 0)[0], "expected", gradient=True)
    assert np.allclose(traced[0].values["head_cost"], plainly[0].values["head_cost"], atol=1e-2)


def policy():
    return randomised(build("kv_policy", features=("keydiff", "age", "last:8"), budget=9), 0)


class Described(Words):
    def describe(self):
        return {}


# ---- searches and comparisons ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["two"])
def test_a_comparison_is_that_of_the_processor(place, devices):
    found = []
    for one in (loaded(), loaded(place)):
        subject = NamedManager("mine", made("feature_scorer(knots=3, hidden=4, allocation=2)"))
        places = [Scenario("llama", "words", Evaluator(one), Described())]
        out = compare([subject], places, samples=1, budgets=(8, 0.5), against=["keydiff", "random"], oracle=True)
        found.append({key: plain(rows) for key, rows in out.evaluations.items()})
    assert found[0] == found[1]


@pytest.mark.parametrize("place", ["two"])
def test_statistics_are_measured_as_on_the_processor(place, devices):
    found = []
    for one in (loaded(), loaded(place)):
        managers = [made("namm(scorer=linear, selection=threshold)"), made("kv_policy(scale=model)")]
        for manager in managers:
            calibrate_manager(manager, [(Evaluator(one), [make_sample(0)])])
        found.append([{n: t.tolist() for n, t in m.state_dict().items()} for m in managers])
    assert found[0] == found[1]


@pytest.mark.parametrize("place", ["two"])
def test_a_search_finds_what_it_finds_on_the_processor(place, devices, tmp_path):
    def bench(where):
        def make(config):
            return Bench(Evaluator(loaded(where), config.protocol), lambda task: Words(), provenance={"it": "tiny"})

        return make

    stages = [{**stage, "generations": 1} for stage in STAGES]
    config = experiment(*SETTINGS, space=SPACE, stages=stages)
    results = [search(config, tmp_path / str(where), bench(where)) for where in (None, place)]
    assert np.array_equal(results[0].vector, results[1].vector)
    assert results[0].sealed == results[1].sealed


# ---- tensors that follow ---------------------------------------------------------------------------------------------


def seen_on(manager, device):
    """What a manager sees of the first layer of a context, here and on a device."""
    evaluator = Evaluator(LoadedModel("llama", tiny("llama", layers=2), tiny_tokenizer(), "llama"))
    view = evaluator.reading(evaluator.tokens(make_sample()).read, manager.observes).views[0]
    parts = {name: getattr(view, name).to(device) for name in ("keys", "values", "slots", "start")}
    recorded = {name: tensor.to(device) for name, tensor in view.recorded.items()}
    return view, replace(view, **parts, recorded=recorded, memo={})


class Table(MemoryManager):
    """Has a parameter, a buffer, a plain tensor and a module inside."""

    name = "table"

    def __init__(self, **options):
        super().__init__(**options)
        self.weight, self.plain = nn.Parameter(torch.ones(16)), torch.ones(16)
        self.register_buffer("scale", torch.ones(16))
        self.inner = nn.Linear(16, 1)

    def score(self, view):
        x = view.keys.float() * self.scale
        return (x * self.weight * self.plain).sum(-1) + self.inner(x)[..., 0]


CHANGES = {
    "a parameter": lambda m: m.weight.mul_(-2),
    "its data, which no version counts": lambda m: m.weight.data.mul_(-2),
    "a buffer": lambda m: m.scale.copy_(torch.arange(16.0)),
    "a plain tensor": lambda m: m.plain.mul_(-3),
    "a plain tensor in its place": lambda m: setattr(m, "plain", torch.arange(16.0)),
    "a part of a part": lambda m: m.inner.weight.mul_(-9),
    "another parameter in its place": lambda m: setattr(m, "weight", nn.Parameter(torch.arange(16.0))),
    "the protected ends": lambda m: setattr(m, "ends", Ends(sinks=3)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_are_copied_once_a_device_and_again_when_they_change(change, devices):
    manager = Table(budget=9).requires_grad_(False)
    here, there = seen_on(manager, "pretend:1")
    assert manager.decide(there).keep.tolist() == manager.decide(here).keep.tolist()
    devices.log.clear()
    before = manager.decide(there).keep.tolist()
    assert not devices.log.copies
    with torch.no_grad():
        CHANGES[change](manager)
    after = manager.decide(there).keep.tolist()
    assert after == manager.decide(here).keep.tolist()
    assert after != before
    assert {tensor.device.type for tensor in manager.state_dict().values()} == {"cpu"}


def test_gradients_reach_the_parameters_from_another_device(devices):
    manager = Table(budget=9)
    here, there = seen_on(manager, "pretend:0")
    with torch.inference_mode():  # a copy that is made here must not be in the way of gradients
        manager.decide(there)
    found = []
    for view in (here, there):
        manager.zero_grad()
        manager.score(view).square().sum().backward()
        found.append([p.grad.tolist() for p in manager.parameters()])
        manager.requires_grad_(True)
    assert found[0] == found[1]


def test_parameters_of_a_call_follow_too(devices):
    """As in a search: stacked parameters of the processor under vmap, a view of the device."""
    manager = Table(budget=9).requires_grad_(False)
    here, there = seen_on(manager, "pretend:0")
    stacked = {n: torch.stack([p, -2 * p, p + 1]) for n, p in manager.named_parameters()}
    found = [
        torch.func.vmap(lambda p, view=view: torch.func.functional_call(manager, p, (view,)).keep)(stacked).tolist()
        for view in (here, there)
    ]
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


def test_a_manager_may_lie_on_a_device_itself(devices):
    manager = made("kv_policy(scale=model)")
    here, there = seen_on(manager, "pretend:1")
    wanted = manager.decide(here).keep.tolist()
    manager.to("pretend:0")
    assert manager.with_options(budget=12).decide(there).keep.tolist() == wanted
    assert manager.decide(here).keep.tolist() == wanted


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_generating_text_does_not_hold_what_candidates_kept_twice(devices):
    """What is kept is nearly all that is held here: many candidates, a long context, a short answer."""
    evaluator, peaks = Evaluator(loaded("one")), {}
    sample = make_sample(context=600, question=2, answer=2)
    crowd = [made("keydiff").with_options(budget=500)] * 8
    for exact in (False, True):
        evaluator.evaluate(crowd[:1], sample, TASK, EXACT if exact else LOGLIK)
        devices.reset_peak()
        before = devices.allocated()
        evaluator.evaluate(crowd, sample, TASK, EXACT if exact else LOGLIK)
        peaks[exact] = devices.peak() - before
    assert peaks[True] < 1.3 * peaks[False]


# ---- models on devices ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint in bfloat16."""
    path = tmp_path_factory.mktemp("model")
    tiny("llama", layers=2).to(torch.bfloat16).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_a_model_has_the_checkpoints_type_on_an_accelerator_and_float32_on_the_processor(folder, devices):
    here, there = load(str(folder)), load(str(folder), device="pretend:1")
    assert (here.dtype, here.device_type, here.devices) == ("float32", "cpu", [torch.device("cpu")])
    assert (there.dtype, there.device_type, there.devices) == ("bfloat16", "pretend", [torch.device("pretend:1")])
    assert load(str(folder), device="pretend:0", dtype="float32").dtype == "float32"
    assert load(str(folder), dtype="auto").dtype == "bfloat16"
    assert load(str(folder), dtype=torch.float16).dtype == "float16"
    split = load(str(folder), device_map=SPLIT)
    assert (split.dtype, split.devices) == ("bfloat16", [torch.device("pretend:0"), torch.device("pretend:1")])
    # Straight to where they belong: every weight goes there once, and nothing comes back.
    devices.log.clear()
    load(str(folder), device="pretend:0")
    weights = sum(tensor.nbytes for tensor in there.model.parameters())
    assert sum(size for source, goal, size in devices.log.copies if goal == "pretend:0" and size > 4) < 1.2 * weights


def test_devices_and_types_that_do_not_exist_are_refused(folder, devices):
    for wish, message in (
        ({"device": "pretend:7"}, "no such device"), ({"device": "cuda:0"}, "no such device"),
        ({"device": "gpu"}, "is none"), ({"dtype": "int8"}, "dtype"), ({"dtype": "half-precise"}, "dtype"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            load(str(folder), **wish)


def test_quantisation_is_handed_on_and_what_the_library_says_is_told(folder):
    with pytest.raises(ModelError, match="bitsandbytes"):
        load(str(folder), quantization={"load_in_8bit": True})
    config = experiment("model={name: x, quantization: {load_in_8bit: true}}")
    assert config.model.quantization == {"load_in_8bit": True}
    with pytest.raises(ConfigError, match="either a device or a device_map"):
        experiment("model={name: x, device: cpu, device_map: auto}")


def quantised(one):
    """As a library of 8-bit weights leaves a model: numbers that are no weights in a plain module's place."""
    layer = one.model.model.layers[0].mlp.down_proj
    layer.weight = nn.Parameter((layer.weight * 10).to(torch.int8), requires_grad=False)
    return one


def configured_by_quantiser(one):
    one.model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return one


@pytest.mark.parametrize("change", [quantised, configured_by_quantiser])
def test_a_quantised_model_is_loaded_by_every_worker_itself(change, monkeypatch):
    one = change(loaded())
    assert why_not_shareable(one)
    with pytest.raises(ModelError, match="cannot be shared"):
        dismantle(one)
    monkeypatch.setattr("evomem.runs.bench.load_model", lambda model: change(loaded()))
    config = experiment("model=llama", "tasks=[passkey]")
    shared = model_bench(config).in_workers
    assert shared.parts() == {}
    theirs = shared.make(config, {}, PrefillStore())
    assert theirs.provenance["device"] == "cpu"
    monkeypatch.setattr("evomem.runs.bench.load_model", lambda model: loaded())
    assert model_bench(config).in_workers.parts() != {}


def test_packed_numbers_are_never_taken_for_weights():
    """If a part gets lost on the way: the other process checks what it was given."""
    parts = dismantle(loaded())
    number = parts["names"]["model.layers.0.mlp.down_proj.weight"]
    array, _ = parts["arrays"][number]
    parts["arrays"][number] = array.astype("int8"), "int8"
    with pytest.raises(ModelError, match="int8"):
        assemble(parts)


def test_a_worker_without_the_searchs_kind_of_device_says_so(folder):
    parts = {**dismantle(loaded()), "device": "cuda"}
    with pytest.raises(ModelError, match="gpus-per-worker"):
        assemble(parts)


def test_managers_that_compare_heads_are_refused_where_heads_are_split_over_processes():
    """Every process of tensor parallel has some of the heads, and numbers them from 0."""
    model = tiny("llama", layers=2)
    good, bad = ("full", "streaming_llm", "snapkv(window=8)", "kv_policy", "namm(scorer=bam, selection=capped)",
                 "expected_attention", "pyramidkv(window=8)"), (
        "adakv(keydiff)", "random", "feature_scorer(layers=2, heads=2, knots=1)", "namm(scorer=bam, selection=dense)",
    )  # fmt: skip
    for spec in (*good, *bad):
        with made(spec).attach(model):
            pass
    model._tp_size = 2
    for spec in good:
        with made(spec).attach(model):
            pass
    for spec in bad:
        with pytest.raises(UnsupportedModelError, match="tensor parallel"), made(spec).attach(model):
            pass
    with pytest.raises(UnsupportedModelError, match="tensor parallel"):
        Evaluator(LoadedModel("llama", model, tiny_tokenizer(), "llama"))
    with pytest.raises(ModelError, match="tensor parallel"):
        dismantle(LoadedModel("llama", model, tiny_tokenizer(), "llama"))


def test_commands_run_where_they_are_told_and_record_it(folder, devices, tmp_path):
    rows = [
        {"context": text(7 * n, 40), "question": text(7 * n + 1, 3), "answers": [text(7 * n + 2, 2)], "split": split}
        for n, split in enumerate(("train", "train", "select", "select", "sealed", "sealed"))
    ]
    (tmp_path / "task.jsonl").write_text("\n".join(json.dumps({**row, "id": str(n)}) for n, row in enumerate(rows)))
    task = ["--task", f"file:{tmp_path}/task.jsonl", "--samples", "2"]
    there = ["--model", folder, "--device", "pretend:1"]
    run("compare", "h2o", *task, *there, "--no-check", "--budgets", "9", "--against", "keydiff",
        "--json", tmp_path / "rows.json")  # fmt: skip
    told = json.loads((tmp_path / "rows.json").read_text())
    assert {(row["device"], row["dtype"]) for row in told} == {("pretend:1 (Pretend)", "bfloat16")}
    run("transfer", "h2o", *task, *there, "--no-check", "--budgets", "9", "--against", "keydiff")
    run("trace", "-m", folder, *task[:2], "-n", "2", "--device", "pretend:0", "--out", tmp_path / "traces")
    space = {"manager": {"name": "feature_scorer", "options": {"budget": 9, "features": ["keydiff", "age"]}}}
    data = {
        "name": "small", "model": str(folder), "space": space, "tasks": [f"file:{tmp_path}/task.jsonl"],
        "driver": {"name": "random_search", "population": 2}, "generations": 1, "samples_per_generation": 1,
        "train_contexts": 2, "select": {"contexts": 2, "top": 0}, "sealed": {"contexts": 2}, "chance_contexts": 0,
        "against": ["keydiff"],
    }  # fmt: skip
    (tmp_path / "small.yaml").write_text(json.dumps(data))
    run("evolve", tmp_path / "small.yaml", "--device", "pretend:0", "--out", tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    start = next(r for r in records if r.get("event") == "start")
    assert start["devices"] == {str(folder): "pretend:0 (Pretend)"}
    assert start["store_bytes"] > 0
    provenance = json.loads((tmp_path / "run" / "winner" / "plugin" / "provenance.json").read_text())
    assert (provenance["device"], provenance["dtype"]) == ("pretend", "bfloat16")
    assert {row["device"] for row in provenance["comparison"]} == {"pretend:0 (Pretend)"}
    message = error("evolve", tmp_path / "small.yaml", "--out", tmp_path / "run", "--resume")  # on the processor
    assert "model.device: pretend:0 -> null" in message or "model.dtype" in message
    assert "no such device" in error("compare", "h2o", *task, "--model", folder, "--device", "cuda:3", "--budgets", "9")


def test_the_conformance_kit_runs_where_the_model_is(devices):
    model, manager = loaded("two").model, made("kv_policy(actions=[store, evict, forget], hidden=3)")
    assert {"evicted_is_hidden", "beams", "ties"} < set(CHECKS)
    for name in ("evicted_is_hidden", "beams", "ties"):
        run_check(name, manager, model)
