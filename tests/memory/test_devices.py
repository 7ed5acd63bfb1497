"""Devices: what runs on accelerators gives the processor's numbers, on one, and on two that share the layers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import dispatch_model

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
from evomem.managers import build
from evomem.models import LoadedModel
from evomem.runs import Bench, search
from evomem.runs.bench import calibrate_manager
from evomem.testing.models import tiny, tiny_tokenizer
from evomem.testing.pretend import PretendDevices, PretendTensor
from evomem.workers.context_exchange import to_arrays, to_reading
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
