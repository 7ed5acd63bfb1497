"""What rankings cost: the closed form against draws, readings against traces, sums against loops; and gradients."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from evomem.errors import ConfigError
from evomem.evaluation import EvaluationProtocol, Evaluator
from evomem.evaluation.costs import ORACLE, ranking_costs
from evomem.evaluation.future import sample_key
from evomem.evaluation.measurement import Step
from evomem.evaluation.rollouts import DrawnRows, sample_number
from evomem.evaluation.traces.store import Traces
from evomem.managers import build, plackett_luce
from evomem.managers.stochastic import Noise
from evomem.managers.vector import load_vector, to_vector, vector_size
from evomem.statistics import leave_one_out
from tests.evaluation.test_traces import FEATURES, Words, load, recorded


@pytest.fixture(scope="module")
def evaluator():
    return Evaluator(load())


SAMPLE = Words().samples("train", 1, 0)[0]
SHORT = Words(14).samples("train", 1, 1)[0]


def policy(seed=0, size=0.5, kind="kv_policy", **options):
    found = build(kind, **{"features": list(FEATURES), "budget": 8, "sinks": 0, "recent": 0, **options})
    load_vector(found, size * np.random.default_rng(seed).normal(size=vector_size(found)))
    return found.requires_grad_(False)


def context(evaluator, manager, sample=SAMPLE):
    """Views and future attention, as the evaluator has them."""
    tokens = evaluator.tokens(sample)
    views = evaluator.reading(tokens.read, manager.observes).views
    return views, evaluator.future.of(evaluator, tokens, sample_key(tokens), manager.observes).peak


def table(evaluation):
    return np.array(evaluation.values["head_cost"])


def slow_scores(manager, view, h):
    scores = manager.score(view)[0, h].double().tolist()
    o, slots = manager.options, len(scores)
    return [math.inf if i < o.sinks or i >= slots - o.recent else s for i, s in enumerate(scores)]


ENDS = [{}, {"sinks": 2, "recent": 3}]


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("kind", ["kv_policy", "feature_scorer"])
def test_costs_are_sums_over_places(evaluator, kind, ends):
    """``sorted`` by sorting and adding up, ``expected`` by the probability of every pair; in Python numbers."""
    manager = policy(1, kind=kind, **ends)
    views, futures = context(evaluator, manager)
    found = {how: table(ranking_costs(evaluator, [manager], SAMPLE, how)[0]) for how in ("sorted", "expected")}
    for view, future in zip(views, futures, strict=True):
        for h in range(view.slots.shape[1]):
            f, s = future[0, h].double().tolist(), slow_scores(manager, view, h)
            best = sum(place * x for place, x in enumerate(sorted(f, reverse=True), start=1))
            order = sorted(range(len(f)), key=lambda i: (-s[i], i))
            cost = sum(place * f[i] for place, i in enumerate(order, start=1)) / best
            assert found["sorted"][view.layer, h] == pytest.approx(cost, abs=2e-5)

            def before(j, i, s=s):
                if s[i] == s[j] == math.inf:
                    return 0.5
                return 1.0 if s[j] == math.inf else 0.0 if s[i] == math.inf else 1 / (1 + math.exp(s[i] - s[j]))

            ranks = [1 + sum(before(j, i) for j in range(len(f)) if j != i) for i in range(len(f))]
            cost = sum(x * rank for x, rank in zip(f, ranks, strict=True)) / best
            assert found["expected"][view.layer, h] == pytest.approx(cost, abs=2e-5)


@pytest.mark.parametrize("ends", ENDS)
def test_expected_cost_is_the_mean_of_drawn_costs(evaluator, ends):
    manager, count = policy(2, **ends), 2000
    expected = table(ranking_costs(evaluator, [manager], SHORT, "expected")[0])
    drawn = np.array(
        [table(e) for e in ranking_costs(evaluator, [manager] * count, SHORT, "drawn", seeds=range(count))]
    )
    error = drawn.std(0) / math.sqrt(count)
    assert np.all(np.abs(drawn.mean(0) - expected) < 4 * error + 2e-5)
    assert np.all(error > 0)


def test_the_exact_gradient_is_the_slope_of_the_expected_cost(evaluator):
    """In every parameter, hidden units too; by central differences."""
    for kind, options in (("kv_policy", {"hidden": 2, "sinks": 1}), ("feature_scorer", {"allocation": 2})):
        manager = policy(3, kind=kind, **options)
        (found,) = ranking_costs(evaluator, [manager], SAMPLE, "expected", gradient=True)
        (step,) = found.steps
        gradient, vector = Step.numbers(step.gradient), to_vector(manager)
        assert step.ascent
        assert gradient.shape == vector.shape
        rng = np.random.default_rng(0)
        for _ in range(4):
            along, ends = rng.normal(size=len(vector)), []
            for move in (0.05, -0.05):
                load_vector(manager, vector + move * along)
                ends.append(-float(table(ranking_costs(evaluator, [manager], SAMPLE, "expected")[0]).mean()))
            assert gradient @ along == pytest.approx((ends[0] - ends[1]) / 0.1, rel=0.03, abs=1e-3)
        load_vector(manager, vector)


def estimates(evaluator, manager, sample, count, size=8):
    """The estimate of every group of draws: with the group's baseline, and without one; and the exact gradient.

    (groups, parameters) each. Here the gradient of the likelihood is autograd's of the whole group, head by head.
    """
    views, futures = context(evaluator, manager, sample)
    heads = sum(view.slots.shape[1] for view in views)
    groups = count // size
    with_baseline, without = torch.zeros(groups, vector_size(manager)), torch.zeros(groups, vector_size(manager))
    for view, future in zip(views, futures, strict=True):
        noise = Noise.of([(seed, 7, 0) for seed in range(count)], view)
        action = manager.draw(view, noise)
        rewards = -plackett_luce.trace_cost(future.expand(count, -1, -1), action.ranking)
        baselined = leave_one_out(rewards.view(groups, size, -1).transpose(0, 1)).transpose(0, 1)
        rows = DrawnRows(view, action, count)
        for weights, total in ((baselined.reshape(count, -1), with_baseline), (rewards, without)):
            gradient, _ = rows.gradient(manager, weights / heads)
            total += gradient.view(groups, size, -1).mean(1)
    (exact,) = ranking_costs(evaluator, [manager], sample, "expected", gradient=True)
    return with_baseline.double(), without.double(), torch.from_numpy(Step.numbers(exact.steps[0].gradient))


def test_sampled_gradients_reach_the_closed_form_with_half_the_variance(evaluator):
    """20,000 rankings of every head of a context that a model read."""
    names = ["key_norm", "age", "attention_per_query"]
    manager = policy(0, 1.5, features=names, hidden=0, knots=1, budget=None)
    mine, rough, exact = estimates(evaluator, manager, SHORT, 20_000)
    assert float((mine.mean(0) - exact).norm() / exact.norm()) < 0.02
    spread = [float(one.var(0).sum()) for one in (mine, rough)]
    assert spread[0] < 0.5 * spread[1]
    assert float((rough.mean(0) - exact).norm()) < 5 * math.sqrt(spread[1] / len(rough))  # unbiased, but rougher


@pytest.mark.parametrize("ends", ENDS)
def test_a_call_is_a_group_with_its_own_baseline(evaluator, ends):
    """The steps of eight rankings: advantages by loops, gradients of the likelihood by autograd, one at a time."""
    manager, seeds = policy(4, hidden=2, **ends), [11, 12, 13, 14, 15, 16, 17, 18]
    found = ranking_costs(evaluator, [manager] * 8, SAMPLE, "drawn", seeds=seeds, gradient=True)
    views, _ = context(evaluator, manager)
    whole = manager.with_options(budget=None).requires_grad_(True)
    parameters, heads = list(whole.parameters()), sum(view.slots.shape[1] for view in views)
    tables = np.array([table(e) for e in found])
    for place, seed in enumerate(seeds):
        total, likely = np.zeros(vector_size(manager)), 0.0
        others = tables[[k for k in range(8) if k != place]].mean(0)
        for view in views:
            noise = Noise.of([(seed, sample_number(SAMPLE.id), 0)], view)
            log_prob = whole.log_prob(view, whole.draw(view, noise))[0]
            likely += float(log_prob.detach().sum())
            for h in range(view.slots.shape[1]):
                advantage = (others[view.layer, h] - tables[place, view.layer, h]) / heads
                parts = torch.autograd.grad(log_prob[h], parameters, retain_graph=True, allow_unused=True)
                flat = [torch.zeros_like(p) if g is None else g for g, p in zip(parts, parameters, strict=True)]
                total += advantage * torch.cat([g.flatten() for g in flat]).double().numpy()
        (step,) = found[place].steps
        assert step.ascent
        assert Step.numbers(step.gradient) == pytest.approx(total, rel=1e-2, abs=2e-4)
        assert step.log_prob == pytest.approx(likely, rel=1e-4)


def test_costs_on_traces_are_those_on_readings(tmp_path):
    """Up to the 11 bits that traces keep; no token is read, and the oracle's numbers come with both."""
    loaded = load()
    recorded(loaded, tmp_path, samples=2)
    read, known = Evaluator(loaded), Evaluator(loaded)
    known.traces = Traces.open(tmp_path)
    manager = policy(5, sinks=1)
    for sample in Words().samples("train", 2, 0):
        for how in ("expected", "sorted"):
            options = {"gradient": how == "expected", "oracle": True}
            (one,), (other,) = (ranking_costs(e, [manager], sample, how, **options) for e in (read, known))
            # Sorted, two slots whose scores are all but the same may change places.
            assert table(other) == pytest.approx(table(one), rel=2e-3 if how == "expected" else 2e-2)
            assert other.tokens == 0
            assert other.slots == one.slots == 8
            assert other.values.keys() == one.values.keys() == {"head_cost", *ORACLE}
            for name in ORACLE:
                value = one.values[name]
                assert other.values[name] == pytest.approx(value, abs=0.02)
        exact, same = (Step.numbers(ranking_costs(e, [manager], sample, "expected", gradient=True)[0].steps[0].gradient)
                       for e in (read, known))  # fmt: skip
        assert np.linalg.norm(exact - same) < 0.01 * np.linalg.norm(exact)
    fresh = replace(SAMPLE, context=SAMPLE.context + " the cat")
    assert ranking_costs(known, [manager], fresh, "expected")[0].tokens > 0  # not recorded: read


