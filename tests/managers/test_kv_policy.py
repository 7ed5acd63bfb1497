"""The policy that evicts, stores and forgets against plain loops over one head at a time; its draws; its plug-ins."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy import stats

from evomem import plugins
from evomem.errors import ConfigError
from evomem.evaluation import PopulationPolicy
from evomem.managers import build
from evomem.managers.learned.kv_policy import SPREAD, KVPolicy
from evomem.managers.stochastic import Action, Noise
from evomem.managers.vector import load_vector, to_vector
from evomem.search_space.space import SearchSpace, SpaceConfig
from tests.managers.test_features import ALL, spoiled, view_of
from tests.support.ragged_view import HEADS, alone
from tests.support.slow_policy import Slow, heads, marked, unscaled

NAMES = ("key_norm", "keydiff", "age", "attention_per_query", "mean:3:keydiff", "max:7:value_norm")
ACTIONS = ("evict", "store", "forget")
SUBSETS = [subset for count in (1, 2, 3) for subset in combinations(ACTIONS, count)]
every_subset = pytest.mark.parametrize("actions", SUBSETS, ids="+".join)
VARIANTS = [
    {"budget": 11},
    {"budget": 11, "sinks": 2, "recent": 3, "hidden": 0, "knots": 3},
    {"budget": 0.4, "sinks": 1, "recent": 9, "layers": 4, "heads": HEADS, "scale": "model"},
    {"budget": 3, "sinks": 4, "recent": 2, "layers": 3, "heads": HEADS + 2},
]
every_variant = pytest.mark.parametrize("options", VARIANTS)


def randomised(policy, seed=0, size=0.4):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=g))
        policy.feature_mean.copy_(torch.randn(policy.feature_mean.shape, generator=g))
        policy.feature_deviation.copy_(torch.rand(policy.feature_mean.shape, generator=g) + 0.5)
    return policy.requires_grad_(False)


def made(actions=ACTIONS, seed=0, **options):
    return randomised(KVPolicy(features=NAMES, actions=actions, **options), seed)


def looked_at(seed=0, layer=2, fresh=15):
    return replace(view_of(seed, layer=layer), fresh=fresh)


def drawn(policy, view, *seeds):
    return policy.draw(view, Noise.of([(seed, 0) for seed in seeds], view))


# ---- deployed -------------------------------------------------------------------------------------------------------


@every_subset
@every_variant
def test_decides_as_plain_loops_do(actions, options):
    if "layers" in options and "evict" not in actions:
        options = {k: v for k, v in options.items() if k not in ("layers", "heads")}
    for seed in range(2):
        view, policy = looked_at(seed), made(actions, seed, **options)
        decision, outputs = policy.decide(view), policy.outputs(view)
        for b, h in heads():
            slow = Slow(policy, view, b, h)
            assert outputs.keys() == slow.outputs.keys()
            for name, found in slow.outputs.items():
                assert outputs[name][b, h, slow.held].tolist() == pytest.approx(found, abs=2e-4)
            assert marked(decision.keep, b, h) == slow.deployed()
            if "forget" in actions:
                decay = decision.decay[b, h, slow.held].tolist()
                assert decay == pytest.approx([-math.exp(min(o, 4.0)) for o in slow.outputs["forget"]], rel=1e-3)
        assert (decision.decay is None) == ("forget" not in actions)
        again = policy.decide(spoiled(view))
        assert torch.equal(again.keep, decision.keep)


@every_subset
def test_keeps_the_budget_and_the_ends(actions):
    view = looked_at()
    for seed in range(4):
        policy = made(actions, seed, budget=9, sinks=2, recent=3)
        drawing = policy.carry_out(view, drawn(policy, view, seed, 77))
        for keep in (policy.decide(view).keep, drawing.keep):
            assert torch.all(keep.sum(-1) <= 9)
            assert not torch.any(keep & ~view.valid)
            if "store" not in actions:
                assert torch.equal(keep.sum(-1), view.valid.sum(-1).clamp(max=9))
                assert torch.all(keep[view.valid & ((view.position < 2) | (view.age < 3))])


def test_a_refused_token_leaves_its_place_to_the_next_best():
    view, policy = looked_at(), made(("store", "evict"), budget=10)
    plain = made(("evict",), budget=10)
    with torch.no_grad():
        policy.weights[1], policy.outer[1] = plain.weights[0], plain.outer[0]
        for name in ("inner", "by_depth", "bias"):
            getattr(policy, name).copy_(getattr(plain, name))
    refused = view.valid & (view.age < view.fresh) & (policy.admit(view) < 0)
    keep, free = policy.decide(view).keep, plain.decide(view).keep
    assert torch.any(free & refused)
    assert not torch.any(keep & refused)
    assert torch.equal(keep.sum(-1), (view.valid & ~refused).sum(-1).clamp(max=10))
    assert torch.all(keep[free & ~refused])  # whoever was good enough is still


# ---- drawn ----------------------------------------------------------------------------------------------------------


@every_subset
@every_variant
def test_draws_likelihood_and_decisions_as_plain_loops_do(actions, options):
    if "layers" in options and "evict" not in actions:
        options = {k: v for k, v in options.items() if k not in ("layers", "heads")}
    view, policy = looked_at(3), made(actions, 5, **options)
    action = drawn(policy, view, 1, 2)
    assert set(action.tensors()) == {{"evict": "ranking", "store": "stored", "forget": "rates"}[a] for a in actions}
    decision, found, each_choice, choices = (
        policy.carry_out(view, action),
        policy.log_prob(view, action),
        policy.log_probs(view, action),
        policy.choices(view, action),
    )
    for b, h in heads():
        slow = Slow(policy, view, b, h)
        expected, count = slow.log_prob(action)
        assert float(found[b, h]) == pytest.approx(expected, rel=1e-4, abs=1e-3)
        assert int(choices[b, h]) == count
        each = [value for value in each_choice[b, h].tolist() if value]  # 0 is no choice, or one without alternative
        assert each == pytest.approx(
            [value for value in slow.log_probs(action) if abs(value) > 1e-12], rel=1e-3, abs=1e-4
        )
        assert marked(decision.keep, b, h) == slow.drawn(action)
        if action.rates is not None:
            assert torch.equal(decision.decay, -torch.exp(action.rates.clamp(max=4)))
    dirty = spoiled(view)
    torch.testing.assert_close(policy.log_prob(dirty, action), found)


def test_gradient_of_the_likelihood_is_that_of_the_plain_loops():
    """Central differences of the slow path in double precision, along random directions."""
    view = looked_at(1)
    policy = made(budget=8, sinks=1, recent=2, layers=4, heads=HEADS)
    action = drawn(policy, view, 3, 4)
    policy.requires_grad_(True)
    parameters = dict(policy.named_parameters())
    g = torch.Generator().manual_seed(0)
    for b, h in ((0, 1), (1, 2)):
        found = torch.autograd.grad(policy.log_prob(view, action)[b, h], list(parameters.values()))
        for _ in range(3):
            along = {n: torch.randn(p.shape, generator=g).double().numpy() for n, p in parameters.items()}

            def moved(step, along=along, b=b, h=h):
                there = {n: p.detach().double().numpy() + step * along[n] for n, p in parameters.items()}
                return Slow(policy, view, b, h, there).log_prob(action)[0]

            slope = (moved(1e-4) - moved(-1e-4)) / 2e-4
            mine = sum(
                float((x.double() * torch.from_numpy(along[n])).sum()) for n, x in zip(along, found, strict=True)
            )
            assert mine == pytest.approx(slope, rel=2e-3, abs=2e-3)


def tiny_view():
    """One row, one head, four tokens, three of them new."""
    whole = alone(view_of(layer=2), 0)

    def cut(x):
        return x[:, :1, -4:]

    recorded = {n: cut(x) for n, x in whole.recorded.items() if n.startswith(("attention_", "window_"))}
    return replace(
        whole, keys=cut(whole.keys), values=cut(whole.values), slots=torch.tensor([[[0, 2, 3, 5]]]), seen=6, fresh=5,
        recorded=recorded,
    )  # fmt: skip


def test_draws_are_as_frequent_as_they_are_likely():
    """Store and evict together: every outcome, its share among 6,000 draws, and its likelihood."""
    view, policy, count = tiny_view(), made(("store", "evict"), 2, budget=2), 6000
    noise = Noise.of([(seed,) for seed in range(count)], view)
    action = policy.draw(view, noise)
    fresh = view.age[0, 0] < view.fresh
    assert fresh.tolist() == [False, True, True, True]
    able = (action.stored[:, 0] | ~fresh).sum(-1)
    outcomes, first = [], {}
    for row in range(count):
        picks = tuple(action.ranking[row, 0, : min(2, int(able[row]))].tolist())
        outcomes.append((tuple(action.stored[row, 0, 1:].tolist()), picks))
        first.setdefault(outcomes[-1], row)
    seen = Counter(outcomes)
    rows = torch.tensor(list(first.values()))
    parts = Action(ranking=action.ranking[rows], stored=action.stored[rows])
    likely = policy.log_prob(view, parts).exp()[:, 0].double().numpy()
    often = np.array([seen[outcome] for outcome in first])
    assert len(first) > 30
    assert likely.sum() == pytest.approx(1, abs=0.02)  # the few that did not come up are rare
    usual = likely * count > 5
    assert stats.chisquare(often[usual], likely[usual] / likely[usual].sum() * often[usual].sum()).pvalue > 0.001


def test_drawn_rates_are_normal_around_the_mean_and_all_parts_are_independent():
    view, policy = tiny_view(), made(ACTIONS, 2, budget=2)
    action = policy.draw(view, Noise.of([(seed,) for seed in range(3000)], view))
    z = (action.rates - policy.outputs(view)["forget"]) / SPREAD
    for slot in range(4):
        assert stats.kstest(z[:, 0, slot].numpy(), "norm").pvalue > 0.001
    newest_stored, first = action.stored[:, 0, 3].float(), (action.ranking[:, 0, 0] == 0).float()
    for one, other in combinations([z[:, 0, 0], z[:, 0, 1], newest_stored], 2):
        assert abs(float(torch.corrcoef(torch.stack((one, other)))[0, 1])) < 0.08
    assert abs(float(torch.corrcoef(torch.stack((z[:, 0, 0], first)))[0, 1])) < 0.08


@every_subset
def test_a_row_draws_alone_as_in_company(actions):
    """Whatever its padding, the other rows, and the slots that only other rows fill."""
    view, policy = looked_at(2), made(actions, 1, budget=9, sinks=1, recent=1)
    together = drawn(policy, view, 11, 12)
    decision, likely = policy.carry_out(view, together), policy.log_prob(view, together)
    for row, seed in enumerate((11, 12)):
        one = alone(view, row)
        own = drawn(policy, one, seed)
        width = one.slots.shape[2]
        mine = policy.carry_out(one, own)
        assert torch.equal(mine.keep[0], decision.keep[row, :, -width:])
        if own.stored is not None:
            assert torch.equal((own.stored & one.valid)[0], (together.stored & view.valid)[row, :, -width:])
        if own.rates is not None:
            torch.testing.assert_close(mine.decay[0][one.valid[0]], decision.decay[row, :, -width:][one.valid[0]])
        torch.testing.assert_close(policy.log_prob(one, own)[0], likely[row], rtol=1e-4, atol=1e-4)
    other = policy.carry_out(view, drawn(policy, view, 11, 13))
    assert torch.equal(other.keep[0], decision.keep[0])  # its neighbour's seed is nothing to it
    if other.decay is None:
        assert not torch.equal(other.keep[1], decision.keep[1])


def test_noise_is_a_function_of_the_seed_alone():
    view = looked_at()
    one, same = (Noise.of([(1, 2, 3), (1, 2, 4)], view).uniform for _ in range(2))
    assert torch.equal(one, same)
    assert not torch.equal(one[0, :, :, 7:], one[1, :, :, 7:])
    unlike = [Noise.of([seed, seed], view).uniform[0] for seed in ((1, 2), (2, 1), (1,), (-1, 2), (1 << 63, 2))]
    for a, b in combinations(unlike, 2):
        assert abs(float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1])) < 0.2
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Noise.of([(1,), (2,)], view)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("actions", [s for s in SUBSETS if "forget" not in s], ids="+".join)
def test_without_temperature_a_draw_is_the_deployed_decision(actions):
    view, policy = looked_at(4), made(actions, 3, budget=10, sinks=1, recent=2)
    expected = policy.decide(view).keep
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name in ("weights", "outer", "offset"):
                parameter.mul_(1e6)
    for seed in range(3):
        assert torch.equal(policy.carry_out(view, drawn(policy, view, seed, seed + 9)).keep, expected)


# ---- statistics, vectors, plug-ins ----------------------------------------------------------------------------------


def test_calibration_is_mean_and_deviation_of_all_slots():
    policy = KVPolicy(features=NAMES, scale="model")
    views = [view_of(seed, layer=layer) for seed in (0, 1) for layer in (0, 2)]
    policy.calibrate(iter(views))
    for place, name in enumerate(NAMES):
        values = np.concatenate([unscaled(name, view, b, h) for view in views for b, h in heads()])
        assert float(policy.feature_mean[place]) == pytest.approx(values.mean(), rel=1e-4, abs=1e-4)
        assert float(policy.feature_deviation[place]) == pytest.approx(values.std(), rel=1e-3)
    with pytest.raises(ConfigError, match="no slot"):
        policy.calibrate([])
    assert KVPolicy.calibrates


@every_variant
def test_plugins_vectors_and_options_carry_everything_over(options, tmp_path):
    policy = made(ACTIONS, **options)
    plugins.save(policy, tmp_path / "plugin", {})
    loaded = plugins.load(tmp_path / "plugin")
    other = policy.with_options(budget=5).with_options(budget=options["budget"])
    vector = KVPolicy(**policy.options.model_dump())
    load_vector(vector, to_vector(policy))
    vector.feature_mean.copy_(policy.feature_mean)
    vector.feature_deviation.copy_(policy.feature_deviation)
    view = looked_at()
    for found in (loaded, other, vector):
        assert found.describe() == policy.describe()
        mine, theirs = policy.state_dict(), found.state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        one, same = policy.decide(view), found.decide(replace(view, memo={}))
        assert torch.equal(one.keep, same.keep)
        assert torch.equal(one.decay, same.decay)


def test_search_space_knows_its_vector_and_its_gradient():
    weights = [{"match": "inner", "scale": 0.5}, {"match": "weights", "scale": 2.0}, {"match": "offset"}]
    options = {"features": list(NAMES), "actions": list(ACTIONS), "budget": 9, "hidden": 3}
    space = SearchSpace(SpaceConfig(manager={"name": "kv_policy", "options": options}, weights=weights, start="zeros"))
    vector = np.random.default_rng(0).normal(size=space.dim)
    policy = space.decode(vector)
    assert space.encode(policy) == pytest.approx(vector, rel=1e-6)
    view, along = looked_at(), np.random.default_rng(1).normal(size=space.dim)
    action = drawn(policy, view, 1, 2)
    policy.requires_grad_(True)
    parts = torch.autograd.grad(policy.log_prob(view, action).sum(), list(policy.parameters()))
    gradient = space.gradient(torch.cat([part.flatten() for part in parts]).double().numpy())
    ends = [float(space.decode(vector + step * along).log_prob(view, action).sum()) for step in (1e-3, -1e-3)]
    assert gradient @ along == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=0.02)


@every_subset
def test_population_equals_each_alone(actions):
    crowd = [made(actions, n, budget=11, sinks=2, recent=2) for n in range(4)]
    view = alone(looked_at(), 1)
    found = PopulationPolicy(crowd).decide(view)
    for place, policy in enumerate(crowd):
        one = policy.decide(replace(view, memo={}))
        assert torch.equal(found.keep[place], one.keep[0])
        if "forget" in actions:
            torch.testing.assert_close(found.decay[place], one.decay[0])


def test_what_it_begins_with():
    """Everything is stored and all but nothing fades; the network is silent, and no two units are alike."""
    view = looked_at()
    policy = KVPolicy(features=ALL, actions=ACTIONS, budget=12)
    assert torch.all(policy.score(view) == 0)
    assert torch.all(policy.admit(view) > 2)
    assert torch.all(policy.decay(view) > -0.01)
    assert torch.equal(policy.decide(view).keep.sum(-1), view.valid.sum(-1).clamp(max=12))
    assert len({tuple(row) for row in policy.inner.tolist()}) == policy.options.hidden


def test_options_are_checked():
    for wrong in ({"layers": 3}, {"heads": 3}):
        with pytest.raises(ConfigError, match="layers and heads"):
            KVPolicy(**wrong)
    for actions in ([], ["evict", "evict"], ["drop"]):
        with pytest.raises(ConfigError, match="actions"):
            KVPolicy(actions=actions)
    with pytest.raises(ConfigError, match="at least one feature"):
        KVPolicy(features=[])
    with pytest.raises(ConfigError, match="nonsense"):
        KVPolicy(features=["nonsense"])
    with pytest.raises(ConfigError, match="one and the same"):
        build("kv_policy(features=[recency, age, recency])")
    assert build("kv_policy(features=[age, sink])").observes == frozenset()
