"""Searches by policy gradient, end to end: killed and resumed, with workers, on several models, refused."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from evomem.errors import ConfigError
from evomem.evaluation import Evaluator
from evomem.evaluation.costs import ranking_costs
from evomem.evaluation.measurement import Step
from evomem.models import load
from evomem.runs import model_bench, open_run, search
from evomem.runs.samples import Samples
from evomem.search_space.space import SearchSpace
from evomem.tracking.base import Tracker
from evomem.workers import WorkerOptions
from tests.runs.test_block_search import lines, without_tokens
from tests.support.interrupted_search import outcome, same
from tests.support.policy_search import FEATURES, STAGES, configured, run
from tests.support.processes import forkserver


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The search that nothing happened to, and what its tracker was told."""
    told = []

    class Told(Tracker):
        def log(self, record):
            told.append(record)

    folder = tmp_path_factory.mktemp("policy") / "whole"
    search(configured(), folder, model_bench, tracker=Told())
    return folder, told


def test_stages_measure_what_they_say_and_the_journal_has_the_diagnostics(whole):
    folder, told = whole
    found = open_run(folder)
    generations = found.generations()
    assert [g.stage for g in generations] == ["exact"] * 3 + ["rollouts"] * 3
    assert [len(g.fitness) for g in generations] == [1] * 3 + [4] * 3
    assert [g.diagnostics for g in told] == [g.diagnostics for g in generations]
    for place, generation in enumerate(generations):
        assert generation.diagnostics["gradient_norm"] > 0
        assert ("entropy" in generation.diagnostics) == (place >= 3)
        assert ("rank_correlation" in generation.diagnostics) == (place % 2 == 1)
        assert math.isnan(generation.sigma)
    assert generations[4].diagnostics["kl"] != 0 == pytest.approx(generations[3].diagnostics["kl"], abs=1e-6)
    # The first generation is the start, whose exact cost can be had directly.
    config, evaluator = configured(), Evaluator(load("zoo-gpt-neox"))
    space, stage = SearchSpace(config.space, found.space.template.state_dict()), config.plan()[0]
    samples = Samples(config, model_bench(config))
    manager = space.decode(np.load(folder / "start" / "vector.npy"))
    costs = [
        -np.mean(ranking_costs(evaluator, [manager], sample, "expected")[0].values["head_cost"])
        for sample in samples.minibatch(stage, stage.tasks[0], 0)
    ]
    assert generations[0].fitness == pytest.approx([np.mean(costs)], abs=1e-5)
    # Two passes over the same rollouts: the same fitness, whatever the policy has become.
    assert generations[4].fitness == generations[3].fitness != generations[5].fitness


