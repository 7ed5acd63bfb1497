"""Budgets solved from curves: against every allocation that there is, and against hulls built by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomem import plugins
from evomem.errors import ConfigError
from evomem.evaluation import PopulationPolicy
from evomem.evaluation.utility import UtilityCurves, hull_slopes, knots_of, solve, with_curves, with_shares
from evomem.managers import build
from evomem.managers.allocation import LUKV
from evomem.managers.selection import Ends
from tests.managers.test_allocation import full_views


def slow_hull(x: list[float], y: list[float]) -> list[float]:
    """Values of the concave hull at the knots: a chain of points that turns right."""
    chain: list[int] = []
    for i in range(len(x)):
        while len(chain) > 1 and (y[chain[-1]] - y[chain[-2]]) * (x[i] - x[chain[-1]]) <= (
            (y[i] - y[chain[-1]]) * (x[chain[-1]] - x[chain[-2]])
        ):
            chain.pop()
        chain.append(i)
    found = []
    for i in range(len(x)):
        right = next(k for k in chain if k >= i)
        left = max(k for k in chain if k <= i)
        share = 0 if left == right else (x[i] - x[left]) / (x[right] - x[left])
        found.append(y[left] + share * (y[right] - y[left]))
    return found


GAINS = st.lists(st.floats(0, 10, width=32), min_size=5, max_size=5)


@given(gains=GAINS, squared=st.booleans())
def test_slopes_are_those_of_the_concave_hull(gains, squared):
    knots = knots_of(5) if squared else torch.linspace(0, 1, 6, dtype=torch.float64)
    curve = torch.cat([torch.zeros(1), torch.tensor(gains).double().cumsum(0)])
    slopes = hull_slopes(knots, curve)
    assert torch.all(slopes.diff() <= 0)
    values = torch.cat([torch.zeros(1), (slopes * knots.diff()).cumsum(0)])
    torch.testing.assert_close(values, torch.tensor(slow_hull(knots.tolist(), curve.tolist())), check_dtype=False)


def curves(gains, floor=0, slots=5):
    """Curves of heads (layers, heads, slots) with a knot a slot: nothing is interpolated."""
    gains = torch.as_tensor(gains, dtype=torch.float64)
    utility = torch.cat([torch.zeros(*gains.shape[:2], 1), gains.cumsum(-1)], -1)
    return UtilityCurves(torch.linspace(0, 1, gains.shape[-1] + 1).double(), utility, floor, slots + floor, 1)


@settings(max_examples=40)
@given(gains=st.lists(GAINS, min_size=3, max_size=3), mean=st.integers(0, 5), sort=st.booleans())
def test_greedy_on_the_hull_is_the_best_of_all_allocations(gains, mean, sort):
    """On the hulls; and on the curves themselves where a ranking is right, so that gains fall."""
    if sort:
        gains = [sorted(row, reverse=True) for row in gains]
    measured = curves([gains])
    slots = solve(measured, mean) if mean else torch.zeros(1, 3, dtype=torch.int64)
    assert slots.sum() == 3 * mean
    hulls = [slow_hull(measured.knots.tolist(), row) for row in measured.utility[0].tolist()]
    value = sum(hull[int(b)] for hull, b in zip(hulls, slots[0], strict=True))
    every = (b for b in itertools.product(range(6), repeat=3) if sum(b) == 3 * mean)
    best = max(sum(hull[n] for hull, n in zip(hulls, b, strict=True)) for b in every)
    assert value == pytest.approx(best, abs=1e-4)
    if sort:
        plain = measured.utility[0].tolist()
        assert sum(row[int(b)] for row, b in zip(plain, slots[0], strict=True)) == pytest.approx(best, abs=1e-4)


def test_floors_are_first_and_what_a_head_has_not_got_goes_to_others():
    gains = [[[9.0, 9, 9, 9, 9, 9, 9, 9], [1.0] * 8], [[2.0] * 8, [0.0] * 8]]
    allocation = with_curves(build("keydiff(budget=4)"), curves(gains, floor=1, slots=8)).allocation
    assert isinstance(allocation, LUKV)
    usable = torch.tensor([[9, 9, 9, 9], [3, 9, 9, 9], [2, 2, 2, 2]])
    mean = torch.tensor([4, 4, 4])
    # The floor of 1 each, then the rich head until it is full, then the next.
    read = torch.full((3,), 9)
    assert allocation.solve(usable, mean, 1, read).tolist() == [[9, 1, 5, 1], [3, 3, 9, 1], [4, 4, 4, 4]]
    assert allocation.solve(usable, torch.tensor([1, 1, 1]), 4, read).tolist() == [[1] * 4] * 3


def test_one_measurement_serves_all_budgets_and_lengths():
    """Budgets rise together: a head never loses slots when there are more, and shares hold in longer contexts."""
    generator = torch.Generator().manual_seed(1)
    manager = with_curves(build("keydiff"), curves(torch.rand(3, 2, 32, generator=generator) ** 4, floor=1, slots=32))
    before = torch.zeros(1, 6, dtype=torch.int64)
    for budget in range(1, 33):
        now = manager.allocation.solve(torch.full((1, 6), 33), torch.tensor([budget]), 1, torch.tensor([33]))
        assert now.sum() == 6 * budget
        assert torch.all(now >= before)
        before = now
    short, long = (
        manager.allocation.solve(torch.full((1, 6), n + 1), torch.tensor([n // 4]), 1, torch.tensor([n + 1]))
        for n in (320, 3200)
    )
    assert (long.double() / 3200 - short.double() / 320).abs().max() < 0.02


def test_a_population_over_one_reading_decides_as_each_alone():
    views = full_views(2, 20, (0,), 2)
    scorer = build("feature_scorer(features=[age, position], budget=6, sinks=1, recent=2)")
    crowd = []
    for seed in range(3):
        manager = with_curves(scorer, curves(torch.rand(2, 2, 4, generator=torch.Generator().manual_seed(0))))
        manager.weights.data.normal_(generator=torch.Generator().manual_seed(seed))
        crowd.append(manager)
    together = PopulationPolicy(crowd).decide_all(views)
    for row, manager in enumerate(crowd):
        for decision, alone in zip(together, manager.decide_all(views), strict=True):
            assert torch.equal(decision.keep[row], alone.keep[0])


def test_curves_travel_with_the_plugin_and_another_model_is_refused(tmp_path):
    manager = with_curves(build("keydiff(budget=6)"), curves(torch.rand(2, 2, 8)))
    plugins.save(manager, tmp_path / "plug")
    again = plugins.load(tmp_path / "plug")
    views = full_views(2, 20, (0, 3), 2)
    for one, other in zip(again.decide_all(views), manager.decide_all(views), strict=True):
        assert torch.equal(one.keep, other.keep)
    with pytest.raises(ConfigError, match=r"2 layers of 2 KV heads, and this model has 3 layers of 2"):
        again.decide_all(full_views(3, 20, (0,), 2))
    with pytest.raises(ConfigError, match=r"have not been measured.*evomem allocate"):
        build("keydiff(budget=6, allocation=lukv(layers=2, heads=2))").decide_all(views)


@pytest.mark.parametrize(("knots", "marginal"), [
    ([0, 0.5, 1], [[[1.0, 2.0]]]), ([0, 0.5, 1], [[[1.0, float("nan")]]]), ([0, 0, 1], [[[2.0, 1.0]]]),
    ([0, 0.5, 0.9], [[[2.0, 1.0]]]), ([0, 1], [[[2.0]]]),
])  # fmt: skip
def test_curves_that_are_none_are_refused(knots, marginal):
    with pytest.raises(ConfigError, match="lukv"):
        LUKV(layers=1, heads=1, points=2).set_curves(torch.tensor(knots).float(), torch.tensor(marginal))


@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (2, 3)])
def test_learned_shares_begin_at_the_solution(sinks, recent):
    """`per_head_shares` from the curves keeps what `lukv` keeps at that budget, within a slot a head."""
    generator = torch.Generator().manual_seed(2)
    floor = Ends(sinks, recent).floor
    measured = curves(torch.rand(3, 2, 60, generator=generator).square(), floor=floor, slots=60)
    scorer = build("feature_scorer(features=[age])", budget=16, sinks=sinks, recent=recent)
    views = full_views(3, 60 + floor, (0,), 2)
    kept = []
    for manager in (with_curves(scorer, measured), with_shares(scorer, measured, 16)):
        kept.append(torch.stack([d.keep.sum(-1) for d in manager.decide_all(views)]))
    assert torch.equal(kept[0][:, 0], solve(measured, 16))
    assert (kept[0] - kept[1]).abs().max() <= 1
