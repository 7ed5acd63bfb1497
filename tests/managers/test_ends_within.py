"""Protected ends that are a share of a head's slots, under allocations that give heads other numbers than the mean."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from evomem.evaluation import Evaluator, PopulationPolicy
from evomem.evaluation.costs import ranking_costs
from evomem.evaluation.future import sample_key
from evomem.managers import build
from tests.evaluation.test_traces import Words, load

SCORERS = ["snapkv(window=12, kernel=5)", "lava(window=12, kernel=3)", "h2o(recent=0.5)", "streaming_llm(sinks=3)"]
LOGS = [[-2.5, 1.0], [0.0, 2.0], [1.2, -4.0], [0.5, 0.5]]
"""Log-shares of every head, with which some heads get a few slots and some nearly all."""
BUDGET = 14
SAMPLE = Words().samples("train", 1, 0)[0]


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return Evaluator(load())


def read(evaluator, manager):
    tokens = evaluator.tokens(SAMPLE)
    views = evaluator.reading(tokens.read, manager.observes).views
    return views, evaluator.future.of(evaluator, tokens, sample_key(tokens), manager.observes).peak


def shared(spec, views, scale=1.0):
    """The scorer with a budget, and with shares of it per head that differ much."""
    layers, heads = len(views), views[0].slots.shape[1]
    allocation = {"name": "per_head_shares", "options": {"layers": layers, "heads": heads}}
    manager = build(spec, budget=BUDGET, allocation=allocation)
    with torch.no_grad():
        manager.allocation.log_shares.copy_(
            scale * torch.tensor(LOGS).reshape(-1)[: layers * heads].view(layers, heads)
        )
    return manager.requires_grad_(False)


@pytest.mark.parametrize("attention", ["of the model", "at random"])
@pytest.mark.parametrize("spec", SCORERS)
def test_a_head_with_n_slots_keeps_what_it_keeps_with_the_budget_n(evaluator, spec, attention):
    views, _ = read(evaluator, build(spec))
    if attention == "at random":  # so that tokens of the window are among the best, too
        generator = torch.Generator().manual_seed(4)
        drawn = [
            {k: torch.rand(v.shape, generator=generator) for k, v in sorted(view.recorded.items())} for view in views
        ]
        views = [replace(view, recorded=recorded, memo={}) for view, recorded in zip(views, drawn, strict=True)]
    counts = set()
    for view, decision in zip(views, shared(spec, views).decide_all(views), strict=True):
        for head in range(view.slots.shape[1]):
            n = int(decision.keep[0, head].sum())
            alone = build(spec, budget=n, allocation="uniform").decide(view)
            assert torch.equal(decision.keep[0, head], alone.keep[0, head]), (view.layer, head, n)
            counts.add(n)
    assert min(counts) < BUDGET / 2, counts
    assert max(counts) > BUDGET * 3 / 2, counts


@pytest.mark.parametrize("allocation", ["lava(window=12)", "cake(window=12)"])
def test_allocations_that_measure_ends_by_the_mean_protect_alike_in_every_head(evaluator, allocation):
    """And score so: what lies beyond the window at the mean is pooled in every head, whatever its slots."""
    manager = build("snapkv(window=12, kernel=3)", budget=BUDGET, allocation=allocation)
    views, _ = read(evaluator, manager)
    for view, decision in zip(views, manager.decide_all(views), strict=True):
        kept = view.valid & (view.age < BUDGET // 2)
        assert bool((decision.keep | ~kept).all())
        scores = manager.score(view)
        for head, n in enumerate(decision.keep[0].sum(-1).tolist()):
            order = torch.sort(torch.where(kept, torch.inf, scores)[0, head], descending=True, stable=True).indices
            assert set(order[:n].tolist()) == set(decision.keep[0, head].nonzero()[:, 0].tolist())


def test_a_population_decides_as_each_alone(evaluator):
    views, _ = read(evaluator, build(SCORERS[0]))
    crowd = [shared(SCORERS[0], views, scale) for scale in (-1.0, 0.0, 0.5, 1.0)]
    together = PopulationPolicy(crowd).decide_all(views)
    for row, manager in enumerate(crowd):
        for many, one in zip(together, manager.decide_all(views), strict=True):
            assert torch.equal(many.keep[row], one.keep[0])


@pytest.mark.parametrize("how", ["sorted", "expected"])
@pytest.mark.parametrize("spec", SCORERS)
def test_a_ranking_costs_a_head_with_n_slots_what_it_costs_with_the_budget_n(evaluator, spec, how):
    views, _ = read(evaluator, build(spec))
    manager = shared(spec, views)
    (cost,) = ranking_costs(evaluator, [manager], SAMPLE, how, oracle=True)
    head_costs = np.array(cost.values["head_cost"])
    for layer, decision in enumerate(manager.decide_all(views)):
        for head, n in enumerate(decision.keep[0].sum(-1).tolist()):
            (alone,) = ranking_costs(evaluator, [build(spec, budget=n, allocation="uniform")], SAMPLE, how)
            assert head_costs[layer, head] == pytest.approx(alone.values["head_cost"][layer][head], abs=1e-6), n
    if how == "sorted":
        assert cost.values["sorted_cost"] == pytest.approx(head_costs.mean(), abs=1e-4)
