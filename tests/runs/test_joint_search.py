"""Scorer and allocation searched together, in one vector or in turns; and on several budgets at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evomem.errors import ConfigError
from evomem.evaluation import Evaluator
from evomem.evaluation.measurement import EvaluationProtocol
from evomem.evaluation.reference import evaluate_plainly
from evomem.models import LoadedModel
from evomem.runs import Bench, open_run, search
from evomem.runs.driver_setup import make_driver
from evomem.runs.journal import read_journal
from evomem.search_space.space import SearchSpace
from evomem.testing.models import tiny, tiny_tokenizer
from tests.evaluation.test_evaluation import TASK
from tests.runs.test_block_search import NAMES, SETTINGS, Words
from tests.support.interrupted_search import Interrupted, Stop, outcome, same
from tests.support.synthetic_search import DIM, ToyEvaluator, experiment, factory

SHARES = {"name": "per_head_shares", "options": {"layers": 2, "heads": 2}}
SNES = {"name": "snes", "population": 5}
TURNS = [
    {"generations": 2, "searches": ["first"], "driver": "cmaes"},
    {"generations": 2, "searches": ["sec*"], "driver": SNES, "budgets": [32]},
    {"generations": 1},
    {"generations": 2, "driver": SNES},
]


def in_turns(**changes):
    return experiment("select={contexts: 2, top: 1}", "sealed.contexts=2", driver=None, stages=TURNS, **changes)


# ---- a stage searches a part of the vector ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint") / "run"
    search(in_turns(), folder, factory(ToyEvaluator()))
    return folder


def test_a_stage_searches_what_it_names_and_leaves_the_rest(undisturbed):
    start, second, last = (
        np.load(undisturbed / "start" / name) for name in ("vector.npy", "driver-2.npy", "driver-5.npy")
    )
    assert len(start) == DIM
    assert np.array_equal(second[4:], start[4:])
    assert not np.isin(second[:4], start[:4]).any()
    assert np.array_equal(last[:4], second[:4])
    assert not np.isin(last[4:], second[4:]).any()
    assert [len(g.fitness) for g in open_run(undisturbed).generations()] == [8, 8, 5, 5, 5, 5, 5]
    plan = in_turns().plan()
    assert [stage.searches for stage in plan] == [("first",), ("sec*",), ("sec*",), None]
    assert [stage.since for stage in plan] == [0, 2, 2, 5]


def test_turns_are_gone_on_with_to_the_bit(tmp_path, undisturbed):
    for _ in range(300):
        try:
            search(in_turns(), tmp_path / "run", factory(Interrupted(17)), resume=True)
            break
        except Stop:
            continue
    same(outcome(tmp_path / "run"), outcome(undisturbed))


def test_options_and_heads_are_counted_among_what_is_searched(tmp_path):
    """A driver for mixed spaces hears of the options that it searches, one for heads of the heads' weights."""
    options = {"rate": {"kind": "bounded", "low": 0, "high": 1}, "sinks": {"kind": "integer", "low": 0, "high": 3}}
    space = {"manager": {"name": "toy"}, "options": options}
    stages = [{"generations": 1, "searches": ["second", "sinks"], "driver": "catcma"}]
    config = experiment(driver=None, space=space, stages=stages)
    made = SearchSpace(config.space)
    assert made.coordinates(["second", "sinks"]).tolist() == [4, 5, 7]
    assert made.coordinates(["*"]).tolist() == list(range(8))
    driver = make_driver(config, made, made.start, tmp_path)
    sinks = {made.decode(vector).options.sinks for vector in driver.ask().vectors}
    assert len(sinks) > 1
    assert {round(made.decode(vector).options.rate, 12) for vector in driver.ask().vectors} == {0.5}

    space = {"manager": {"name": "feature_scorer", "options": {
        "features": NAMES, "layers": 2, "heads": 2, "allocation": SHARES, "budget": 10}}}  # fmt: skip
    config = experiment(
        driver=None,
        space=space,
        stages=[{"generations": 1, "searches": ["own", "allocation.*"], "driver": "block_cmaes"}],
    )
    made = SearchSpace(config.space)
    driver = make_driver(config, made, made.start, tmp_path)
    blocks = [driver.coordinates[block].tolist() for block in driver.inner._blocks]
    assert blocks == [block.tolist() for block in made.blocks()]
    assert len(driver.coordinates) == 4 * len(NAMES) + 4


