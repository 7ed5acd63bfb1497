"""Managers: features against plain loops over one head at a time, and the scorer that is made of them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_heuristics import DIM, HEADS, START, alone, make_view

from evomem import plugins
from evomem.errors import ConfigError
from evomem.evaluation import PopulationPolicy
from evomem.managers import FeatureScorer, build
from evomem.managers.feature_scorer import AllocatedTopN, interpolate
from evomem.managers.features import LINEAR_20, OBSERVATIONS, features, parse, required
from evomem.managers.selection import slots_of_budget

PLAIN = (
    "keydiff", "valuediff", "key_norm", "value_norm", "key_step", "value_step", "age", "position", "sink",
    "attention", "attention_per_query", "window:8", "window:32", "spectrum:0", "spectrum:16",
)  # fmt: skip
POOLED = ("mean:3:keydiff", "mean:7:attention", "max:7:value_norm", "max:21:age", "mean:7:window:8", "max:3:spectrum:4")
ALL = PLAIN + POOLED


def view_of(seed=0, **changes):
    """Ragged heads, two rows with different starts, also with a spectrogram; empty slots hold garbage."""
    view = make_view(seed, **changes)
    g = torch.Generator().manual_seed(seed + 100)
    spectrum = torch.rand(*view.slots.shape, 17, generator=g)
    return replace(view, recorded={**view.recorded, "attention_spectrum": spectrum})


def spoiled(view):
    """The view with other things in its empty slots."""
    empty = ~view.valid

    def spoil(x):
        wide = empty.view(*empty.shape, *([1] * (x.dim() - 3)))
        return torch.where(wide, torch.tensor(7.7e3), x)

    slotwise = {n: spoil(x) if "attention" in n else x for n, x in view.recorded.items()}
    return replace(view, keys=spoil(view.keys), values=spoil(view.values), recorded=slotwise, memo={})


def randomised(scorer, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    return scorer


# ---- the slow path --------------------------------------------------------------------------------------------------


def slow_observation(name, argument, view, b, h):
    """What one head's tokens are described by, oldest first, in Python numbers."""
    held = [s for s, t in enumerate(view.slots[b, h].tolist()) if t >= 0]
    ages = [view.seen - 1 - int(view.slots[b, h, s]) for s in held]
    positions = [int(view.slots[b, h, s]) - int(view.start[b]) for s in held]

    def vectors(x):
        return [[float(i) for i in x[b, h, s]] for s in held]

    def norm(x):
        return math.sqrt(sum(i * i for i in x))

    def cosine(x, y):
        return sum(i * j for i, j in zip(x, y, strict=True)) / (norm(x) * norm(y))

    def recorded(which):
        return [float(view.recorded[which][b, h, s]) for s in held]

    if name in ("keydiff", "valuediff"):
        own = vectors(view.keys if name == "keydiff" else view.values)
        mean = [sum(x[d] / norm(x) for x in own) / len(own) for d in range(DIM)]
        return [-cosine(x, mean) for x in own]
    if name in ("key_norm", "value_norm"):
        return [math.log(norm(x) + 1e-6) for x in vectors(view.keys if name == "key_norm" else view.values)]
    if name in ("key_step", "value_step"):
        own = vectors(view.keys if name == "key_step" else view.values)
        return [0.0] + [1 - cosine(x, y) for x, y in zip(own[1:], own, strict=False)]
    if name == "age":
        return [math.log(1 + age) for age in ages]
    if name == "position":
        return [math.log(1 + position) for position in positions]
    if name == "sink":
        return [float(position < 4) for position in positions]
    if name == "attention":
        return [math.log(a + 1e-6) for a in recorded("attention_sum")]
    if name == "attention_per_query":
        return [math.log(a / (age + 1) + 1e-6) for a, age in zip(recorded("attention_sum"), ages, strict=True)]
    if name == "window":
        return [math.log(a + 1e-6) for a in slow_pool(recorded(f"window_attention:{argument}"), 5, max)]
    bins = view.recorded["attention_spectrum"][b, h]
    return [math.log(float(bins[s, int(argument)]) + 1e-6) for s in held]


