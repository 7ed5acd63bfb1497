"""One search on memories of different kinds, each under its protocol, with values that mean the same on each."""

from __future__ import annotations

import json

import numpy as np
import pytest

from evomem.drivers import build as build_driver
from evomem.errors import ConfigError
from evomem.evaluation.measurement import EvaluationProtocol
from evomem.evaluation.streams import evaluator_of
from evomem.managers import build
from evomem.models import load
from evomem.report.subjects import resolve
from evomem.runs import model_bench, open_run, parse_experiment, search
from evomem.runs.fitness import range_scale
from evomem.runs.plan_checks import check_objectives
from evomem.runs.samples import Samples
from tests.workers.test_several_models import folders  # noqa: F401

ONCE, EVERY_3 = EvaluationProtocol(), EvaluationProtocol(kind="streaming", every=3)


def experiment(folders, *settings, **changes):  # noqa: F811
    llama = str(folders / "llama")
    data = {
        "name": "memories",
        "models": [{"name": "pair-memory", "protocol": {"kind": "streaming", "every": 3}}, llama],
        "space": {
            "manager": {
                "name": "feature_scorer",
                "options": {"features": ["recency", "frequency", "age"], "knots": 1, "sinks": 0, "recent": 1},
            },
            "weights": "all", "sigma": 0.5,
        },
        "tasks": [
            {"spec": "zipf", "model": "pair-memory", "length": 30, "options": {"keys": 12, "dim": 8}, "weight": 2.0},
            {"spec": f"file:{folders / 'questions.jsonl'}", "model": llama},
        ],
        "driver": {"population": 4},
        "fitness": {"normalise": "range"},
        "budgets": [5],
        "generations": 1,
        "samples_per_generation": 2,
        "train_contexts": 4,
        "select": {"contexts": 2, "top": 1},
        "sealed": {"contexts": 2, "exact": False},
        "chance_contexts": 0,
        **changes,
    }  # fmt: skip
    return parse_experiment(data, settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory, folders):  # noqa: F811
    folder = tmp_path_factory.mktemp("memories") / "run"
    search(experiment(folders), folder, model_bench)
    return open_run(folder)


def test_the_fitness_is_the_weighted_share_of_what_each_memory_is_worth(run):
    config, stage = run.config, run.config.plan()[0]
    protocols = {"pair-memory": EVERY_3, config.all_models[1].name: ONCE}
    assert {model.name: config.protocol_on(model.name) for model in config.all_models} == protocols
    vectors = build_driver("cmaes", run.space.dim, run.space.start, 0, sigma=0.5, popsize=4).ask().vectors
    samples = Samples(config, model_bench(config))
    for vector, fitness in zip(vectors, run.generations()[0].fitness, strict=True):
        manager, shares = run.space.decode(vector).with_options(budget=5), []
        for task in stage.tasks:
            evaluator = evaluator_of(load(task.model), protocols[task.model])
            built, drawn = samples.tasks[samples.name(task)], samples.minibatch(stage, task, 0)
            kept, full = (
                [evaluator.evaluate_plainly(one, sample, built).loglik for sample in drawn]
                for one in (manager, build("full"))
            )
            nothing = [evaluator.loglik_without_context(sample) for sample in drawn]
            worth = max(0.1, np.mean(full) - np.mean(nothing))
            shares.append((np.mean(kept) - np.mean(nothing)) / worth)
        assert (2 * shares[0] + shares[1]) / 3 == pytest.approx(fitness, abs=1e-4)
    # What reading nothing is worth is measured with the full memory, and kept in the journal.
    lines = [json.loads(line) for line in (run.folder / "journal.jsonl").read_text().splitlines()]
    units = [line["evaluations"] for line in lines if isinstance(line.get("evaluations"), list)]
    kept = [one for unit in units for one in unit if "without_context" in one]
    assert len(kept) == len({one["sample"] for one in kept})
    assert kept


def test_the_full_memory_is_worth_one_and_nothing_read_is_worth_zero():
    full, nothing = [-0.5, -1.5], [-3.0, -2.0]
    scale = range_scale(full, nothing)
    assert np.mean([(f - n) / scale for f, n in zip(full, nothing, strict=True)]) == pytest.approx(1.0)
    assert range_scale(nothing, nothing) == 0.1  # a task on which memory is worth nothing divides by no zero


def test_protocols_go_into_the_plugin_and_into_what_is_compared_later(run, folders):  # noqa: F811
    llama = str(folders / "llama")
    for source in (run, str(run.plugin)):
        subject = resolve(source)
        assert subject.protocol_on("pair-memory") == EVERY_3
        assert subject.protocol_on(llama) == ONCE


def test_what_cannot_be_searched_together_is_refused(folders, tmp_path):  # noqa: F811
    llama = str(folders / "llama")
    for changes, message in (
        ({"fitness": {"normalise": "range", "objective": "exact"}}, "take objective loglik"),
        (
            {
                "fitness": {"normalise": "range", "reading": 1.0}, "driver": {"name": "policy_gradient"},
                "protocol": {"kind": "streaming", "every": 3},
            },
            "share without a unit",
        ),
        ({"fitness": {"objective": "attention"}}, "needs protocol.kind compress_once on model 'pair-memory'"),
        ({"diagnostics": {"every": 1}}, "diagnostics.every"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            check_objectives(experiment(folders, **changes))
    for number, (changes, message) in enumerate(
        (
            ({"models": ["pair-memory", llama]}, "decide while they last"),
            ({"tasks": [{"spec": "zipf", "length": 30, "options": {"keys": 12, "dim": 8}}]}, "--model pair-memory"),
        )
    ):
        with pytest.raises(ConfigError, match=message):
            search(experiment(folders, **changes), tmp_path / f"refused-{number}", model_bench)
