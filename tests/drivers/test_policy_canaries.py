"""Canaries: a policy gains from what it sees and from nothing else: not from places, from chance, nor from the future.

That tokens after a decision never change it is in test_rollouts.py.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from evomem.drivers import build as build_driver
from evomem.drivers.base import Fitness, Stage
from evomem.drivers.estimators import Rollouts
from evomem.evaluation import Evaluator
from evomem.evaluation.costs import ranking_costs
from evomem.evaluation.rollouts import rollouts
from evomem.managers import build
from evomem.managers.base import MemoryManager
from evomem.managers.vector import load_vector, to_vector
from evomem.models import load
from evomem.tasks import Split
from evomem.tasks import build as build_task
from tests.support.policy_search import FEATURES

BUDGET, LENGTH, SEALED = 24, 96, 40


@pytest.fixture(scope="module")
def bench():
    loaded = load("zoo-gpt-neox")
    evaluator, task = Evaluator(loaded), build_task("zoo_needle", loaded.tokenizer, LENGTH)
    return evaluator, task, task.samples(Split.TRAIN, 24, 0), task.samples(Split.SEALED, SEALED, 0)


def policy(features=FEATURES, vector=None):
    torch.manual_seed(0)
    found = build("kv_policy", features=list(features), hidden=0, knots=1, budget=BUDGET)
    if vector is not None:
        load_vector(found, vector)
    return found.requires_grad_(False)


def trained(features, samples, measure, *, exact, generations=30, begin=None):
    """The policy at the end of a stage; ``measure`` gives the evaluations of a generation's candidates on a sample."""
    start = policy(features, begin)
    driver = build_driver("policy_gradient", len(to_vector(start)), to_vector(start), 0, learning_rate=0.1)
    driver.enter(Stage(0, generations, exact=exact))
    for generation in range(generations):
        population = driver.ask()
        manager, groups = policy(features, population.vectors[0]), []
        for number in range(2):
            found = measure(manager, samples[(2 * generation + number) % len(samples)], population.seeds)
            rewards = np.array([[0.0 if exact else one.loglik] for one in found])
            groups.append(Rollouts(0.5, rewards, [one.steps for one in found]))
        driver.tell(population, Fitness(np.zeros(len(population.vectors)), rollouts=tuple(groups)))
    return policy(features, driver.mean)


def sealed(bench, *managers):
    """Mean log-likelihoods (managers, samples)."""
    evaluator, task, _, samples = bench
    found = [evaluator.evaluate(list(managers), sample, task) for sample in samples]
    return np.array([[one.loglik for one in row] for row in found]).T


def interval(difference):
    """Mean of paired differences, and the half width of its interval: 2.7 standard errors, 99 of 100 samples."""
    return difference.mean(), 2.7 * difference.std(ddof=1) / np.sqrt(len(difference))


@pytest.fixture(scope="module")
def content(bench):
    """The policy that sees the content, trained by the closed form."""
    evaluator, _, train, _ = bench
    return trained(FEATURES, train, exact_costs(evaluator), exact=True)


def exact_costs(evaluator):
    return lambda manager, sample, seeds: ranking_costs(evaluator, [manager], sample, "expected", gradient=True)


def test_places_alone_do_not_find_what_stands_anywhere(bench, content):
    evaluator, _, train, _ = bench
    places = trained(("age", "position", "sink"), train, exact_costs(evaluator), exact=True)
    seen, blind, chance = sealed(bench, content, places, build("random", budget=BUDGET))
    mean, half = interval(seen - blind)
    assert mean > half
    mean, half = interval(seen - chance)
    assert mean > half
    mean, half = interval(blind - chance)
    assert mean < half


class Shuffled(MemoryManager):
    """A policy's scores, permuted within every head."""

    name = "shuffled"

    def __init__(self, inner, **options):
        super().__init__(**options)
        self.inner = inner

    @property
    def observes(self):
        return self.inner.observes

    def score(self, view):
        scores = self.inner.score(view)
        generator = torch.Generator().manual_seed(7 * view.layer + view.seen)
        order = torch.argsort(torch.rand(scores.shape, generator=generator), -1)
        return scores.gather(-1, order)


def test_rankings_shuffled_within_heads_are_worth_nothing(bench, content):
    shuffled = Shuffled(content, budget=BUDGET)
    seen, mixed, chance = sealed(bench, content, shuffled, build("random", budget=BUDGET))
    mean, half = interval(seen - mixed)
    assert mean > half
    mean, half = interval(mixed - chance)
    assert mean < half


def test_a_reward_of_pure_noise_teaches_nothing(bench, content):
    """Not by the likelihood that is really measured; a true reward teaches with the same steps."""
    evaluator, task, train, _ = bench

    def true(manager, sample, seeds):
        return rollouts(evaluator, manager, sample, task, [int(seed) for seed in seeds])

    def noise(manager, sample, seeds):
        def chance(seed):
            digest = hashlib.sha256(f"{sample.id}/{seed}".encode()).digest()
            return int.from_bytes(digest[:6], "big") / 2**48

        found = true(manager, sample, seeds)
        return [replace(one, values={"loglik": chance(seed)}) for one, seed in zip(found, seeds, strict=True)]

    # From a policy that is some good: one that ties all slots keeps the oldest, and any change at all would be better.
    lost = trained(FEATURES, train, noise, exact=False, begin=to_vector(content))
    taught = trained(FEATURES, train, true, exact=False)
    begin, misled, silent, better = sealed(bench, content, lost, policy(), taught)
    assert not np.array_equal(to_vector(lost), to_vector(content))
    mean, half = interval(misled - begin)
    assert mean < half
    mean, half = interval(better - silent)
    assert mean > half
