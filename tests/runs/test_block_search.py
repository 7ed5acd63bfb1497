"""Runs: a search of two stages on a tiny model, first every head by its attention, killed in the middle."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from evomem.drivers import Stage, build
from evomem.errors import ConfigError
from evomem.evaluation import Evaluator
from evomem.evaluation.objectives import Attention
from evomem.models import LoadedModel
from evomem.runs import Bench, open_run, search
from evomem.search_space.space import SearchSpace
from evomem.testing.models import tiny, tiny_tokenizer
from tests.evaluation.test_evaluation import TASK, make_sample
from tests.support.interrupted_search import outcome, same
from tests.support.processes import forkserver
from tests.support.synthetic_search import experiment

NAMES = ["keydiff", "value_norm", "age"]
SETTINGS = (
    "tasks=[words]",
    "driver={name: block_cmaes, population: 6}",
    "chunk=4",
    "samples_per_generation=2",
    "train_contexts=5",
    "select={contexts: 2, top: 1, snapshots: 1}",
    "sealed={contexts: 2}",
)
SPACE = {
    "manager": {"name": "feature_scorer", "options": {
        "features": NAMES, "layers": 2, "heads": 2, "allocation": 2, "sinks": 1, "recent": 2, "budget": 10}},
    "start": {"heuristic": "keydiff"}, "sigma": 0.3,
}  # fmt: skip
STAGES = [
    {"name": "attention", "generations": 4, "budgets": [8], "fitness": {"objective": "attention"}},
    {"name": "likelihood", "generations": 4, "budgets": [8, 12]},
]


class Words:
    name, uniform_chance, has_exact = "words", 0.0, True

    def samples(self, split, n, seed):
        return [make_sample(1000 * len(split) + number) for number in range(n)]

    def score(self, sample, output):
        return TASK.score(sample, output)


def mean_share(evaluator, manager, sample):
    (found,) = evaluator.evaluate([manager], sample, TASK, Attention.measurement)
    return np.mean(found.values["head_attention"])


def configured(*settings):
    return experiment(*SETTINGS, *settings, space=SPACE, stages=STAGES)


def bench(pause=0.0):
    def make(config):
        torch.set_num_threads(1)
        loaded = LoadedModel("tiny", tiny("llama", layers=2), tiny_tokenizer(), "tiny")

        class Slow(Evaluator):
            def evaluate(self, *arguments, **options):
                time.sleep(pause)
                return super().evaluate(*arguments, **options)

        return Bench(Slow(loaded, config.protocol), lambda task: Words(), provenance={"model_digest": "tiny"})

    return make


def run(folder, pause):
    """What a process does."""
    search(configured(), folder, bench(pause), resume=True)


def lines(folder):
    journal = folder / "journal.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def without_tokens(found):
    for evaluations in found[0].values():
        for evaluation in evaluations:
            del evaluation["tokens"]  # a context that was read before the kill is read again
    return found


def test_two_stages_killed_and_resumed_end_the_same(tmp_path):
    processes = forkserver()

    def begin(folder, pause=0.0):
        process = processes.Process(target=run, args=(folder, pause))
        process.start()
        return process

    whole = begin(tmp_path / "whole")
    whole.join(240)
    assert whole.exitcode == 0
    total = lines(tmp_path / "whole")
    for at in (total // 6, total // 2):  # in the first stage, and in the second
        process = begin(tmp_path / "run", 0.01)
        deadline = time.monotonic() + 120
        while process.is_alive() and lines(tmp_path / "run") < at and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -9
        assert at <= lines(tmp_path / "run") < total
    last = begin(tmp_path / "run")
    last.join(240)
    assert last.exitcode == 0
    same(without_tokens(outcome(tmp_path / "run")), without_tokens(outcome(tmp_path / "whole")))
    check(tmp_path / "run")


def check(folder):
    """What the stages measured and moved."""
    found = open_run(folder)
    generations = found.generations()
    assert [g.stage for g in generations] == ["attention"] * 4 + ["likelihood"] * 4
    assert all(0 < value <= 1 for g in generations[:4] for value in g.fitness)
    assert all(value < 0 for g in generations[4:] for value in g.fitness)
    # The first generation once more, one candidate at a time.
    whole, config = SearchSpace(configured().space), configured()
    driver = build("block_cmaes", whole.dim, whole.start, 0, sigma=0.3, popsize=6, blocks=whole.blocks())
    driver.enter(Stage(per_head=True))
    units = [r for r in found.records() if r["kind"] == "unit" and r["generation"] == 0]
    samples = {e["sample"] for unit in units for e in unit["evaluations"]}
    evaluator = bench()(config).evaluator
    for vector, fitness in zip(driver.ask().vectors, generations[0].fitness, strict=True):
        manager = whole.decode(vector).with_options(budget=8)
        shares = [mean_share(evaluator, manager, make_sample(int(name.split("/")[1]))) for name in samples]
        assert np.mean(shares) == pytest.approx(fitness, abs=2e-5)


@pytest.mark.parametrize(("layers", "heads"), [(2, 3), (1, 2), (1, 4), (4, 1)])
def test_other_heads_than_the_model_has_are_refused_before_anything_is_evaluated(tmp_path, layers, heads):
    """Also where their number is the model's: a fitness would go to another head."""
    config = configured(f"space.manager.options.layers={layers}", f"space.manager.options.heads={heads}")
    said = rf"{layers} layers of {heads} heads.*2 layers of 2 KV heads; set .*layers=2 and .*heads=2"
    with pytest.raises(ConfigError, match=said):
        search(config, tmp_path / "run", bench())
    assert '"kind":"unit"' not in (tmp_path / "run" / "journal.jsonl").read_text()


def test_streaming_cannot_have_the_attention_objective(tmp_path):
    config = configured("protocol={kind: streaming, every: 16}", "attempts=1")
    with pytest.raises(Exception, match="compress_once"):
        search(config, tmp_path / "run", bench())
