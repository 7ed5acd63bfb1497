"""Searches on several models at once, against the same candidates measured on each model alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from evomem.cli.commands.evolve import evolve
from evomem.errors import ConfigError
from evomem.evaluation import Evaluator
from evomem.managers import build as build_manager
from evomem.models import load
from evomem.report.tables import read_rows
from evomem.runs import model_bench, open_run, parse_experiment, search
from evomem.runs.samples import Samples
from evomem.testing.models import tiny, tiny_tokenizer
from evomem.workers import WorkerOptions


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two families as folders, and a file of questions."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = tiny_tokenizer()
    words = [tokenizer.decode([i]).strip() for i in range(8, 120)]
    for family, layers in (("llama", 2), ("gpt_neox", 3)):
        tiny(family, layers=layers).save_pretrained(root / family)
        tokenizer.save_pretrained(root / family)
    lines = []
    for number in range(60):
        drawn = np.random.default_rng(number).choice(words, 40).tolist()
        lines.append({"context": " ".join(drawn), "question": drawn[3], "answers": [drawn[4]], "id": str(number)})
    (root / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return root


def experiment(folders, *settings, **changes):
    data = {
        "name": "several",
        "models": [str(folders / "llama"), str(folders / "gpt_neox")],
        "space": {
            "manager": {"name": "namm", "options": {"scorer": "linear", "budget": 12, "every": None}},
            "start": {"parameters": {"scorer.score_bias": 1.0}}, "sigma": 0.3,
        },
        "tasks": [f"file:{folders / 'questions.jsonl'}"],
        "driver": {"population": 4},
        "fitness": {"normalise": "full"},
        "budgets": [8],
        "generations": 2,
        "samples_per_generation": 2,
        "train_contexts": 4,
        "select": {"contexts": 2, "top": 1},
        "sealed": {"contexts": 3, "exact": False},
        "against": ["keydiff"],
        "chance_contexts": 0,
        **changes,
    }  # fmt: skip
    return parse_experiment(data, settings)


def test_the_fitness_is_the_mean_over_models_of_what_eviction_costs_each(tmp_path, folders):
    config = experiment(folders)
    search(config, tmp_path / "run", model_bench)
    run = open_run(tmp_path / "run")
    stage = config.plan()[0]
    assert [task.model for task in stage.tasks] == [model.name for model in config.all_models]
    from evomem.drivers import build

    population = build("cmaes", run.space.dim, run.space.start, 0, sigma=0.3, popsize=4).ask()
    samples = Samples(config, model_bench(config))
    for vector, fitness in zip(population.vectors, run.generations()[0].fitness, strict=True):
        manager = run.space.decode(vector).with_options(budget=8)
        costs = []
        for task in stage.tasks:
            evaluator = Evaluator(load(task.model), config.protocol)
            for sample in samples.minibatch(stage, task, 0):
                kept = evaluator.evaluate_plainly(manager, sample, samples.tasks[samples.name(task)]).loglik
                full = evaluator.evaluate_plainly(build_manager("full"), sample, None).loglik
                costs.append(kept - full)
        assert np.mean(costs) == pytest.approx(fitness, abs=1e-4)


def test_workers_make_no_difference_and_the_comparison_covers_all_models(tmp_path, folders, capsys):
    config = experiment(folders)
    (tmp_path / "several.yaml").write_text(json.dumps(config.resolved()))
    for name, count in (("none", 0), ("two", 2)):
        evolve(
            str(tmp_path / "several.yaml"),
            [],
            tmp_path / name,
            resume=False,
            workers=WorkerOptions(count=count),
            again="",
        )
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("none", "two")]
    vectors = [np.load(tmp_path / name / "winner" / "vector.npy") for name in ("none", "two")]
    assert np.array_equal(*vectors)
    assert results[0]["sealed"] == results[1]["sealed"]
    rows = read_rows(tmp_path / "none" / "comparison.json")
    assert {row.model for row in rows} == {str(folders / "llama"), str(folders / "gpt_neox")}
    assert {row.manager for row in rows} == {"several", "keydiff", "full"}
    provenance = json.loads((tmp_path / "none" / "winner" / "plugin" / "provenance.json").read_text())
    assert [model["name"] for model in provenance["models"]] == [model.name for model in config.all_models]
    assert len({model["model_digest"] for model in provenance["model_digests"]}) == 2
    capsys.readouterr()


def test_statistics_are_pooled_over_the_models(tmp_path, folders):
    def measured(models):
        config = experiment(folders, models=models)
        search(config, tmp_path / str(len(list(tmp_path.iterdir()))), model_bench)
        return open_run(sorted(tmp_path.iterdir())[-1]).winner.spectrum_mean

    both, one, other = (measured([str(folders / f) for f in names]) for names in (
        ("llama", "gpt_neox"), ("llama",), ("gpt_neox",)))  # fmt: skip
    heads = [2 * 2, 3 * 4]  # layers times KV heads; every head has read as many tokens
    assert torch.allclose(both, (heads[0] * one + heads[1] * other) / sum(heads), rtol=1e-5)
    assert not torch.allclose(one, other, rtol=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ["a", "a"]}, "one is given twice"),
        ({"model": "c", "models": ["a", "b"]}, "'c' is not the first of models"),
        ({"models": ["a", "b"], "tasks": [{"spec": "passkey", "model": "c"}]}, "model 'c' is none of: a, b"),
    ],
)
def test_models_that_do_not_fit_are_refused(folders, changes, message):
    with pytest.raises(ConfigError, match=message):
        experiment(folders, **changes)


def test_a_task_may_be_for_one_of_the_models(folders):
    config = experiment(folders, models=["a", "b"], tasks=["passkey", {"spec": "book", "model": "b", "length": 64}])
    labels = [task.label for task in config.plan()[0].tasks]
    assert labels == ["passkey on a", "passkey on b", "book@64 on b"]
    assert experiment(folders, models=["a"]).plan()[0].tasks[0].model is None


def test_heads_of_several_models_are_not_searched_one_by_one(tmp_path, folders):
    blocks = ["fitness={objective: attention}", "driver={name: block_cmaes}"]
    with pytest.raises(ConfigError, match="one model"):
        search(experiment(folders, *blocks), tmp_path / "blocks", model_bench)
    # A driver that takes the mean over heads does not care whose heads they are.
    whole = search(experiment(folders, "fitness={objective: attention}"), tmp_path / "run", model_bench)
    assert 0 < whole.train.fitness <= 1
