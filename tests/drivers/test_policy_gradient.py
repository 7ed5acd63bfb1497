"""The policy gradient as a driver: estimators against loops, its steps against torch's, problems that it solves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from evomem.drivers import build
from evomem.drivers.base import Fitness, Stage
from evomem.drivers.estimators import Rollouts, advantages, combined, group_gradient, rewards_to_go
from evomem.errors import ConfigError, FitnessError
from evomem.evaluation.measurement import Step
from evomem.managers import plackett_luce
from tests.support.gaussian_policy import SPREAD, parts, sphere
from tests.support.gaussian_policy import tell as tell_policy
from tests.support.rankings import log_prob, sample_ranking

RNG = np.random.default_rng(0)


def step(gradient, lower=None, **fields):
    pack = Step.pack(np.asarray(gradient, dtype=np.float64))
    return Step(pack, lower=b"" if lower is None else Step.pack(np.asarray(lower)), **fields)


# ---- estimators -----------------------------------------------------------------------------------------------------


def test_advantages_in_loops():
    rewards = RNG.normal(size=(5, 3))
    for normalise in (False, True):
        for baseline in ("leave_one_out", "none"):
            found = advantages(rewards, baseline, normalise=normalise)
            for i in range(5):
                for j in range(3):
                    others = [rewards[k, j] for k in range(5) if k != i]
                    expected = rewards[i, j] - (sum(others) / 4 if baseline == "leave_one_out" else 0.0)
                    expected /= np.std(rewards[:, j]) if normalise else 1.0
                    assert found[i, j] == pytest.approx(expected)
    assert np.all(advantages(np.ones((4, 2)), normalise=True) == 0)
    assert np.all(advantages(np.ones((1, 2))) == 0)  # nobody else to compare with


def test_rewards_to_go_in_loops():
    reading = RNG.normal(size=(4, 3))
    worth = RNG.normal(size=4) + reading.sum(1)
    found = rewards_to_go(worth, reading)
    for i in range(4):
        for j in range(3):
            assert found[i, j] == pytest.approx(worth[i] - sum(reading[i, k] for k in range(j)))
    assert rewards_to_go(worth, np.zeros((4, 0))).shape == (4, 0)
    soon = rewards_to_go(worth, reading, discount=0.5)
    for i in range(4):
        for j in range(3):
            rest = worth[i] - reading[i].sum()
            assert soon[i, j] == pytest.approx(rest + sum(0.5 ** (k - j) * reading[i, k] for k in range(j, 3)))


def test_a_groups_gradient_in_loops():
    """The side of the clip by the advantage's sign; exact gradients as they are; failed rollouts left out."""
    plain, upper, lower = RNG.normal(size=(3, 4)), RNG.normal(size=(3, 4)), RNG.normal(size=(3, 4))
    steps = [(step(plain[i]), step(upper[i], lower[i])) for i in range(3)]
    rewards = np.array([[1.0, -2.0], [np.nan, 1.0], [-3.0, 0.5]])
    group = Rollouts(1.0, rewards, [*steps])
    assert group.good().tolist() == [True, False, True]
    advantage = np.array([[0.5, -1.0], [-2.0, 0.25]])
    expected = (0.5 * plain[0] - 1.0 * lower[0] - 2.0 * plain[2] + 0.25 * upper[2]) / 2
    assert group_gradient(group, advantage) == pytest.approx(expected, rel=1e-6)
    ascent = Rollouts(1.0, np.zeros((2, 1)), [(step(plain[0], ascent=True),), (step(plain[1], ascent=True),)])
    assert group_gradient(ascent, np.zeros((2, 1))) == pytest.approx((plain[0] + plain[1]) / 2, rel=1e-6)
    short = Rollouts(1.0, np.zeros((2, 2)), [steps[0], steps[1][:1]])
    assert short.good().tolist() == [True, False]
    with pytest.raises(ConfigError, match="no decision"):
        group_gradient(Rollouts(1.0, np.zeros((2, 0)), [(), ()]), np.zeros((2, 0)))


