"""How many slots the distinct-key rate gives: bounds, directions, the budget where nothing was learned."""

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
RATES = torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0])


def view(rates=RATES):
    """Return a view whose rows have these rates, one a head: rates (rows,) or (rows, heads)."""
    rates = rates[:, None] if rates.dim() == 1 else rates
    vectors = torch.randn(*rates.shape, SLOTS, 4, generator=torch.Generator().manual_seed(0))
    return layer_view(vectors, vectors, recorded={"distinct_rate:32": rates})


def limits(options, coefficients, budget=BUDGET, ends=None, rates=RATES):
    """Return N of every row."""
    allocation = build_allocation(f"by_distinct_rate({options})")
    with torch.no_grad():
        allocation.coefficients[:] = torch.tensor(coefficients)
    mean = torch.full((len(rates), 1, 1), budget)
    return allocation.layer_limit(view(rates), mean, ends or Ends(recent=1))[:, 0, 0].tolist()


@pytest.mark.parametrize("total", ["[0.25, 4]", "[1, 4]", "[0.25, 1]", "[1, 1]", "[0.5, 1.9]"])
def test_at_first_every_input_has_the_budget(total):
    assert limits(f"total={total}", [0.0, 0.0]) == [BUDGET] * len(RATES)


def test_it_is_the_formula():
    low, high = 0.5 * BUDGET, 3 * BUDGET
    begin = math.log(0.5 / 2.0)
    wanted = [round(low + (high - low) / (1 + math.exp(-(4 * (h - 0.5) - 1 + begin)))) for h in RATES.tolist()]
    assert limits("total=[0.5, 3]", [4.0, -1.0]) == wanted
    assert len(set(wanted)) > 2


@given(st.floats(-1e9, 1e9) | st.just(math.nan), st.floats(-1e9, 1e9), st.integers(1, 30), st.integers(0, 40))
def test_it_lies_within_the_bounds_and_goes_one_way(slope, shift, budget, recent):
    ends = Ends(recent=recent)
    counts = limits("total=[0.3, 2.5]", [slope, shift], budget, ends)
    least, most = max(1, math.ceil(0.3 * budget - 1e-6)), math.floor(2.5 * budget + 1e-6)
    assert all(least <= count <= max(most, min(budget, ends.floor)) for count in counts)
    assert all(count >= min(budget, ends.floor) for count in counts)
    assert counts == sorted(counts, reverse=slope < 0)


def test_a_layer_goes_by_the_mean_of_its_heads_and_all_of_them_get_as_much():
    rates = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    manager = build("fifo", budget=BUDGET, allocation="by_distinct_rate")
    with torch.no_grad():
        manager.allocation.coefficients[:] = torch.tensor([6.0, 0.0])
    kept = manager.decide(view(rates)).keep.sum(-1)
    assert kept.tolist() == [[BUDGET, BUDGET], [BUDGET, BUDGET]]
    assert manager.decide(view(torch.tensor([[1.0, 1.0]]))).keep.sum(-1).min() > BUDGET


def test_candidates_of_a_population_have_numbers_of_their_own():
    managers = []
    for slope in (-6.0, 0.0, 6.0):
        managers.append(build("lru", budget=BUDGET, allocation="by_distinct_rate"))
        with torch.no_grad():
            managers[-1].allocation.coefficients[0] = slope
    seen = view(torch.tensor([0.9, 0.9, 0.9]))
    seen = layer_view(seen.keys, seen.values, recorded={**seen.recorded, "recency": seen.age})
    together = PopulationPolicy(managers).decide(seen).keep
    alone = [manager.decide(seen).keep[row] for row, manager in enumerate(managers)]
    assert torch.equal(together, torch.stack(alone))
    assert together.sum(-1)[:, 0].tolist() == sorted(set(together.sum(-1)[:, 0].tolist()))


def test_what_cannot_be_learned_or_known_is_refused():
    policy = build("kv_policy", budget=BUDGET, features=["age"], allocation="by_distinct_rate")
    with pytest.raises(ConfigError, match="nothing is drawn of how many slots"):
        policy.require_draws()
    bare = layer_view(*[torch.randn(1, 1, SLOTS, 4)] * 2)
    with pytest.raises(ConfigError, match="observes 'distinct_rate:32'"):
        build("fifo", budget=BUDGET, allocation="by_distinct_rate").decide(bare)