@pytest.mark.parametrize(("stage", "message"), [
    ({"searches": ["third"]}, "stage 1': searches: .*nothing that varies matches 'third'.*first, second"),
    ({"searches": ["first"], "driver": {"name": "cmaes", "options": {"warm_start": "x"}}}, "searches a part"),
    ({"searches": ["second"], "driver": "policy_gradient"}, "draws no decisions"),
])  # fmt: skip
def test_what_cannot_be_searched_is_refused_first(tmp_path, stage, message):
    with pytest.raises(ConfigError, match=message):
        search(
            experiment(driver=None, stages=[{"driver": "cmaes", "generations": 1, **stage}]),
            tmp_path / "run",
            factory(ToyEvaluator()),
        )


# ---- on a model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded():
    return LoadedModel("tiny", tiny("llama", layers=2), tiny_tokenizer(), "tiny")


def model_bench(loaded, evaluators=None):
    def make(config):
        evaluator = Evaluator(loaded, config.protocol)
        if evaluators is not None:
            evaluators.append(evaluator)
        return Bench(evaluator, lambda task: Words(), provenance={"model_digest": "tiny"})

    return make


SCORER = {"name": "feature_scorer", "options": {
    "features": NAMES, "allocation": SHARES, "sinks": 1, "recent": 2, "budget": 10}}  # fmt: skip
POLICY = {"name": "kv_policy", "options": {"features": NAMES, "hidden": 2, "allocation": SHARES, "budget": 10}}
SLOTS = "slots(window=4, per_head=per_head_shares(layers=2, heads=2))"
SPACES = {
    "keydiff": {"manager": {"name": "keydiff", "options": {"budget": 10, "allocation": SHARES}}},
    "feature_scorer": {"manager": SCORER},
    "kv_policy": {"manager": POLICY},
    "slots": {"manager": {**SCORER, "options": {**SCORER["options"], "allocation": SLOTS}}},
}


@pytest.mark.parametrize("name", SPACES)
def test_shares_of_heads_are_searched_with_any_scorer(tmp_path, loaded, name):
    """In one vector; what is deployed at the end holds what was measured."""
    settings = ("driver={name: cmaes, population: 5, options: {diagonal: true}}", "generations=2", "budgets=[8, 12]")
    config = experiment(*SETTINGS, *settings, space=SPACES[name])
    expected = 4 + (14 if name == "slots" else 0)
    assert SearchSpace(config.space).coordinates(["allocation.*"]).size == expected
    result = search(config, tmp_path / "run", model_bench(loaded))
    manager = open_run(tmp_path / "run").winner
    assert manager.whole_model
    evaluator, words = Evaluator(loaded), Words()
    counts = [
        evaluate_plainly(evaluator, manager.with_options(budget=budget), sample, words).slots
        for sample in words.samples("sealed", 2, 0)
        for budget in (8, 12)
    ]
    assert result.sealed.slots == pytest.approx(np.mean(counts)) == pytest.approx(10)


def test_the_ranking_by_exact_gradients_then_budgets_by_evolution(tmp_path, loaded):
    stages = [
        {"generations": 3, "searches": ["weights"], "driver": "policy_gradient",
         "fitness": {"objective": "expected_cost"}},
        {"generations": 2, "searches": ["allocation.*"], "budgets": [8, 12],
         "driver": {"name": "cmaes", "sigma": 0.4, "population": 4, "options": {"diagonal": True}}},
    ]  # fmt: skip
    same_samples = ("driver=null", "samples_per_generation=2", "train_contexts=2")
    config = experiment(*SETTINGS, *same_samples, space=SPACES["feature_scorer"], stages=stages)
    search(config, tmp_path / "run", model_bench(loaded))
    start, middle = (np.load(tmp_path / "run" / "start" / name) for name in ("vector.npy", "driver-3.npy"))
    space = SearchSpace(config.space)
    weights, shares = space.coordinates(["weights"]), space.coordinates(["allocation.*"])
    assert np.array_equal(middle[shares], start[shares])
    assert np.all(middle[weights] != start[weights])
    found = [record for record in read_journal(tmp_path / "run" / "journal.jsonl") if record["kind"] == "generation"]
    costs = [record["best"] for record in found[:3]]
    assert costs[2] > costs[0]


