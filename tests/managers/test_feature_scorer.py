"""Managers: the scorer that is made of features: weights over depth and heads, starts, budgets over layers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomem import plugins
from evomem.errors import ConfigError
from evomem.evaluation import PopulationPolicy
from evomem.managers import FeatureScorer, build
from evomem.managers.allocation import DepthShares
from evomem.managers.features import LINEAR_20, features
from evomem.managers.learned.feature_scorer import interpolate
from evomem.managers.selection import Ends, slots_of_budget
from tests.managers.test_features import ALL, slow_observation, spoiled, view_of
from tests.support.ragged_view import HEADS, START, alone


def randomised(scorer, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    return scorer


def test_options_are_checked():
    with pytest.raises(ConfigError, match="at least one feature"):
        FeatureScorer(features=[])
    for same in (["recency", "recency"], ["mean:1:keydiff", "age", "keydiff"], ["max:3:age", "max:03:age"]):
        with pytest.raises(ConfigError, match=f"features '{same[0]}' and '{same[-1]}' are one and the same"):
            FeatureScorer(features=same)
    FeatureScorer(features=["keydiff", "mean:3:keydiff", "max:3:keydiff", "max:5:keydiff"])
    for wrong in ({"layers": 3}, {"heads": 3}):
        with pytest.raises(ConfigError, match="layers and heads"):
            FeatureScorer(**wrong)
    with pytest.raises(ConfigError, match="knots"):
        FeatureScorer(knots=0)


def test_observes_what_its_features_need():
    assert FeatureScorer(features=["keydiff", "age"]).observes == set()
    assert FeatureScorer(features=list(LINEAR_20)).observes == {
        "attention_sum", "attention_spectrum", "window_attention:32"
    }  # fmt: skip


@given(
    values=st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=9),
    place=st.floats(-0.2, 1.2),
)
def test_knots_are_interpolated(values, place):
    found = interpolate(torch.tensor(values, dtype=torch.float64)[:, None], place)
    expected = np.interp(place, np.linspace(0, 1, len(values)), values) if len(values) > 1 else values[0]
    assert float(found) == pytest.approx(float(expected), abs=1e-9)


@pytest.mark.parametrize(("layer", "layers"), [(0, 4), (2, 4), (3, 4), (0, 1)])
def test_two_knots_are_a_slope(layer, layers):
    """Score = Σ (w + d u) x, d the relative depth in [-1/2, 1/2]; a model of one layer has the first knot's weights."""
    view = view_of(layer=layer, layers=layers)
    w, u = torch.randn(2, len(ALL))
    scorer = FeatureScorer(features=ALL)
    with torch.no_grad():
        scorer.weights.copy_(torch.stack((w - u / 2, w + u / 2)))
    depth = layer / (layers - 1) - 0.5 if layers > 1 else -0.5
    expected = (features(view, ALL) * (w + depth * u)).sum(-1)
    torch.testing.assert_close(scorer.score(view), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", range(4))
def test_weights_per_head_are_added(layer):
    view, names = view_of(layer=layer), ALL[:6]
    scorer = randomised(FeatureScorer(features=names, knots=1, layers=4, heads=HEADS))
    x = features(view, names)
    for h in range(HEADS):
        expected = x[:, h] @ (scorer.weights[0] + scorer.own[layer, h])
        torch.testing.assert_close(scorer.score(view)[:, h], expected, atol=1e-4, rtol=1e-4)


def test_weights_per_head_on_another_model():
    """Another number of layers: interpolated in depth; of heads: their mean."""
    view, names = view_of(layer=2, layers=5), ALL[:6]
    x = features(view, names)
    scorer = randomised(FeatureScorer(features=names, knots=1, layers=3, heads=HEADS))
    own = scorer.own[1]
    for h in range(HEADS):
        expected = x[:, h] @ (scorer.weights[0] + own[h])
        torch.testing.assert_close(scorer.score(view)[:, h], expected, atol=1e-4, rtol=1e-4)
    scorer = randomised(FeatureScorer(features=names, knots=1, layers=3, heads=HEADS + 2))
    expected = x @ (scorer.weights[0] + scorer.own[1].mean(0))
    torch.testing.assert_close(scorer.score(view), expected, atol=1e-4, rtol=1e-4)


def test_hidden_units_in_plain_loops():
    view, names = view_of(layer=1), ALL[:5]
    scorer = randomised(FeatureScorer(features=names, knots=2, hidden=3)).requires_grad_(False)
    x, found = features(view, names).tolist(), scorer.score(view)
    place = 1 / 3

    def at(knots):
        return [(1 - place) * a + place * b for a, b in zip(*knots.tolist(), strict=True)]

    weights, outer = at(scorer.weights), at(scorer.outer)
    for b, h, s in [(0, 0, 5), (1, 2, 39), (0, 2, 30)]:
        own = x[b][h][s]
        total = sum(w * f for w, f in zip(weights, own, strict=True))
        for unit in range(3):
            inner = sum(w * f for w, f in zip(scorer.inner[unit].tolist(), own, strict=True))
            total += outer[unit] * math.tanh(inner + float(scorer.bias[unit]))
        assert float(found[b, h, s]) == pytest.approx(total, abs=1e-4)


# ---- starting from a heuristic --------------------------------------------------------------------------------------


@pytest.mark.parametrize("heuristic", sorted(set(FeatureScorer.STARTS) - {"snapkv"}))
@pytest.mark.parametrize("knots", [1, 3])
def test_start_ranks_as_the_heuristic(heuristic, knots):
    names = [*LINEAR_20, "value_step", "recency", "frequency"]
    scorer = FeatureScorer.start_from(heuristic, features=names, knots=knots, sinks=0, recent=0)
    other = build(heuristic)
    for seed, layer in ((0, 0), (1, 3)):
        view = view_of(seed, layer=layer)
        mine, theirs = scorer.score(view), other.score(view)
        for b in range(len(START)):
            for h in range(HEADS):
                valid = view.valid[b, h]
                order = theirs[b, h, valid].argsort(stable=True)
                assert torch.all(mine[b, h, valid][order].diff() > 0)


def test_start_of_snapkv_is_its_window_with_the_largest_neighbour():
    view = view_of()
    scorer = FeatureScorer.start_from("snapkv", features=list(LINEAR_20))
    mine = scorer.score(view)
    for b in range(len(START)):
        for h in range(HEADS):
            expected = torch.tensor(slow_observation("window", "32", view, b, h))
            own = mine[b, h, view.valid[b, h]]
            greater = expected[:, None] > expected + 1e-4
            assert torch.all((own[:, None] > own)[greater])


def test_start_protects_the_ends_besides():
    view = view_of()
    kept = FeatureScorer.start_from("keydiff", features=["keydiff"], budget=10, sinks=2, recent=3).decide(view).keep
    plain = build("keydiff(budget=10)").decide(view).keep
    ends = view.valid & ((view.position < 2) | (view.age < 3))
    assert torch.all(kept[ends])
    assert torch.equal(kept.sum(-1), plain.sum(-1))
    assert torch.all(plain[kept & ~ends])  # everything else that is kept, keydiff keeps too


def test_start_says_what_it_cannot_do():
    with pytest.raises(ConfigError, match=r"tova.*keydiff"):
        FeatureScorer.start_from("tova")
    with pytest.raises(ConfigError, match="'attention'"):
        FeatureScorer.start_from("h2o", features=["keydiff"])


# ---- budgets over layers --------------------------------------------------------------------------------------------


def limits(log_shares, budget, layers, sinks=0, recent=0):
    view = view_of()
    shared, mean = DepthShares(log_shares=log_shares), slots_of_budget(budget, view)
    views = [replace(view, layer=layer, layers=layers) for layer in range(layers)]
    found = torch.stack([shared.layer_limit(one, mean, Ends(sinks, recent))[:, 0, 0] for one in views])
    return found, mean[:, 0, 0]


@settings(max_examples=60)
@given(
    log_shares=st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=8),
    budget=st.one_of(st.integers(1, 300), st.floats(0.05, 1.0)),
    layers=st.integers(1, 12),
    ends=st.integers(0, 6),
)
def test_budgets_of_the_layers_add_up(log_shares, budget, layers, ends):
    found, mean = limits(log_shares, budget, layers, sinks=ends // 2, recent=ends - ends // 2)
    least = torch.full_like(mean, ends + 1).minimum(mean)
    assert torch.all(found >= least)
    g = np.array([float(interpolate(torch.tensor(log_shares), i / max(layers - 1, 1))) for i in range(layers)])
    ideal = np.exp(g) / np.exp(g).sum() * layers * mean.numpy()[:, None]
    read = (view_of().seen - view_of().start).numpy()
    free = ((least.numpy() + 1 < ideal.T) & (read - 1 > ideal.T)).all(0)
    # Where no bound cuts, a share is within one slot of the formula.
    assert np.all(np.abs(found.numpy() - ideal.T)[:, free] < 1 + 1e-6)
    assert torch.equal(found.sum(0), mean * layers)


def test_equal_shares_give_every_layer_the_mean():
    found, mean = limits([0.3, 0.3], 17, 5)
    assert torch.all(found == 17)
    assert torch.all(mean == 17)


def test_allocation_is_what_a_decision_keeps():
    scorer = FeatureScorer(features=["keydiff"], budget=6, allocation=2, sinks=1, recent=1)
    with torch.no_grad():
        scorer.weights.fill_(1.0)
        scorer.log_shares.copy_(torch.tensor([1.0, -1.0]))
    kept = [scorer.decide(view_of(layer=layer)).keep.sum(-1) for layer in range(4)]
    held = view_of().valid.sum(-1)
    expected, _ = limits([1.0, -1.0], 6, 4, sinks=1, recent=1)
    for layer in range(4):
        assert torch.equal(kept[layer], held.minimum(expected[layer][:, None]))
    assert int(expected[0, 0]) > 6 > int(expected[3, 0])


# ---- as a manager ---------------------------------------------------------------------------------------------------

VARIANTS = [
    {},
    {"knots": 3, "hidden": 4, "allocation": 2},
    {"knots": 1, "layers": 4, "heads": HEADS},
    {"knots": 2, "layers": 2, "heads": 5, "hidden": 2, "allocation": 3},
]
every_variant = pytest.mark.parametrize("options", VARIANTS)


@every_variant
def test_population_equals_each_alone(options):
    crowd = [randomised(FeatureScorer(features=ALL, budget=11, sinks=2, recent=2, **options), n) for n in range(5)]
    for layer in (0, 3):
        view = alone(view_of(layer=layer), 1)
        kept = PopulationPolicy(crowd).decide(view).keep
        for place, scorer in enumerate(crowd):
            assert torch.equal(kept[place], scorer.decide(replace(view, memo={})).keep[0])


@every_variant
def test_rows_decide_as_alone_and_keep_the_budget(options):
    scorer, view = randomised(FeatureScorer(features=ALL, budget=11, sinks=2, recent=2, **options)), view_of(layer=2)
    kept = scorer.decide(view).keep
    for row in range(len(START)):
        one = alone(view, row)
        assert torch.equal(scorer.decide(one).keep[0], kept[row, :, -one.slots.shape[2] :])
    if not options.get("allocation"):
        assert torch.equal(kept.sum(-1), view.valid.sum(-1).clamp(max=11))
    assert torch.all(scorer.decide(spoiled(view)).keep == kept)


@every_variant
def test_options_change_and_plugins_carry_it_over(options, tmp_path):
    scorer = randomised(FeatureScorer(features=ALL, budget=11, **options))
    other = scorer.with_options(budget=7, every=64)
    assert (other.options.budget, other.schedule.every) == (7, 64)
    back = other.with_options(budget=11, every=None)
    assert back.describe() == scorer.describe()
    plugins.save(scorer, tmp_path / "plugin", {})
    loaded = plugins.load(tmp_path / "plugin")
    for found in (other, back, loaded):
        assert isinstance(found, FeatureScorer)
        mine, theirs = scorer.state_dict(), found.state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert loaded.describe() == scorer.describe()
    view = view_of()
    assert torch.equal(loaded.decide(view).keep, scorer.decide(view).keep)


def test_features_of_a_view_are_computed_once(monkeypatch):
    from evomem.managers.learned import feature_scorer

    calls = []
    monkeypatch.setattr(feature_scorer, "features", lambda view, names: calls.append(names) or features(view, names))
    view = view_of()
    for _ in range(3):
        FeatureScorer(features=["keydiff", "age"]).score(view)
    FeatureScorer(features=["age", "keydiff"]).score(view)
    assert calls == [("keydiff", "age"), ("age", "keydiff")]