def test_killed_between_and_inside_generations_it_ends_the_same(whole, tmp_path):
    processes = forkserver()
    folder, total = tmp_path / "run", lines(whole[0])
    for at in (total // 5, total // 2, total // 2 + 3):
        process = processes.Process(target=run, args=(folder, 0.05))
        process.start()
        deadline = time.monotonic() + 120
        while process.is_alive() and lines(folder) < at and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -9
        assert lines(folder) >= at
    search(configured(), folder, model_bench, resume=True)
    same(without_tokens(outcome(folder)), without_tokens(outcome(whole[0])))


def test_workers_make_no_difference(whole, tmp_path, ray_here):
    search(configured(), tmp_path / "two", model_bench, workers=WorkerOptions(2, cpus=0.5))
    same(without_tokens(outcome(tmp_path / "two")), without_tokens(outcome(whole[0])))


def test_streaming_credits_what_is_read(tmp_path):
    config = configured(
        "protocol={kind: streaming, every: 24}",
        stages=[{"generations": 2, "fitness": {"objective": "loglik", "reading": 0.5}}],
        diagnostics={"every": 0},
        driver={"name": "policy_gradient", "population": 3, "options": {"entropy": 0.01}},
    )
    search(config, tmp_path / "run", model_bench)
    units = [r for r in open_run(tmp_path / "run").records() if r["kind"] == "unit" and r["phase"] == "train"]
    steps = [step for unit in units for e in unit["evaluations"] for step in e["steps"]]
    assert any(step["reward"] < 0 for step in steps)
    first = open_run(tmp_path / "run").generations()[0]
    worth = []
    for place in range(3):
        own = [unit["evaluations"][place] for unit in units if unit["generation"] == 0]
        worth.append(np.mean([e["loglik"] + 0.5 * np.mean([s["reward"] for s in e["steps"]]) for e in own]))
    assert first.fitness == pytest.approx(worth, abs=1e-9)


def test_the_journal_holds_gradients_of_what_rollouts_move(tmp_path):
    """Weights of single heads stay where exact gradients brought them, and their numbers are neither sent nor kept."""
    options = {"features": FEATURES, "hidden": 0, "budget": 12, "layers": 4, "heads": 2}
    config = configured(space={"manager": {"name": "kv_policy", "options": options}}, diagnostics={"every": 0})
    search(config, tmp_path / "run", model_bench)
    run = open_run(tmp_path / "run")
    own = 4 * 2 * len(FEATURES)
    sizes = {"exact": set(), "rollouts": set()}
    for record in run.records():
        if record["kind"] == "unit" and record["phase"] == "train":
            steps = [step for one in record["evaluations"] for step in one["steps"]]
            stage = "exact" if record["generation"] < 3 else "rollouts"
            sizes[stage] |= {len(packed) for step in steps for packed in (step["gradient"], step["lower"]) if packed}
    size = {name: {len(Step(b"\0" * 4 * count).to_json()["gradient"])} for name, count in
            (("exact", run.space.dim), ("rollouts", run.space.dim - own))}  # fmt: skip
    assert sizes == size


MANAGERS = {
    "feature_scorer": {"features": FEATURES, "budget": 12},
    "namm": {"scorer": "bam", "selection": "capped", "budget": 12, "every": None},
}


@pytest.mark.parametrize("name", MANAGERS)
def test_managers_that_draw_nothing_learn_from_exact_gradients_only(name, tmp_path):
    space = {"manager": {"name": name, "options": MANAGERS[name]}}
    with pytest.raises(ConfigError, match=r"draws no decisions.*expected_cost"):
        search(configured(space=space), tmp_path / "refused", model_bench)
    config = configured(space=space, stages=[{**STAGES[0], "generations": 2}], diagnostics={"every": 0})
    search(config, tmp_path / "run", model_bench)
    run = open_run(tmp_path / "run")
    start = np.load(run.folder / "start" / "vector.npy")
    assert run.generations()[0].diagnostics["gradient_norm"] > 0
    assert not np.array_equal(run.space.encode(run.winner), start) or run.result.winner == "start"


@pytest.mark.parametrize("allocation", ["across_heads", "threshold", "per_head_shares(layers=4, heads=2)"])
def test_what_cannot_be_drawn_is_said_before_anything_runs(allocation, tmp_path, monkeypatch):
    """Also where only a later stage draws, and where the features are to be calibrated first."""

    def never(*_, **__):
        raise AssertionError("something ran")

    monkeypatch.setattr(Evaluator, "evaluate", never)
    monkeypatch.setattr(Evaluator, "reading", never)
    options = {"features": FEATURES, "budget": 12, "allocation": allocation, "scale": "model"}
    config = configured(space={"manager": {"name": "kv_policy", "options": options}})
    with pytest.raises(ConfigError, match=r"stage 'rollouts'.*'loglik' draws decisions.*search by evolution"):
        search(config, tmp_path / "run", model_bench)


def test_several_models_share_one_policy(tmp_path):
    models = ["zoo-gpt-neox", "zoo-qwen3"]
    config = configured(model="zoo-gpt-neox", models=models, stages=[{**STAGES[0], "generations": 2}])
    search(config, tmp_path / "run", model_bench)
    found = open_run(tmp_path / "run")
    first = found.generations()[0]
    manager = found.space.decode(np.load(found.folder / "start" / "vector.npy"))
    samples, stage, costs = Samples(config, model_bench(config)), config.plan()[0], []
    for task in stage.tasks:
        evaluator = Evaluator(load(task.model))
        for sample in samples.minibatch(stage, task, 0):
            costs.append(-np.mean(ranking_costs(evaluator, [manager], sample, "expected")[0].values["head_cost"]))
    assert first.fitness == pytest.approx([np.mean(costs)], abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"manager": {"name": "kv_policy", "options": {"features": FEATURES}},
                    "options": {"recent": {"kind": "integer", "low": 0, "high": 4}}}}, "recent vary"),
        ({"stages": [{"generations": 1, "fitness": {"objective": "attention"}}]}, "for evolution"),
        ({"stages": [{"generations": 1, "fitness": {"objective": "expected_cost", "normalise": "full"}}]}, "normalise"),
        ({"stages": [{"generations": 1, "fitness": {"objective": "loglik", "reading": 1.0}}]}, "reading"),
        ({"driver": {"name": "policy_gradient", "options": {"passes": 2}}}, "grpo"),
    ],
)  # fmt: skip
def test_what_has_no_gradient_is_refused(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        search(configured(**changes), tmp_path / "run", model_bench)
