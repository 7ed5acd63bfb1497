"""How many slots the number of writes gives: bounds, directions, the budget where nothing was learned."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomem.errors import ConfigError
from evomem.evaluation.population import PopulationPolicy
from evomem.managers import build
from evomem.managers.allocation import build_allocation
from evomem.managers.selection import Ends
from evomem.memory import layer_view

SLOTS, BUDGET = 40, 8
WRITES = torch.tensor([0.0, 1.0, 3.4, 9.0, 30.0])


def view(writes=WRITES):
    """Return a view whose rows have these numbers, one a head: writes (rows,) or (rows, heads)."""
    writes = writes[:, None] if writes.dim() == 1 else writes
    vectors = torch.randn(*writes.shape, SLOTS, 4, generator=torch.Generator().manual_seed(0))
    return layer_view(vectors, vectors, recorded={"effective_writes": writes})


def limits(options, coefficients, budget=BUDGET, ends=None):
    """Return N of every row."""
    allocation = build_allocation(f"by_effective_writes({options})")
    with torch.no_grad():
        allocation.coefficients[:] = torch.tensor(coefficients)
    mean = torch.full((len(WRITES), 1, 1), budget)
    return allocation.layer_limit(view(), mean, ends or Ends(recent=1))[:, 0, 0].tolist()


@pytest.mark.parametrize("total", ["[0.25, 4]", "[1, 4]", "[0.25, 1]", "[1, 1]", "[0.5, 1.9]"])
def test_at_first_every_input_has_the_budget(total):
    assert limits(f"total={total}", [0.0, 0.0]) == [BUDGET] * len(WRITES)


def test_as_many_slots_as_writes_between_the_bounds():
    assert limits("total=[0.25, 3]", [1.0, -1.0]) == [2, 2, 3, 9, 24]


def test_it_is_the_formula():
    slope, shift, low, high = 0.7, 0.25, 0.5 * BUDGET, 3 * BUDGET
    assert limits("total=[0.5, 3]", [slope, shift]) == [
        round(min(high, max(low, slope * writes + (1 + shift) * BUDGET))) for writes in WRITES.tolist()
    ]


@given(st.floats(-1e9, 1e9) | st.just(math.nan), st.floats(-1e9, 1e9), st.integers(1, 30), st.integers(0, 40))
def test_it_lies_within_the_bounds_and_goes_one_way(slope, shift, budget, recent):
    ends = Ends(recent=recent)
    counts = limits("total=[0.3, 2.5]", [slope, shift], budget, ends)
    least, most = max(1, math.ceil(0.3 * budget - 1e-6)), math.floor(2.5 * budget + 1e-6)
    assert all(least <= count <= max(most, min(budget, ends.floor)) for count in counts)
    assert all(count >= min(budget, ends.floor) for count in counts)
    assert counts == sorted(counts, reverse=slope < 0)


def test_candidates_of_a_population_have_numbers_of_their_own():
    managers = []
    for slope in (0.0, 0.5, 1.0):
        managers.append(build("fifo", budget=BUDGET, allocation="by_effective_writes"))
        with torch.no_grad():
            managers[-1].allocation.coefficients[0] = slope
    seen = view(torch.full((3, 2), 6.0))  # one row a candidate, the mean of whose heads it goes by
    together = PopulationPolicy(managers).decide(seen).keep
    alone = [manager.decide(seen).keep[row] for row, manager in enumerate(managers)]
    assert torch.equal(together, torch.stack(alone))
    assert together.sum(-1).tolist() == [[BUDGET] * 2, [BUDGET + 3] * 2, [BUDGET + 6] * 2]


def test_what_cannot_be_learned_or_known_is_refused():
    policy = build("kv_policy", budget=BUDGET, features=["age"], allocation="by_effective_writes")
    with pytest.raises(ConfigError, match="nothing is drawn of how many slots"):
        policy.require_draws()
    bare = layer_view(*[torch.randn(1, 1, SLOTS, 4)] * 2)
    with pytest.raises(ConfigError, match="observes 'effective_writes'"):
        build("fifo", budget=BUDGET, allocation="by_effective_writes").decide(bare)
