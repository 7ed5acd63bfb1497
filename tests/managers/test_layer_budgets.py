"""One budget a layer: EvolKV's completion, and the bounds that bind, against exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from hypothesis import given
from hypothesis import strategies as st

from evomem.managers import build
from evomem.managers.allocation import LayerBudgets
from evomem.managers.selection import Ends
from tests.managers.test_allocation import full_views
from tests.support.slow_decision import clamped

FACTORS = st.lists(st.floats(0.0625, 4, width=32), min_size=2, max_size=30)


def limits(factors, mean, ends, read, complete=True):
    allocation = LayerBudgets(layers=len(factors), complete=complete)
    allocation.factors.data = torch.tensor(factors)
    views = full_views(len(factors), read, (0,), 1)
    return [int(allocation.layer_limit(view, torch.tensor([[[mean]]]), ends)) for view in views]


@given(factors=FACTORS, target=st.integers(4, 64))
def test_completed_budgets_are_the_papers_within_a_slot_and_exact_in_all(factors, target):
    layers = len(factors)
    found = {complete: limits(factors, target, Ends(), 2000, complete) for complete in (True, False)}
    k = [target * x for x in factors]
    whole = sum(k)
    paper = [math.ceil(one + one / whole * (target * layers - whole) - 1e-6) for one in k]
    assert sum(found[True]) == target * layers <= sum(paper) + 1e-6
    # A floor of one slot takes from the others where a layer would have none.
    assert all(abs(b - p) <= 1 for b, p in zip(found[True], paper, strict=True) if min(paper) > 1)
    assert all(abs(b - max(one, 1)) <= 0.51 for b, one in zip(found[False], k, strict=True))


@given(
    factors=FACTORS,
    mean=st.integers(1, 30),
    ends=st.tuples(st.integers(0, 4), st.integers(0, 9)),
    read=st.integers(30, 60),
)
def test_floors_come_first_and_no_layer_gets_more_than_was_read(factors, mean, ends, read):
    """`layer_budgets`: within a slot of clamp(λ x, floor, read), and exact in all."""
    found = limits(factors, mean, Ends(*ends), read)
    low, count = min(Ends(*ends).floor, mean), len(factors)
    assert sum(found) == mean * count
    assert all(low <= slots <= read for slots in found)
    ideal = clamped([Fraction(x) for x in factors], [low] * count, [read] * count, mean * count)
    assert all(abs(a - b) <= 1 for a, b in zip(found, ideal, strict=True))


def test_a_model_of_another_depth_and_a_completed_twin():
    manager = build("keydiff(budget=8, allocation=layer_budgets(layers=2, complete=false))")
    manager.allocation.factors.data = torch.tensor([2.0, 0.5])
    views = full_views(3, 40, (0,), 2)
    assert [int(manager.decide(view).keep[0, 0].sum()) for view in views] == [16, 10, 4]
    complete = manager.with_options(allocation="layer_budgets(layers=2)")
    kept = [int(complete.decide(view).keep[0, 0].sum()) for view in views]
    assert sum(kept) == 24
    assert kept == [13, 8, 3]