def test_groups_are_averaged_and_their_differences_are_the_noise():
    gradients, weights = [RNG.normal(size=3) for _ in range(5)], [1.0, 2.0, 0.5, 1.0, 1.0]
    mean, variance = combined(gradients, weights)
    expected = sum(w * g for w, g in zip(weights, gradients, strict=True)) / sum(weights)
    assert mean == pytest.approx(expected)
    equal, noise = combined(gradients, [0.2] * 5)
    spread = sum(float(((g - equal) ** 2).sum()) for g in gradients) / 4
    assert noise == pytest.approx(spread / 5)  # of a mean of five
    assert variance > 0
    assert math.isnan(combined(gradients[:1], [1.0])[1])


# ---- the driver's steps ---------------------------------------------------------------------------------------------


def driver(dim=3, start=None, seed=0, **options):
    return build("policy_gradient", dim, np.full(dim, 0.5) if start is None else np.asarray(start), seed, **options)


def tell(searched, *gradients):
    """Tell groups that hold exact gradients."""
    population = searched.ask()
    count = len(population.vectors)
    found = [Rollouts(1.0, np.zeros((count, 1)), [(step(g, ascent=True),)] * count) for g in gradients]
    searched.tell(population, Fitness(np.zeros(count), rollouts=tuple(found)))