def slow_pool(values, width, how):
    near = [values[max(0, i - width // 2) : i + width // 2 + 1] for i in range(len(values))]
    return [how(around) for around in near]


def slow_feature(name, view, b, h):
    how, width, observation, argument = parse(name)
    values = slow_observation(observation, argument, view, b, h)
    if how:
        values = slow_pool(values, width, max if how == "max" else lambda around: sum(around) / len(around))
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in values) / len(values))
    return [(x - mean) / max(deviation, 1e-4) for x in values]


@pytest.mark.parametrize("seed", [0, 1])
def test_features_equal_plain_loops(seed):
    view = spoiled(view_of(seed))
    found = features(view, ALL)
    assert found.dtype == torch.float32
    assert found.shape == (*view.slots.shape, len(ALL))
    for place, name in enumerate(ALL):
        for b in range(len(START)):
            for h in range(HEADS):
                valid = view.valid[b, h]
                expected = torch.tensor(slow_feature(name, view, b, h))
                torch.testing.assert_close(
                    found[b, h, valid, place], expected, atol=1e-3, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
                )
                assert torch.all(found[b, h, ~valid, place] == 0), name


def test_every_observation_is_tested():
    assert {parse(name)[2] for name in ALL} == set(OBSERVATIONS)


def test_features_are_standardised():
    view = view_of()
    found, valid = features(view, ALL), view.valid[..., None]
    count = valid.sum(2)
    mean = found.sum(2) / count
    variance = (found.square() * valid).sum(2) / count
    # A head whose values are all the same has nothing to standardise; what is left is rounding, the same for all slots.
    constant = variance < 0.5
    assert mean[~constant].abs().max() < 1e-5
    assert constant.float().mean() < 0.2
    torch.testing.assert_close(variance[~constant], torch.ones_like(variance[~constant]), atol=1e-3, rtol=0)
    assert torch.all(found.abs().amax(2)[constant] < 1e-3)


def test_features_do_not_depend_on_empty_slots_or_the_batch():
    view = view_of()
    found = features(view, ALL)
    torch.testing.assert_close(features(spoiled(view), ALL), found, atol=0, rtol=0)
    for row in range(len(START)):
        one = alone(view, row)
        lone = features(one, ALL)[0]
        torch.testing.assert_close(lone, found[row, :, -one.slots.shape[2] :], atol=2e-4, rtol=1e-4)


def test_features_do_not_depend_on_scale_or_head_size():
    view = view_of()
    names = tuple(name for name in ALL if "attention" not in name and "window" not in name and "spectrum" not in name)
    larger = replace(view, keys=view.keys * 37.0, values=view.values * 0.2, memo={})
    torch.testing.assert_close(features(larger, names), features(view, names), atol=2e-3, rtol=1e-3)
    wide = replace(view, keys=torch.cat((view.keys,) * 4, -1), values=torch.cat((view.values,) * 4, -1), memo={})
    torch.testing.assert_close(features(wide, names), features(view, names), atol=2e-3, rtol=1e-3)


def test_first_token_has_no_step_even_after_padding():
    """Whatever lies in the empty slot before it."""
    view = spoiled(view_of(3))
    for name in ("key_step", "value_step"):
        steps, _ = OBSERVATIONS[name]
        raw = steps(view, "")
        for b in range(len(START)):
            for h in range(HEADS):
                first = int(view.valid[b, h].long().argmax())
                assert raw[b, h, first] == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("keydif", "unknown observation 'keydif'.*keydiff"),
        ("", "unknown observation"),
        ("mean:4:keydiff", "odd number"),
        ("max:keydiff", "odd number"),
        ("mean", "odd number"),
        ("mean:7", "unknown observation ''"),
        ("window", "number of queries"),
        ("window:0", "number of queries"),
        ("window:x", "number of queries"),
        ("spectrum:17", "bin from 0 to 16"),
        ("spectrum", "bin from 0 to 16"),
        ("keydiff:3", "takes no argument"),
        ("mean:3:mean:3:keydiff", "unknown observation 'mean'"),
        ("window:8:9", "unknown"),
    ],
)
def test_wrong_features_are_named(name, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse(name)
    assert repr(name) in str(caught.value)
    with pytest.raises(ConfigError, match=r"feature_scorer.*features"):
        FeatureScorer(features=[name])


@given(
    how=st.sampled_from(["", "mean:", "max:"]),
    width=st.integers(0, 30).map(lambda n: 2 * n + 1),
    observation=st.sampled_from(sorted(OBSERVATIONS)),
    argument=st.integers(1, 16),
)
def test_names_round_trip(how, width, observation, argument):
    with_argument = observation in ("window", "spectrum")
    name = f"{how}{f'{width}:' if how else ''}{observation}{f':{argument}' if with_argument else ''}"
    expected = (how.rstrip(":"), width if how else 0, observation, str(argument) if with_argument else "")
    assert parse(name) == expected
    needs = OBSERVATIONS[observation][1].format(argument)
    assert required((name,)) == ({needs} if needs else set())


# ---- the scorer -----------------------------------------------------------------------------------------------------


def test_options_are_checked():
    with pytest.raises(ConfigError, match="at least one feature"):
        FeatureScorer(features=[])
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
    names = [*LINEAR_20, "value_step"]
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
    shared = AllocatedTopN(budget, sinks, recent, log_shares=torch.tensor(log_shares))
    found = torch.stack([shared.limit(replace(view, layer=layer, layers=layers))[:, 0, 0] for layer in range(layers)])
    return found, slots_of_budget(budget, view)[:, 0, 0]


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
    free = least.numpy() + 1 < ideal.T  # where no bound cuts, a share is within one slot of the formula
    assert np.all(np.abs(found.numpy() - ideal.T)[free] < 1 + 1e-6)
    if free.all():
        assert torch.equal(found.sum(0), mean * layers)
    assert torch.all(found.sum(0) >= mean * layers)


def test_equal_shares_give_every_layer_the_mean():
    found, mean = limits([0.3, 0.3], 17, 5)
    assert torch.all(found == 17)
    assert torch.all(mean == 17)


def test_allocation_is_what_the_selection_keeps():
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
    from evomem.managers import feature_scorer

    calls = []
    monkeypatch.setattr(feature_scorer, "features", lambda view, names: calls.append(names) or features(view, names))
    view = view_of()
    for _ in range(3):
        FeatureScorer(features=["keydiff", "age"]).score(view)
    FeatureScorer(features=["age", "keydiff"]).score(view)
    assert calls == [("keydiff", "age"), ("age", "keydiff")]
