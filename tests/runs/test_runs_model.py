"""Runs: the search with the real evaluator, on a tiny random model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evomem.evaluation.evaluator import Evaluator
from evomem.models import LoadedModel
from evomem.runs import Bench, open_run, search
from evomem.runs.bench import calibrate_manager
from evomem.runs.samples import Samples
from evomem.tasks.base import Sample
from evomem.testing.models import tiny, tiny_tokenizer
from tests.support.interrupted_search import Stop, outcome, same
from tests.support.synthetic_search import experiment

WORDS = 96
SETTINGS = (
    "space={manager: {name: namm, options: {scorer: linear, budget: 12, every: 16}}, "
    "start: {parameters: {scorer.score_bias: 1.0}}, sigma: 0.3}",
    "tasks=[words]",
    "budgets=[8, 16]",
    "generations=2",
    "samples_per_generation=2",
    "train_contexts=4",
    "select={contexts: 2, top: 1}",
    "sealed={contexts: 2}",
)


class Words:
    """Random words; the answer is one of them."""

    name = "words"
    uniform_chance = 0.0
    has_exact = True

    def __init__(self, tokenizer):
        self.vocabulary = [tokenizer.decode([i]).strip() for i in range(8, 120)]

    def samples(self, split, n, seed):
        found = []
        for number in range(n):
            rng = np.random.default_rng([seed, number, len(split)])
            words = rng.choice(self.vocabulary, WORDS).tolist()
            context, question = " ".join(words), " ".join(words[5:8])
            found.append(Sample(f"words/{split}/{number}", context, " " + question, " " + words[8], (words[8],), 2))
        return found

    def score(self, sample, output):
        return float(sample.references[0] in output)


@pytest.fixture(scope="module")
def loaded():
    return LoadedModel("tiny", tiny("llama", layers=2), tiny_tokenizer(), "tiny")


def bench(loaded, evaluator_class=Evaluator):
    def make(config):
        evaluator = evaluator_class(loaded, config.protocol)

        def calibrate(manager, chosen):
            calibrate_manager(manager, [(evaluator, samples) for _, samples in chosen])

        return Bench(evaluator, lambda task: Words(loaded.tokenizer), calibrate, {"model_digest": loaded.digest})

    return make


@pytest.mark.parametrize("protocol", ["compress_once", "streaming"])
def test_interrupted_search_ends_the_same_and_equals_the_plain_way(tmp_path, loaded, protocol):
    config = experiment(*SETTINGS, f"protocol={{kind: {protocol}, every: 32}}")
    search(config, tmp_path / "whole", bench(loaded))

    class Interrupted(Evaluator):
        units = 0

        def evaluate(self, *arguments, **options):
            self.units += 1
            if self.units > 11:
                raise Stop
            return super().evaluate(*arguments, **options)

    for _ in range(20):
        try:
            search(config, tmp_path / "run", bench(loaded, Interrupted), resume=True)
            break
        except Stop:
            continue
    mine, whole = outcome(tmp_path / "run"), outcome(tmp_path / "whole")
    for units in (mine[0], whole[0]):
        for evaluations in units.values():
            for evaluation in evaluations:
                del evaluation["tokens"]  # a context that was read before the interruption is read again
    same(mine, whole)

    run = open_run(tmp_path / "run")
    assert not torch.equal(run.winner.spectrum_mean, torch.zeros(17))
    evaluator, task = Evaluator(loaded, config.protocol), Words(loaded.tokenizer)
    samples = Samples(config, Bench(evaluator, lambda _: task)).minibatch(config.plan()[0], config.tasks[0], 0)
    from evomem.drivers import build

    population = build("cmaes", run.space.dim, run.space.start, 0, sigma=0.3, popsize=6).ask()
    for vector, fitness in zip(population.vectors[:2], run.generations()[0].fitness, strict=False):
        managers = [run.space.decode(vector).with_options(budget=budget) for budget in (8, 16)]
        values = [evaluator.evaluate_plainly(m, sample, task).loglik for m in managers for sample in samples]
        assert np.mean(values) == pytest.approx(fitness, abs=1e-4)