def test_steps_are_torchs_adamw():
    options = {"learning_rate": 0.03, "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.95, "clip_norm": 1.5, "ema": 0.7}
    mine = driver(**options)
    theirs = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.AdamW([theirs], lr=0.03, betas=(0.8, 0.95), weight_decay=0.1)
    average = np.full(3, 0.5)
    for _ in range(6):
        gradients = [np.float32(RNG.normal(size=3)).astype(np.float64) for _ in range(2)]
        gradient = (gradients[0] + gradients[1]) / 2
        gradient = gradient * min(1.0, 1.5 / np.linalg.norm(gradient))
        tell(mine, *gradients)
        theirs.grad = torch.from_numpy(-gradient)  # it descends
        adam.step()
        average = 0.7 * average + 0.3 * theirs.detach().numpy()
        assert mine.ask().vectors[0] == pytest.approx(theirs.detach().numpy(), rel=1e-12)
        assert mine.mean == pytest.approx(average, rel=1e-12)


def test_the_rate_falls_in_the_last_share_of_a_stage():
    searched = driver(decay=0.4, exact_learning_rate=0.1, learning_rate=0.2)
    searched.enter(Stage(0, 10, exact=True))
    rates = []
    for generation in range(20):
        if generation == 10:
            searched.enter(Stage(10, 20, exact=False))
        tell(searched, np.ones(3))
        rates.append(searched.diagnostics["learning_rate"])
    shares = [1.0] * 7 + [0.75, 0.5, 0.25]
    assert rates == pytest.approx([0.1 * s for s in shares] + [0.2 * s for s in shares])
    constant = driver(decay=0.0, learning_rate=0.2)
    constant.enter(Stage(0, 2, exact=False))
    for _ in range(2):
        tell(constant, np.ones(3))
        assert constant.diagnostics["learning_rate"] == 0.2


def test_a_stage_begins_anew_where_the_last_one_ended():
    searched = driver(estimator="grpo", passes=3)
    searched.enter(Stage(0, 20, exact=True))
    assert len(searched.ask().vectors) == 1
    assert searched.ask().reference is None
    for _ in range(4):
        tell(searched, np.ones(3))
    at = searched.ask().vectors[0]
    with pytest.raises(ConfigError, match="between ask"):
        searched.enter(Stage(5, 20, exact=False))
    tell(searched, np.zeros(3))
    before = searched._vector()
    searched.enter(Stage(5, 20, exact=False))
    asked = searched.ask()
    assert len(asked.vectors) == 8
    assert np.array_equal(asked.reference, before)
    assert (asked.draw, asked.behaviour) == (5, None)
    assert not np.array_equal(before, at)  # momentum; but now
    tell(searched, np.zeros(3))
    assert np.array_equal(searched._vector(), before)  # there is none left
    searched.enter(Stage(5, 20, exact=False))  # entering again changes nothing
    assert searched.ask().behaviour is not None


def test_what_acts_on_one_head_is_moved_by_exact_gradients_only():
    """And its gradients are not even asked for; those of an older journal hold them, and give the same step."""
    blocks, shared = [np.array([1]), np.array([3])], [0, 2, 4]
    every, few, free = (driver(5, blocks=blocks, rollout_heads=heads) for heads in (False, False, True))
    for one in (every, few, free):
        one.enter(Stage(0, 2, exact=True))
        assert one.ask().learns is None
        tell(one, np.ones(5))
        assert np.all(one.mean != 0.5)
    before = few._vector()
    for one, part in ((every, slice(None)), (few, shared), (free, slice(None))):
        one.enter(Stage(1, 4, exact=False))
        asked = one.ask().learns
        assert asked is None if one is free else asked.tolist() == shared
        for gradient in np.random.default_rng(1).normal(size=(2, 5)):
            tell(one, gradient[part])
    assert every.mean.tobytes() == few.mean.tobytes()
    assert (few._vector() == before).tolist() == [False, True, False, True, False]
    assert np.all(free._vector() != before)


def test_passes_repeat_draw_seeds_and_samples_and_then_move_on():
    searched = driver(estimator="grpo", passes=3, popsize=4)
    searched.enter(Stage(0, 9, exact=False))
    asked = []
    for _ in range(9):
        asked.append(searched.ask())
        tell(searched, RNG.normal(size=3))
    for begin in (0, 3, 6):
        first, *others = asked[begin : begin + 3]
        assert first.draw == begin // 3
        assert first.behaviour is None
        for other in others:
            assert other.draw == first.draw
            assert np.array_equal(other.seeds, first.seeds)
            assert np.array_equal(other.behaviour, first.vectors[0])
            assert not np.array_equal(other.vectors[0], first.vectors[0])
    assert len({tuple(one.seeds) for one in asked}) == 3
    assert [one.generation for one in asked] == list(range(9))


def test_rollouts_without_a_result_are_left_out():
    one, other = driver(), driver()
    whole = parts(one, one.ask(), np.zeros(8))["rollouts"]
    rewards = [group.rewards.copy() for group in whole]
    rewards[0][2:4], rewards[1][:] = np.nan, np.inf
    holes = [Rollouts(g.weight, r, g.steps) for g, r in zip(whole, rewards, strict=True)]
    good = [0, 1, 4, 5, 6, 7]
    one.tell(one.ask(), Fitness(np.zeros(8), rollouts=tuple(holes)))
    left = whole[0]
    gradient = group_gradient(
        Rollouts(1.0, left.rewards[good], [left.steps[i] for i in good]), advantages(left.rewards[good])
    )
    tell(other, gradient)
    assert one.ask().vectors[0] == pytest.approx(other.ask().vectors[0], abs=1e-6)
    with pytest.raises(FitnessError):
        one.tell(one.ask(), Fitness(np.zeros(8), rollouts=(Rollouts(1.0, np.full((8, 1), np.nan), whole[0].steps),)))


def test_options_are_checked():
    for options, message in (
        ({"estimator": "reinforce", "passes": 2}, "grpo"),
        ({"estimator": "ppo"}, "estimator"),
        ({"ema": 1.0}, "ema"),
        ({"learning_rate": 0.0}, "learning_rate"),
    ):
        with pytest.raises(ConfigError, match=message):
            driver(**options)
    searched = driver()
    population = searched.ask()
    with pytest.raises(ConfigError, match="8 rollouts in a group are expected"):
        searched.tell(
            population, Fitness(np.zeros(8), rollouts=(Rollouts(1.0, np.zeros((3, 1)), [(step(np.ones(3)),)] * 3),))
        )


# ---- problems that it solves ----------------------------------------------------------------------------------------


def bandit(searched, rewards):
    """Groups of a softmax policy over arms, drawn by the candidates' seeds; entropy of the policy."""
    population = searched.ask()
    theta = torch.from_numpy(population.vectors[0])
    drawing = theta if population.behaviour is None else torch.from_numpy(population.behaviour)
    p, q = torch.softmax(theta, 0), torch.softmax(drawing, 0)
    found = []
    for number in range(2):
        worth, steps = [], []
        for seed in population.seeds:
            arm = int(np.random.default_rng([seed, number]).choice(len(p), p=q.numpy() / q.numpy().sum()))
            ratio, away = float(p[arm] / q[arm]), torch.eye(len(p))[arm] - p
            high, low = ratio * (ratio <= 1.2) * away, ratio * (ratio >= 0.8) * away
            likely = {"log_prob": float(p[arm].log()), "choices": 1}
            steps.append((step(high.numpy(), low.numpy(), **likely),))
            worth.append([rewards[arm]])
        found.append(Rollouts(0.5, np.array(worth), steps))
    searched.tell(population, Fitness(np.zeros(len(population.vectors)), rollouts=tuple(found)))
    return float(-(p * p.log()).sum())


ESTIMATORS = [{}, {"estimator": "grpo"}, {"baseline": "none", "learning_rate": 0.02}]


@pytest.mark.parametrize("options", ESTIMATORS)
def test_finds_the_best_arm(options):
    searched = driver(5, np.zeros(5), **{"learning_rate": 0.1, **options})
    for _ in range(150):
        bandit(searched, [0.0, 0.2, 1.0, 0.4, -0.5])
    assert np.argmax(searched.mean) == 2
    assert float(torch.softmax(torch.from_numpy(searched.mean), 0)[2]) > 0.6


def test_a_reward_for_chance_keeps_the_policy_open():
    ends = {}
    for entropy in (0.0, 0.5):
        searched = driver(4, np.zeros(4), learning_rate=0.1, entropy=entropy)
        for _ in range(120):
            ends[entropy] = bandit(searched, [0.0, 0.2, 0.4, 0.1])
        assert searched.diagnostics["entropy"] > 0
    assert ends[0.5] > ends[0.0] + 0.3


def test_moves_a_gaussian_policy_to_where_the_reward_is():
    searched = build("policy_gradient", 4, np.full(4, 1.5), 1, learning_rate=0.05)
    for _ in range(150):
        population = searched.ask()
        fitness = sphere(population.vectors)
        tell_policy(searched, population, fitness)
    assert np.linalg.norm(searched.mean) < 0.5 < SPREAD * 4


def test_learns_a_ranking_by_draws_and_exactly():
    """Scores of ten slots from two features; only the first one says what will be needed."""
    g = torch.Generator().manual_seed(0)
    features = torch.randn(10, 2, generator=g, dtype=torch.float64)
    future = torch.exp(2 * features[:, 0])
    costs = {}
    for exact in (False, True):
        searched = driver(2, np.zeros(2), learning_rate=0.1, exact_learning_rate=0.1)
        searched.enter(Stage(0, 60, exact=exact))
        for _ in range(60):
            population = searched.ask()
            theta = torch.from_numpy(population.vectors[0]).requires_grad_(True)
            if exact:
                (gradient,) = torch.autograd.grad(-plackett_luce.expected_cost(features @ theta, future), theta)
                found = Rollouts(1.0, np.zeros((1, 1)), [(step(gradient.numpy(), ascent=True),)])
            else:
                steps, rewards = [], []
                for seed in population.seeds:
                    order = sample_ranking((features @ theta).detach(), torch.Generator().manual_seed(int(seed)))
                    (gradient,) = torch.autograd.grad(log_prob(features @ theta, order), theta)
                    steps.append((step(gradient.numpy()),))
                    rewards.append([-float(plackett_luce.trace_cost(future, order))])
                found = Rollouts(1.0, np.array(rewards), steps)
            searched.tell(population, Fitness(np.zeros(len(population.vectors)), rollouts=(found,)))
        costs[exact] = float(plackett_luce.expected_cost(features @ torch.from_numpy(searched.mean), future))
    start = float(plackett_luce.expected_cost(torch.zeros(10, dtype=torch.float64), future))
    assert all(cost < 1 + 0.35 * (start - 1) for cost in costs.values())


def test_diagnostics_are_of_the_rollouts():
    searched = driver()
    searched.enter(Stage(0, 3, exact=False))
    population = searched.ask()
    gradients = RNG.normal(size=(2, 8, 3))
    found = [
        Rollouts(0.5, RNG.normal(size=(8, 1)),
                 [(step(g, log_prob=-6.0, reference=-8.0, choices=4, clipped=0.25),) for g in part])
        for part in gradients
    ]  # fmt: skip
    searched.tell(population, Fitness(np.zeros(8), rollouts=tuple(found)))
    told, means = searched.diagnostics, [group_gradient(g, advantages(g.rewards)) for g in found]
    mean = sum(means) / 2
    noise = sum(float(((m - mean) ** 2).sum()) for m in means) / 2
    assert told["gradient_norm"] == pytest.approx(np.linalg.norm(mean))
    assert told["gradient_noise"] == pytest.approx(math.sqrt(noise))
    assert (told["entropy"], told["kl"], told["clipped"]) == (1.5, 0.5, 0.25)
