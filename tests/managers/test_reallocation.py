"""The same scorer under another allocation: scores are the same bits, only how many slots heads get differs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from evomem.errors import ConfigError
from evomem.managers import allocations, build, build_allocation
from evomem.managers.allocation import LUKV, arithmetic
from evomem.managers.reallocation import reallocate, with_allocation
from evomem.managers.selection import Ends
from evomem.testing.models import tiny
from tests.managers.test_allocation import full_views

FEATURES = ("key_norm", "keydiff", "value_norm")
FIELD = ("uniform", "pyramid(beta=4)", "across_heads", "lava(window=4)", "cake(window=4)", "razor", "duo", "headkv")
NUMBERLESS = (*FIELD, "probe_shares(probe=retrieval, power=0.5)")


def searched(allocation=3, **options):
    """Return a feature scorer with random numbers, those of its allocation among them."""
    options = {"hidden": 2, **options}
    manager = build("feature_scorer", features=FEATURES, budget=10, allocation=allocation, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in manager.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return manager.requires_grad_(False)


def random_views():
    """Return views of two layers of two heads, two rows, with random keys and values."""
    generator = torch.Generator().manual_seed(0)
    return [
        replace(view, **{name: torch.randn(2, 2, 30, 4, generator=generator) for name in ("keys", "values")})
        for view in full_views(2, 30, (0, 4), 2)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("manager", [searched(), searched("per_head_shares(layers=2, heads=2)", sinks=1, every=4)])
def test_scores_are_the_same_bits_and_all_else_of_the_scorer_stays(manager, dtype):
    manager = build(manager.describe()).to(dtype)
    with torch.no_grad():
        for parameter in manager.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    views = random_views()
    expected = [manager.score(view) for view in views]
    for spec in NUMBERLESS:
        made = reallocate(manager, spec)
        assert made.manager.allocation.describe() == build_allocation(spec).describe()
        assert all(torch.equal(made.manager.score(view), one) for view, one in zip(views, expected, strict=True))
        before, after = (one.options.model_dump() for one in (manager, made.manager))
        assert {**after, "allocation": None} == {**before, "allocation": None}
        assert (made.manager.ends, made.manager.schedule) == (manager.ends, manager.schedule)
        assert made.manager.weights.dtype == dtype
        (name,) = made.dropped
        assert made.dropped[name] == dict(manager.named_parameters())[name].numel()
        assert not made.initial
        assert build_allocation(made.before).describe() == manager.allocation.describe()
        assert build_allocation(made.after).describe() == made.manager.allocation.describe()


def test_only_counts_differ_and_their_sum_does_not():
    """Every head keeps the best of one ranking, however many it gets."""
    manager = searched(sinks=0, recent=0)
    views = random_views()
    counts = {}
    for spec in ("uniform", "pyramid(beta=4)", "across_heads(safeguard=0)", "per_head_shares(points=2, heads=2)"):
        other = reallocate(manager, spec).manager
        decisions = other.decide_all(views)
        counts[spec] = [decision.keep.sum(-1) for decision in decisions]
        assert all((sum(count[row].sum() for count in counts[spec]) == 2 * 2 * 10) for row in range(2))
        for view, decision in zip(views, decisions, strict=True):
            scores = torch.where(view.valid, manager.score(view), -torch.inf)
            kept = torch.where(decision.keep, scores, torch.inf).amin(-1)
            gone = torch.where(decision.keep, -torch.inf, scores).amax(-1)
            assert bool((kept >= gone).all())
    assert all(bool((count == 10).all()) for count in counts["uniform"])
    equal = counts["per_head_shares(points=2, heads=2)"]
    assert all(torch.equal(a, b) for a, b in zip(equal, counts["uniform"], strict=True))
    assert any(bool((count != 10).any()) for count in counts["across_heads(safeguard=0)"])


def test_numbers_of_the_old_allocation_go_and_those_of_the_new_begin():
    manager = searched(allocation=3)
    made = reallocate(manager, "across_heads(layers=depth_shares(points=3))")
    assert made.dropped == made.initial == {"log_shares": 3}
    assert made.equal
    assert not made.manager.log_shares.any()
    made = reallocate(manager, "slots(total=[0.5, 2])")
    assert made.initial == {"allocation.weights": 14, "allocation.total_weights": 5}
    assert not made.equal
    assert "as a search begins" in made.doubt("x")
    assert "all equal" in reallocate(manager, "layer_budgets(layers=2)").doubt("x")
    assert made.loss("x") == (
        "x: its numbers for depth_shares(points=3) have no part under another allocation: log_shares (3 numbers)"
    )


def test_an_allocation_that_a_manager_has_already_keeps_its_numbers():
    manager = searched(allocation=3)
    made = reallocate(manager, "depth_shares(points=3)")
    assert made.same
    assert made.manager is manager
    assert not made.loss("x") + made.doubt("x")
    assert reallocate(build("keydiff"), "uniform").same
    assert reallocate(build("cake"), "cake").same
    assert not reallocate(build("cake"), "uniform").same


def test_what_was_measured_on_a_model_is_no_number_of_a_search():
    manager = build("keydiff(allocation=probe_shares, budget=8)").for_model(tiny("llama", layers=2))
    made = reallocate(manager, "razor")
    assert not made.dropped
    assert made.manager.allocation.model_fingerprint is None


@pytest.mark.parametrize("name", sorted(allocations.names()))
def test_every_allocation_fits_a_scorer_or_says_what_it_needs(name):
    needs = {"per_head_shares": "heads", "layer_budgets": "layers", "depth_shares": "points", "lukv": "evomem allocate"}
    if name in needs:
        with pytest.raises(ConfigError, match=needs[name]):
            reallocate(build("keydiff"), name)
    else:
        assert reallocate(build("knorm"), name).manager.allocation.name == name


def test_curves_are_of_the_very_ranking():
    with pytest.raises(ConfigError, match=r"measure them with `evomem allocate RUN_OR_PLUGIN"):
        reallocate(searched(), "lukv(layers=2, heads=2)")
    measured = with_allocation(searched(), "lukv(layers=2, heads=2, points=4)")
    measured.allocation.set_curves(measured.allocation.knots, torch.rand(2, 2, 4).sort(-1, descending=True).values)
    with pytest.raises(ConfigError, match="under the very ranking"):
        reallocate(measured, "lukv(layers=2, heads=2, points=5)")
    assert isinstance(reallocate(measured, "lukv(layers=2, heads=2, points=4)").manager.allocation, LUKV)
    assert reallocate(measured, "uniform").dropped == {"allocation.knots": 5, "allocation.marginal": 16}


@pytest.mark.parametrize("spec", ["full", "pyramidkv", "adakv(keydiff)", "namm(selection=threshold)"])
def test_a_manager_whose_method_shares_out_the_budget_is_refused(spec):
    for allocation in ("uniform", "pyramid", "across_heads", "lava"):
        with pytest.raises(ConfigError, match="it takes no other allocation; give its scorer alone"):
            reallocate(build(spec), allocation)


def test_a_scorer_that_depends_on_its_allocation_is_refused(monkeypatch):
    manager = searched()
    real = manager.state_dict()
    monkeypatch.setattr(manager, "state_dict", lambda: {**real, "bias": manager.bias[:1]})
    with pytest.raises(ConfigError, match="bias depends on its allocation"):
        with_allocation(manager, "lava")


def test_numbers_of_a_model_of_another_shape_are_said(caplog):
    """Once: they are interpolated, which no figure shows."""
    views = random_views()
    arithmetic.say_other_shape.cache_clear()
    fitting = ("per_head_shares(layers=2, heads=2)", "per_head_shares(points=7, heads=2)", "layer_budgets(layers=2)")
    others = {
        "per_head_shares(layers=30, heads=2)": "for 30 layers of 2 KV heads, and this model has 2 layers of 2:",
        "slots(per_head=per_head_shares(layers=2, heads=3))": "for 2 layers of 3 KV heads, and this model has 2 layers",
        "per_head_shares(points=7, heads=3)": "for layers of 3 KV heads, and this model has 2 layers of 2:",
        "layer_budgets(layers=5)": "for 5 layers, and this model has 2:",
    }
    for spec in (*fitting, *others):
        allocation = build_allocation(spec)
        for _ in range(2):
            if spec.startswith("layer"):
                allocation.limits(views[0], torch.full((2, 1, 1), 8), torch.zeros(2, 2, 30), Ends())
            else:
                (getattr(allocation, "per_head", None) or allocation).log_shares_of([2, 2], torch.device("cpu"))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(others)
    assert all(text in line for text, line in zip(others.values(), said, strict=True))