def test_oracle_numbers_are_what_they_say(evaluator):
    manager = policy(6)
    (found,) = ranking_costs(evaluator, [manager], SAMPLE, "expected", oracle=True)
    views, futures = context(evaluator, manager)
    found_by_scipy = [
        stats.spearmanr(manager.score(view)[0, h].numpy(), future[0, h].numpy()).statistic
        for view, future in zip(views, futures, strict=True)
        for h in range(view.slots.shape[1])
    ]
    assert found.values["rank_correlation"] == pytest.approx(np.mean(found_by_scipy), abs=1e-4)
    sorted_cost = table(ranking_costs(evaluator, [manager], SAMPLE, "sorted")[0]).mean()
    assert found.values["sorted_cost"] == pytest.approx(sorted_cost, abs=1e-4)
    assert 0 <= found.values["good_decisions"] <= 1
    best = build("kv_policy", features=["age"], budget=8)
    assert ranking_costs(evaluator, [best], SAMPLE, "expected")[0].values.keys() == {"head_cost"}


def test_what_has_no_cost_is_refused(evaluator):
    streaming = Evaluator(evaluator.loaded, EvaluationProtocol(kind="streaming", every=16))
    with pytest.raises(ConfigError, match="compress_once"):
        ranking_costs(streaming, [policy()], SAMPLE, "expected")
    with pytest.raises(ConfigError, match="stochastic"):
        ranking_costs(evaluator, [build("knorm", budget=8)] * 2, SAMPLE, "drawn", seeds=[1, 2])
    with pytest.raises(ConfigError, match="stochastic"):
        ranking_costs(evaluator, [policy()] * 2, SAMPLE, "drawn", seeds=[1])
    with pytest.raises(ConfigError, match="evict"):
        ranking_costs(evaluator, [policy(actions=["store"])] * 2, SAMPLE, "drawn", seeds=[1, 2])
    assert ranking_costs(evaluator, [], SAMPLE, "expected") == []
