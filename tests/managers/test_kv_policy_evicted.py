"""A policy that draws the slots which leave: how often each is drawn is its likelihood, and what stays is the rest."""

from __future__ import annotations

import math
from collections import Counter
from itertools import permutations

import pytest
import torch

from evomem.managers import build
from evomem.managers.stochastic import Noise
from evomem.memory import layer_view

SLOTS, BUDGET, DRAWS = 5, 3, 4000


def policy(draws="evicted", **options):
    made = build("kv_policy", features=["key_norm"], hidden=0, knots=1, budget=BUDGET, recent=1, draws=draws, **options)
    with torch.no_grad():
        made.weights[:] = 1.3
    return made


def view():
    vectors = torch.randn(1, 1, SLOTS, 4, generator=torch.Generator().manual_seed(1))
    return layer_view(vectors, vectors)


def likelihood(scores, leaving):
    """P that these slots leave in this order: one after another, by exp(-score) among what may still leave."""
    total, left = 0.0, dict(enumerate(scores))
    for slot in leaving:
        total += -scores[slot] - math.log(sum(math.exp(-score) for score in left.values()))
        del left[slot]
    return total


def test_slots_leave_as_often_as_their_likelihood_says():
    seen, manager = view(), policy()
    scores = manager.score(seen)[0, 0, : SLOTS - 1].tolist()  # the newest is protected
    action = manager.draw(seen, Noise.of([(seed,) for seed in range(DRAWS)], seen))
    log_probs = manager.log_prob(seen, action)[:, 0]
    kept = manager.carry_out(seen, action).keep[:, 0]
    assert torch.equal(kept.sum(-1), torch.full((DRAWS,), BUDGET))
    assert bool(kept[:, -1].all())
    gone = SLOTS - BUDGET
    orders = [tuple(row[::-1][:gone]) for row in action.ranking[:, 0].tolist()]
    for order, probability in zip(orders[:50], log_probs[:50].tolist(), strict=True):
        assert probability == pytest.approx(likelihood(scores, order), abs=1e-4)
    for mask, order in zip(kept[:50].tolist(), orders[:50], strict=True):
        assert {slot for slot, stays in enumerate(mask) if not stays} == set(order)
    counts = Counter(orders)
    for order in permutations(range(SLOTS - 1), gone):
        wanted = math.exp(likelihood(scores, order))
        assert counts[order] / DRAWS == pytest.approx(wanted, abs=4 * math.sqrt(wanted / DRAWS) + 1e-9)
    assert sum(math.exp(likelihood(scores, order)) for order in permutations(range(SLOTS - 1), gone)) == pytest.approx(
        1
    )
    assert manager.choices(seen, action).unique().tolist() == [gone]


def test_deployed_it_decides_as_the_other_does_and_without_a_budget_it_ranks_everything():
    seen = view()
    assert torch.equal(policy().decide(seen).keep, policy("kept").decide(seen).keep)
    free = policy().with_options(budget=None)
    action = free.draw(seen, Noise.of([(3,)], seen))
    assert free.choices(seen, action).tolist() == [[SLOTS - 1]]
    assert bool(free.carry_out(seen, action).keep.all())
    assert float(free.log_prob(seen, action)) < 0