def test_a_front_of_score_and_bytes_with_shares_of_heads(tmp_path, loaded):
    space = {**SPACES["keydiff"], "options": {"budget": {"kind": "log_integer", "low": 4, "high": 24, "start": 12}}}
    config = experiment(
        *SETTINGS, "driver={name: nsga2, population: 8}", "generations=3", "budgets=null", space=space
    )  # fmt: skip
    result = search(config, tmp_path / "run", model_bench(loaded))
    assert result.front >= 1
    held = {round(score.bytes_mean) for score in result.finalists.values()}
    assert len(held) > 1


# ---- several budgets at once -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["compress_once", "streaming"])
def test_fitness_is_the_mean_over_budgets_and_every_budget_is_measured(tmp_path, loaded, kind):
    """Against one candidate, one budget, one sample at a time from an empty cache."""
    evaluators = []
    settings = ("driver={name: random_search, population: 3}", "generations=1", "budgets=[6, 0.5, 12]")
    protocol = {"kind": kind, "every": 16} if kind == "streaming" else {"kind": kind}
    config = experiment(*SETTINGS, *settings, space=SPACES["feature_scorer"], protocol=protocol)
    search(config, tmp_path / "run", model_bench(loaded, evaluators))
    run = open_run(tmp_path / "run")
    (generation,) = run.generations()
    units = [u for u in run.records() if u["kind"] == "unit" and u["phase"] == "train"]
    assert len(units) == 2 * 3  # samples x budgets
    space = SearchSpace(config.space)
    vectors = make_driver(config, space, np.load(run.folder / "start" / "vector.npy"), run.folder).ask().vectors
    evaluator, words = Evaluator(loaded, EvaluationProtocol(**protocol)), Words()
    samples = [s for s in words.samples("train", 5, 0) if any(f"/{s.id}/" in unit["key"] for unit in units)]
    assert len(samples) == 2
    table = np.array([
        [[evaluate_plainly(evaluator, manager.with_options(budget=b), sample, TASK).loglik for b in (6, 0.5, 12)]
         for sample in samples]
        for manager in map(space.decode, vectors)
    ])  # fmt: skip
    assert generation.fitness == pytest.approx(table.mean((1, 2)), abs=1e-5)
    at = [generation.diagnostics[f"mean_at_{budget}"] for budget in (6, 0.5, 12)]
    assert at == pytest.approx(table.mean((0, 1)), abs=1e-5)


def test_a_context_is_read_once_for_all_budgets(tmp_path, loaded):
    evaluators = []
    settings = ("driver={name: random_search, population: 3}", "generations=2", "budgets=[6, 9, 12]")
    config = experiment(*SETTINGS, *settings, "samples_per_generation=5", space=SPACES["feature_scorer"])
    search(config, tmp_path / "run", model_bench(loaded, evaluators))
    (evaluator,) = evaluators
    assert evaluator.store.misses == 5 + 2  # train; select and sealed, which are the same here


# ---- EvolKV ----------------------------------------------------------------------------------------------------------


def test_evolkv_searches_layers_and_is_completed_afterwards(tmp_path, loaded):
    """Its fitness is of what was measured; the winner's numbers, completed, hold the budget exactly."""
    manager = {"name": "keydiff", "options": {"budget": 10, "allocation": "layer_budgets(layers=2, complete=false)"}}
    settings = ("driver={name: evolkv, population: 4}", "generations=3", "budgets=null")
    config = experiment(
        *SETTINGS, *settings, space={"manager": manager}, fitness={"objective": "evolkv_loglik"}, train_contexts=2
    )
    search(config, tmp_path / "run", model_bench(loaded))
    run = open_run(tmp_path / "run")
    for generation in run.generations():
        units = [u for u in run.records() if u["kind"] == "unit" and u["generation"] == generation.generation]
        values = []
        for evaluation in (e for unit in units for e in unit["evaluations"]):
            assert evaluation["target_slots"] == 10
            k, bonus = evaluation["slots"], 0.3
            score = max(0, 1 - (k - 10) / 10) if k > 10 else 1 - 0.2 * (1 - k / 10)
            values.append(np.exp(evaluation["loglik"]) * (1 + bonus * score))
        assert np.mean(generation.fitness) == pytest.approx(np.mean(values))
    winner = run.winner
    complete = winner.with_options(allocation="layer_budgets(layers=2)")
    assert torch.equal(complete.allocation.factors, winner.allocation.factors)
    evaluator, words = Evaluator(loaded), Words()
    for sample in words.samples("sealed", 2, 0):
        assert evaluate_plainly(evaluator, complete, sample, words).slots == pytest.approx(10)
