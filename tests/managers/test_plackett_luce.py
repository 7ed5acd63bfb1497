"""Random rankings against enumeration of all rankings, and the closed form against sampling."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomem.managers.plackett_luce import (
    bernoulli_log_prob,
    expected_cost,
    trace_cost,
)
from evomem.statistics import leave_one_out
from tests.support.rankings import log_prob, sample_ranking

SCORES = st.lists(st.floats(-3, 3), min_size=2, max_size=5)


def probability(scores, ranking):
    """By the definition: one pick after the other."""
    left, found = list(range(len(scores))), 1.0
    for pick in ranking:
        found *= math.exp(scores[pick]) / sum(math.exp(scores[i]) for i in left)
        left.remove(pick)
    return found


@settings(max_examples=20, deadline=None)
@given(SCORES, st.integers(0, 10**6))
def test_likelihood_and_expected_cost_against_all_rankings(scores, seed):
    future = torch.rand(len(scores), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01
    tensor = torch.tensor(scores, dtype=torch.float64)
    total, mean = 0.0, 0.0
    for ranking in permutations(range(len(scores))):
        p = probability(scores, ranking)
        index = torch.tensor(ranking)
        assert log_prob(tensor, index).item() == pytest.approx(math.log(p), abs=1e-9)
        total += p
        mean += p * trace_cost(future, index).item()
    assert total == pytest.approx(1)
    assert expected_cost(tensor, future).item() == pytest.approx(mean, rel=1e-9)
    best = torch.argsort(future, descending=True)
    assert trace_cost(future, best).item() == pytest.approx(1)


@settings(max_examples=10, deadline=None)
@given(SCORES, st.data())
def test_first_picks_are_a_marginal(scores, data):
    n = data.draw(st.integers(1, len(scores)))
    tensor = torch.tensor(scores, dtype=torch.float64)
    ranking = tuple(data.draw(st.permutations(range(len(scores)))))
    whole = sum(probability(scores, other) for other in permutations(range(len(scores))) if other[:n] == ranking[:n])
    found = log_prob(tensor, torch.tensor(ranking), n)
    assert found.item() == pytest.approx(math.log(whole), abs=1e-9)
    assert found.item() == log_prob(tensor, torch.tensor(ranking), torch.tensor(n)).item()


def test_rankings_are_drawn_as_often_as_they_are_likely():
    scores = torch.tensor([0.5, -1.0, 1.0, 0.0])
    drawn = sample_ranking(scores.expand(40_000, 4), torch.Generator().manual_seed(0))
    for ranking in permutations(range(4)):
        share = (drawn == torch.tensor(ranking)).all(-1).float().mean().item()
        p = probability(scores.tolist(), ranking)
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / 40_000)


def test_what_cannot_be_picked_comes_last_and_counts_nothing():
    scores = torch.tensor([[0.3, -torch.inf, 1.0, -torch.inf]], requires_grad=True)
    ranking = sample_ranking(scores.detach(), torch.Generator().manual_seed(3))
    assert set(ranking[0, :2].tolist()) == {0, 2}
    found = log_prob(scores, ranking)
    found.sum().backward()
    short = log_prob(scores.detach()[:, [0, 2]], torch.argsort(ranking[:, :2]).argsort())
    assert found.item() == pytest.approx(short.item())
    assert torch.isfinite(scores.grad).all()
    assert (scores.grad[0, [1, 3]] == 0).all()


def test_sampled_gradients_agree_with_the_closed_form():
    """The estimator that a search uses, leave-one-out in groups of eight, against the exact gradient."""
    generator = torch.Generator().manual_seed(0)
    slots, groups, size = 24, 2500, 8
    future = torch.rand(slots, generator=generator, dtype=torch.float64) ** 4
    scores = torch.randn(slots, generator=generator, dtype=torch.float64).requires_grad_()
    (exact,) = torch.autograd.grad(expected_cost(scores, future), scores)
    drawn = sample_ranking(scores.detach().expand(size, groups, slots), generator)
    costs = trace_cost(future.expand(size, groups, slots), drawn)
    advantages = leave_one_out(costs)
    (found,) = torch.autograd.grad((advantages * log_prob(scores.expand(size, groups, slots), drawn)).mean(), scores)
    assert (found - exact).norm() / exact.norm() < 0.02 * 3  # 20,000 samples; the mean over steps is a benchmark line
    plain = costs - 0.0
    (rough,) = torch.autograd.grad((plain * log_prob(scores.expand(size, groups, slots), drawn)).mean(), scores)
    assert (rough - exact).norm() > (found - exact).norm()


def test_blocks_make_no_difference(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    scores, future = torch.randn(3, 2, 50, generator=generator), torch.rand(3, 2, 50, generator=generator)
    whole = expected_cost(scores, future)
    monkeypatch.setattr("evomem.managers.plackett_luce.BLOCK_ELEMENTS", 1000)
    assert torch.allclose(expected_cost(scores, future), whole, rtol=1e-5)


def test_advantages_and_what_is_stored():
    rewards = torch.tensor([[1.0, 2.0], [3.0, 2.0], [5.0, 8.0]])
    others = torch.stack([torch.cat([rewards[:i], rewards[i + 1 :]]).mean(0) for i in range(3)])
    assert torch.allclose(leave_one_out(rewards), rewards - others)
    assert leave_one_out(rewards.numpy()).tolist() == leave_one_out(rewards).tolist()
    assert leave_one_out(rewards[:1]).tolist() == rewards[:1].tolist()
    log_odds = torch.tensor([2.0, -1.0])
    p = torch.sigmoid(log_odds)
    assert torch.allclose(
        bernoulli_log_prob(log_odds, torch.tensor([True, False])).exp(), torch.stack([p[0], 1 - p[1]])
    )
