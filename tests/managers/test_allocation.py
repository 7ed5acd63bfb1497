"""How budgets are shared out over layers and heads: totals, protected ends, aliases, composition, what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomem.errors import ConfigError
from evomem.managers import allocations, build, build_allocation, names
from evomem.managers.allocation import (
    LUKV,
    EmergentAllocation,
    ModelAllocation,
    interpolated,
    water_fill,
)
from evomem.managers.decision import Judgement, Rule
from evomem.managers.learned.feature_scorer import interpolate
from evomem.managers.selection import Ends, slots_of_budget
from evomem.memory import LayerView
from evomem.memory.observations import parse_observation
from tests.managers.test_features import view_of
from tests.managers.test_heuristics import SPECS
from tests.support.probes import with_made_up_probes
from tests.support.ragged_view import HEADS, make_view

LOGS = st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=5)
OVER_LAYERS = st.one_of(
    st.just("uniform"),
    st.builds(lambda beta: {"name": "pyramid", "options": {"beta": beta}}, st.floats(1, 50)),
    st.builds(lambda logs: {"name": "depth_shares", "options": {"log_shares": logs}}, LOGS),
)
ANY = {
    "uniform": st.just("uniform"),
    "pyramid": st.builds(
        lambda beta, window: {"name": "pyramid", "options": {"beta": beta, "window": window}},
        st.floats(1, 50), st.none() | st.integers(0, 9),
    ),
    "depth_shares": st.builds(lambda logs: {"name": "depth_shares", "options": {"log_shares": logs}}, LOGS),
    "by_distinct_rate": st.just({"name": "by_distinct_rate", "options": {"total": [1, 1]}}),
    "by_effective_writes": st.just({"name": "by_effective_writes", "options": {"total": [1, 1]}}),
    "across_heads": st.builds(
        lambda layers, safeguard: {"name": "across_heads", "options": {"layers": layers, "safeguard": safeguard}},
        OVER_LAYERS, st.floats(0, 1),
    ),
    "across_layers": st.builds(
        lambda safeguard: {"name": "across_layers", "options": {"safeguard": safeguard}}, st.floats(0, 1)
    ),
    "per_head_shares": st.builds(
        lambda points, heads: {"name": "per_head_shares", "options": {"points": points, "heads": heads}},
        st.integers(1, 3), st.integers(1, 3),
    ),
    "cake": st.builds(
        lambda window, tau: {"name": "cake", "options": {"window": window, "tau1": tau, "tau2": 1 / tau}},
        st.integers(1, 9), st.floats(0.2, 5),
    ),
    "lava": st.builds(
        lambda window, safeguard: {"name": "lava", "options": {"window": window, "safeguard": safeguard}},
        st.integers(1, 9), st.floats(0, 1),
    ),
    "slots": st.builds(
        lambda window, per_head: {"name": "slots", "options": {"window": window, "per_head": per_head}},
        st.integers(1, 9), st.sampled_from([None, "per_head_shares(points=2, heads=2)"]),
    ),
    "probe_shares": st.builds(
        lambda probe, power, least: {
            "name": "probe_shares", "options": {"probe": probe, "power": power, "least": least},
        },
        st.sampled_from(["induction", "retrieval"]), st.floats(0, 4), st.integers(0, 9),
    ),
    "razor": st.builds(
        lambda induction, echo, compression: {
            "name": "razor", "options": {"induction": induction, "echo": echo, "compression": compression},
        },
        st.floats(0, 1), st.floats(0, 1), st.floats(1, 20),
    ),
    "duo": st.builds(
        lambda retrieval, streaming: {"name": "duo", "options": {"retrieval": retrieval, "streaming": streaming}},
        st.floats(0, 1), st.integers(1, 20) | st.floats(0, 1),
    ),
    "headkv": st.builds(
        lambda beta, power: {"name": "headkv", "options": {"beta": beta, "power": power}},
        st.floats(1, 10), st.floats(0, 3),
    ),
    "layer_budgets": st.builds(
        lambda layers: {"name": "layer_budgets", "options": {"layers": layers}}, st.integers(1, 7)
    ),
    "lukv": st.builds(
        lambda points: {"name": "lukv", "options": {"layers": 3, "heads": 2, "points": points}}, st.integers(1, 9)
    ),
}  # fmt: skip
"""Some of every registered allocation that promises a total. A new one is tried as soon as it is written down here."""
EMERGENT = {"threshold"}


def full_views(layers: int, read: int, starts: tuple[int, ...], heads: int) -> list[LayerView]:
    """Views of all layers with everything held, rows of ``read - start`` tokens."""
    slots = torch.arange(read).expand(len(starts), heads, read).clone()
    start = torch.tensor(starts)
    slots[slots < start[:, None, None]] = -1
    nothing = torch.zeros(len(starts), heads, read, 2)
    return [LayerView(nothing, nothing, slots, start, read, read, layer, layers) for layer in range(layers)]


def with_observations(views: list[LayerView], observes: frozenset[str]) -> list[LayerView]:
    """The views with random numbers for what an allocation observes."""
    generator, filled = torch.Generator().manual_seed(len(views)), []
    for view in views:
        batch, heads, slots = view.slots.shape
        sizes, recorded = {"batch": batch, "kv_heads": heads, "slots": slots}, {}
        for name in sorted(observes):
            recorded |= parse_observation(name).example(sizes, generator)
        filled.append(replace(view, recorded=recorded))
    return filled


def test_every_registered_allocation_is_tried():
    kinds = {name: allocations.get(name) for name in allocations.names()}
    assert {n for n, kind in kinds.items() if issubclass(kind, EmergentAllocation)} == EMERGENT
    missing = {n for n, kind in kinds.items() if not issubclass(kind, EmergentAllocation)} - ANY.keys()
    assert not missing, "write into ANY, above, some of each, so that their totals are tested"


@pytest.mark.parametrize("name", ANY)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_the_total_is_the_budget_whatever_binds(name, data):
    """Over layers and heads, in every row: limits add up to the budget, and that is what is kept of what was read."""
    allocation = build_allocation(data.draw(ANY[name]))
    layers, heads, read = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 3)), data.draw(st.integers(8, 40))
    if isinstance(allocation, LUKV):  # is of one model
        layers, heads = allocation.options.layers, allocation.options.heads
        slopes = torch.rand(allocation.marginal.shape, generator=torch.Generator().manual_seed(read))
        allocation.set_curves(allocation.knots, slopes.sort(-1, descending=True).values)
    ends = Ends(
        data.draw(st.integers(0, 6) | st.floats(0, 1)),
        data.draw(st.integers(0, 8) | st.floats(0, 1)),
        data.draw(st.floats(0, 1)),
    )
    budget = data.draw(st.none() | st.integers(1, 50) | st.floats(0.02, 1))
    views = full_views(layers, read, (0, data.draw(st.integers(1, 7))), heads)
    views = with_observations(views, allocation.observes)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    with_made_up_probes(allocation, layers, heads, data.draw(st.integers(0, 9)))
    for parameter in allocation.parameters():  # what is learned may be anything
        parameter.data = 3 * torch.randn(parameter.shape, generator=generator)
    scores = [torch.randn(view.slots.shape, generator=generator) * (1 + view.layer) for view in views]
    mean = slots_of_budget(budget, views[0])
    if isinstance(allocation, ModelAllocation):
        may_stay = [torch.where(view.valid, s, -torch.inf) for view, s in zip(views, scores, strict=True)]
        limits = allocation.limits(views, [mean] * layers, may_stay, ends)
    else:
        limits = [allocation.limits(view, mean, s, ends) for view, s in zip(views, scores, strict=True)]
    wide = torch.stack([limit.expand(2, heads, 1) for limit in limits])
    assert torch.equal(wide.sum((0, 2, 3)), layers * heads * mean[:, 0, 0])
    rule = Rule(budget, ends, allocation)
    kept = torch.stack([d.keep.sum(-1) for d in rule.decide_all([Judgement(s) for s in scores], views)])
    has = views[0].valid.sum(-1)
    assert torch.equal(kept, torch.minimum(wide[..., 0], has))
    assert torch.equal(kept.sum((0, 2)), layers * heads * torch.minimum(mean[:, 0, 0], has[:, 0]))
    if name not in ("across_heads", "lava"):  # a head is sure of its protected ends and one more, if it holds them
        assert torch.all(wide >= torch.minimum(mean.clamp(max=ends.floor), has[..., None]))


def slow_fill(weights: list[float], mean: int, floor: int, read: int) -> list[float]:
    """Shares between bounds: those that break one are set to it and taken out, until none does."""
    low, high, count = min(floor, mean), max(mean, read), len(weights)
    begin, end = 0.0, 1e9
    for _ in range(300):
        middle = (begin + end) / 2
        total = sum(min(max(middle * w, low), high) for w in weights)
        begin, end = (middle, end) if total < mean * count else (begin, middle)
    return [min(max(end * w, low), high) for w in weights]


@settings(max_examples=60, deadline=None)
@given(
    logs=st.lists(st.floats(-5, 5), min_size=1, max_size=9),
    mean=st.integers(1, 60), floor=st.integers(0, 30), read=st.integers(1, 90),
)  # fmt: skip
def test_what_bounds_take_is_shared_by_the_others_as_before(logs, mean, floor, read):
    weights = [math.exp(log) / sum(map(math.exp, logs)) for log in logs]
    until = np.round(np.cumsum(weights) * len(weights) * mean).astype(int)
    own = np.diff(until, prepend=0)
    shape = (len(weights), 1, 1, 1)
    found = water_fill(
        torch.from_numpy(own).reshape(shape), torch.tensor(weights, dtype=torch.float64).reshape(shape),
        torch.tensor([[[mean]]]), floor, torch.tensor([[[read]]]),
    ).flatten().tolist()  # fmt: skip
    assert sum(found) == mean * len(weights)
    low, high = min(floor, mean), max(mean, read)
    assert all(low <= x <= high for x in found)
    if all(low <= x <= high for x in own):
        assert found == own.tolist()
    else:
        ideal = slow_fill(weights, mean, floor, read)
        assert all(abs(x - y) <= 1 + 1e-4 for x, y in zip(found, ideal, strict=True))


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_shares_between_points_are_those_of_before_to_the_bit(count):
    knots = torch.randn(count, 3, generator=torch.Generator().manual_seed(count))
    for layers in (1, 2, 7, 30):
        plain = [interpolate(knots, layer / (layers - 1) if layers > 1 else 0.0) for layer in range(layers)]
        assert torch.equal(interpolated(knots, layers), torch.stack(plain))


def test_protected_ends_do_not_add_to_the_budget():
    """Ten slots a head with four sinks and eight recent tokens: 40 over four layers, and not 52."""
    manager = build("feature_scorer(features=[keydiff], budget=10, allocation=2, sinks=4, recent=8)")
    manager.log_shares.data.copy_(torch.tensor([1.0, -1.0]))
    kept = [manager.decide(view).keep.sum(-1) for view in full_views(4, 60, (0,), 2)]
    assert torch.stack(kept).sum((0, 2)).tolist() == [80]


# ---- aliases and composition ----------------------------------------------------------------------------------------


def same(one, other, budgets=(3, 12, 17, 0.4, None), layers=4):
    for budget in budgets:
        for layer in range(layers):
            view = make_view(seed=layer, layer=layer, layers=layers)
            mine, theirs = (build(spec, budget=budget).decide(view).keep for spec in (one, other))
            assert torch.equal(mine, theirs), (budget, layer)


def test_pyramidkv_is_snapkv_with_a_pyramid():
    same("pyramidkv(window=8)", "snapkv(window=8, allocation=pyramid)")
    same("pyramidkv(window=8, beta=3)", "snapkv(window=8, allocation=pyramid(beta=3))")


@pytest.mark.parametrize("spec", [s for s in SPECS if not s.startswith("pyramidkv")])
def test_adakv_is_a_scorer_with_one_ranking_over_heads(spec):
    with_option = spec.replace(")", ", allocation=across_heads)") if "(" in spec else f"{spec}(allocation=across_heads)"
    with_option = with_option.replace("allocation=uniform, ", "")
    same(f"adakv({spec})", with_option, budgets=(3, 12, 0.4))
    same(f"adakv({spec}, safeguard=0.7)", with_option.replace("heads)", "heads(safeguard=0.7))"), budgets=(12,))


def test_allocations_over_layers_and_over_heads_compose():
    across = "across_heads(layers=pyramid(beta=5))"
    same("adakv(pyramidkv(window=8, beta=5))", f"snapkv(window=8, allocation={across})")
    same("pyramidkv(window=8, beta=5, allocation=across_heads)", f"snapkv(window=8, allocation={across})")
    same("adakv(snapkv(window=8), allocation=pyramid(beta=5))", f"snapkv(window=8, allocation={across})")


@pytest.mark.parametrize("spec", [
    "adakv(feature_scorer(features=[keydiff], allocation=2, sinks=1, recent=1))",
    "feature_scorer(features=[keydiff], allocation=across_heads(layers=depth_shares(points=2)), sinks=1, recent=1)",
    "adakv(keydiff(allocation=depth_shares(points=2)))",
    "keydiff(allocation=across_heads(layers=2))",
])  # fmt: skip
def test_learned_shares_of_layers_times_sharing_among_heads(spec):
    """Layers get what their shares say, as without sharing among heads, and heads differ."""
    manager, views = build(spec, budget=10), [view_of(layer=layer) for layer in range(4)]
    (shares,) = [p for name, p in manager.named_parameters() if name.endswith("log_shares")]
    equal = torch.stack([manager.decide(view).keep.sum((-1, -2)) for view in views])
    with torch.no_grad():
        shares.copy_(torch.tensor([1.0, -1.0]))
    plain = build("keydiff(allocation=depth_shares(log_shares=[1.0, -1.0]))", budget=10)
    if "sinks" in spec:
        plain.ends = Ends(1, 1)
    kept = torch.stack([manager.decide(view).keep.sum(-1) for view in views])
    held = torch.stack([view.valid.sum((-1, -2)) for view in views])
    limits = torch.stack([plain.rule.layer_limit(view, plain.shares())[:, 0, 0] * HEADS for view in views])
    assert torch.equal(kept.sum(-1), limits.minimum(held))
    assert not torch.equal(kept.sum(-1), equal)
    assert any(len(set(row)) > 1 for row in kept.flatten(0, 1).tolist())


@pytest.mark.parametrize("spec", [
    "full(allocation=across_heads)", "full(allocation=pyramid)", "adakv(full)", "adakv(namm)", "adakv(adakv(keydiff))",
    "adakv(keydiff, allocation=across_heads)", "adakv(keydiff(allocation=pyramid), allocation=pyramid)",
    "adakv(pyramidkv, allocation=pyramid)", "pyramidkv(allocation=pyramid)", "pyramidkv(allocation=uniform)",
    "pyramidkv(allocation=across_heads(layers=pyramid))", "namm(selection=dense, allocation=across_heads)",
    "namm(selection=threshold, allocation=uniform)", "keydiff(allocation=across_heads(layers=across_heads))",
    "keydiff(allocation=across_heads(layers=threshold))", "keydiff(allocation=depth_shares)",
    "keydiff(allocation=depth_shares(points=2, log_shares=[1]))", "keydiff(allocation=threshold(cap=0))",
    "keydiff(allocation=pyramid(beta=0))", "keydiff(allocation=nothing)", "keydiff(allocation=-1)",
    "keydiff(allocation=true)", "keydiff(allocation=2.5)", "keydiff(allocation=[1])", "kv_policy(allocation=65)",
    "keydiff(allocation=pyramid(beta))", "keydiff(budget=4, allocation=threshold(cap=8))",
])  # fmt: skip
def test_what_does_not_compose_is_refused(spec):
    with pytest.raises(ConfigError, match=r"allocation|inner|selection"):
        build(spec)


def test_every_manager_has_the_option():
    """Those that rank to a budget keep as much in all, differently shared; the others refuse it."""
    refused = set()
    views = [make_view(seed=layer, layer=layer) for layer in range(4)]
    for name in names():
        spec = {"adakv": "adakv(keydiff)", "kv_policy": "kv_policy(features=[keydiff])"}.get(name, name)
        try:
            manager = build(spec, budget=20, allocation="pyramid(beta=9, window=0)")
        except ConfigError:
            refused.add(name)
            continue
        limits = [int(manager.rule.layer_limit(view, manager.shares())[0]) for view in views]
        assert sum(limits) == 80, name
        assert limits[0] > limits[-1], name
    assert refused == {"full", "pyramidkv", "surprise_gate", "write_gate"}
