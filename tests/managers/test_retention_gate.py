"""Retention gates equal plain loops over β^n, begin as the newest tokens, and learn by exact gradients."""

from __future__ import annotations

import math

import pytest
import torch

from evomem.errors import ConfigError
from evomem.managers import RetentionGate, build
from evomem.managers.features import features
from evomem.managers.learned.retention_gate import OF_THE_TOKEN
from evomem.managers.plackett_luce import expected_cost
from tests.managers.test_feature_scorer import randomised
from tests.support.ragged_view import HEADS, make_view


@pytest.mark.parametrize("layer", range(4))
def test_scores_are_the_logarithm_of_what_is_left(layer):
    view = make_view(layer=layer)
    gate = randomised(RetentionGate(hidden=2, knots=2, layers=4, heads=HEADS)).requires_grad_(False)
    x, scores, place = features(view, OF_THE_TOKEN), gate.score(view), layer / 3

    def at(knots):
        return (1 - place) * knots[0] + place * knots[1]

    for b, h, s in view.valid.nonzero()[::7].tolist():
        g = float(x[b, h, s] @ (at(gate.weights) + gate.own[layer, h])) + float(at(gate.rate) + gate.own_rate[layer, h])
        for unit in range(2):
            inner = float(x[b, h, s] @ gate.inner[unit]) + float(gate.bias[unit])
            g += float(at(gate.outer)[unit]) * math.tanh(inner)
        beta, left = 1 / (1 + math.exp(-g)), 1.0
        for _ in range(int(view.age[b, h, s])):
            left *= beta
        assert float(scores[b, h, s]) == pytest.approx(math.log(left) if left else -math.inf, rel=1e-3, abs=1e-4)


def test_as_built_the_newest_stay():
    view = make_view()
    assert torch.equal(
        build("retention_gate(hidden=4)", budget=7).decide(view).keep,
        build("streaming_llm(sinks=0)", budget=7).decide(view).keep,
    )
    with pytest.raises(ConfigError, match="leave start out"):
        RetentionGate.start_from("keydiff")


def test_a_gate_that_is_open_keeps_what_has_it_whatever_its_age():
    """Tokens of gate 1 have lost nothing: the sinks stay although they are the oldest."""
    view = make_view(held=((40, 40, 40), (33, 33, 33)))
    gate = RetentionGate(features=("sink",), knots=1, budget=9)
    with torch.no_grad():
        gate.weights.fill_(50.0)
        gate.rate.fill_(0.0)
    keep = gate.decide(view).keep
    assert keep[view.valid & ((view.position < 4) | (view.age < 5))].all()
    assert (keep.sum(-1) == 9).all()


@pytest.mark.parametrize("wrong", ["attention", "keydiff", "mean:7:age", "window:32"])
def test_what_is_not_known_when_a_token_is_read_is_refused(wrong):
    with pytest.raises(ConfigError, match="not known when a token is read"):
        RetentionGate(features=("key_norm", wrong))
    RetentionGate(features=("mean:7:key_norm",))


def test_exact_gradients_find_what_is_attended_to():
    """Attention to come goes to short keys, wherever they stand: a gate learns to hold them."""
    views = [make_view(seed=seed, held=((40, 40, 40), (33, 33, 33))) for seed in range(6)]
    futures = [torch.where(view.valid, (-3 * view.keys.norm(dim=-1)).exp(), 0.0) for view in views]
    gate = RetentionGate(knots=1, hidden=4)
    optimiser = torch.optim.AdamW(gate.parameters(), lr=0.1, weight_decay=0.0)

    def cost(some):
        return torch.stack([expected_cost(gate.score(views[i])[0], futures[i][0]).mean() for i in some]).mean()

    before = float(cost([5]).detach())
    for _ in range(60):
        optimiser.zero_grad()
        cost(range(5)).backward()
        optimiser.step()
    assert all(bool(parameter.grad.any()) for parameter in (gate.weights, gate.outer, gate.inner, gate.rate))
    after = float(cost([5]).detach())
    assert after < 1 + 0.6 * (before - 1)
