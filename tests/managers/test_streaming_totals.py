"""The budget is met at every decision while a text grows, whatever left before: by layers that decide one by one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomem.errors import CacheError
from evomem.evaluation import PopulationPolicy
from evomem.managers import build, build_allocation
from evomem.managers.allocation import clamped_shares
from evomem.managers.decision import Judgement, Rule
from evomem.managers.selection import Ends
from evomem.managers.vector import load_vector
from evomem.memory import LayerView, layer_view
from tests.managers.test_allocation import LOGS, OVER_LAYERS
from tests.support.slow_shares import quadratic_shares

ENDS = st.builds(Ends, st.integers(0, 6), st.integers(0, 8) | st.floats(0, 1), st.floats(0, 1))


def held_over_time(rule, reads, layers, heads, *, shares=None, refuse=lambda layer: 0.0, seed=0):
    """Slots held after every decision: (decisions, layers, heads). A layer makes all its decisions before the next.

    ``reads`` are the tokens read at every decision; ``shares`` log-shares for each, ``refuse`` the share of new tokens
    that a layer does not store.
    """
    counts = torch.zeros(len(reads), layers, heads, dtype=torch.int64)
    for layer in range(layers):
        generator = torch.Generator().manual_seed(100 * seed + layer)
        scores = torch.randn(1, heads, reads[-1], generator=generator) * (1 + torch.arange(heads))[:, None]
        stored = torch.rand(1, heads, reads[-1], generator=generator) >= refuse(layer)
        held, evicted, before = torch.zeros(1, heads, reads[-1], dtype=torch.bool), None, 0
        for number, read in enumerate(reads):
            held[..., before:read] = True
            slots = torch.where(held, torch.arange(reads[-1]), -1)[..., :read]
            empty = torch.zeros(1, heads, read, 0)
            view = LayerView(
                empty, empty, slots, torch.tensor([0]), read, read - before, layer, layers, evicted=evicted
            )
            own = None if shares is None else shares[number]
            decision = rule.decide(Judgement(scores[..., :read], stored[..., :read], shares=own), view)
            held[..., :read], evicted, before = decision.keep, decision.evicted, read
            counts[number, layer] = decision.keep.sum(-1)[0]
    return counts


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_the_total_is_the_budget_at_every_decision(data):
    """Random shares, ends, budgets and times; a ranking over heads or none; shares fixed, or new every time."""
    over = data.draw(OVER_LAYERS)
    if data.draw(st.booleans()):
        safeguard = data.draw(st.floats(0, 1))
        over = {"name": "across_heads", "options": {"layers": over, "safeguard": safeguard}}
    layers, heads, ends = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3)), data.draw(ENDS)
    budget = data.draw(st.floats(0.02, 1) | st.integers(1, 20))
    steps = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    reads = [sum(steps[: place + 1]) for place in range(len(steps))]
    drawn = None
    if data.draw(st.booleans()):
        drawn = [torch.tensor([data.draw(st.lists(st.floats(-4, 4), min_size=2, max_size=2))]) for _ in reads]
        over = "depth_shares(points=2)" if isinstance(over, str) or "layers" not in over["options"] else over
        if isinstance(over, dict):
            over["options"]["layers"] = "depth_shares(points=2)"
    held = held_over_time(Rule(budget, ends, build_allocation(over)), reads, layers, heads, shares=drawn)
    for read, here in zip(reads, held, strict=True):
        mean = min(budget, read) if isinstance(budget, int) else max(1, math.ceil(read * budget - 1e-6))
        assert int(here.sum()) == layers * heads * mean
        assert int(here.sum(-1).min()) >= heads * min(mean, ends.floor)


def test_the_case_of_the_issue():
    """Shares exp(3) to exp(-3), two fifths of the text, every 8 tokens, ends of 4 and 8: 80 slots, and not 72."""
    rule = Rule(0.4, Ends(4, 8), build_allocation("depth_shares(log_shares=[3, -3])"))
    held = held_over_time(rule, [8, 16, 24, 32, 40, 48], 4, 1)
    assert held.sum((1, 2)).tolist() == [4 * math.ceil(0.4 * read) for read in (8, 16, 24, 32, 40, 48)]


@settings(max_examples=40, deadline=None)
@given(logs=LOGS, ends=ENDS, budget=st.integers(1, 30), step=st.integers(1, 12))
def test_of_a_fixed_number_no_layer_wants_what_it_let_go(logs, ends, budget, step):
    """So counting what left changes nothing there: the decisions of before, to the bit."""
    rule = Rule(budget, ends, build_allocation({"name": "depth_shares", "options": {"log_shares": logs}}))
    reads = [step * (1 + place) for place in range(6)]
    counted = [torch.tensor([logs])] * len(reads)
    assert torch.equal(held_over_time(rule, reads, 4, 2), held_over_time(rule, reads, 4, 2, shares=counted))


def test_refused_tokens_are_not_made_up_for_by_other_layers():
    """Layers' limits follow from depth and tokens read alone: what one layer refuses changes no other one."""
    rule = Rule(0.5, Ends(2, 4), build_allocation("depth_shares(log_shares=[2, -2])"))
    reads = [8, 16, 24, 32]
    plain = held_over_time(rule, reads, 4, 2)
    refusing = held_over_time(rule, reads, 4, 2, refuse=lambda layer: 0.6 if layer == 0 else 0.0)
    assert torch.equal(refusing[:, 1:], plain[:, 1:])
    assert (refusing[:, 0] < plain[:, 0]).any()
    assert (refusing <= plain).all()


def test_candidates_of_a_population_count_by_themselves():
    """Each by its own shares, and those that count nothing among them; as each alone, from one row and from rows."""
    specs = ["keydiff(budget=0.4, allocation=3)"] * 2 + [
        "keydiff(budget=0.4)",
        "keydiff(budget=0.4, allocation=pyramid)",
    ]
    crowd = [build(spec).requires_grad_(False) for spec in specs]
    load_vector(crowd[0], [2.0, 0.0, -2.0])
    load_vector(crowd[1], [-1.0, 0.0, 1.0])
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 24, 4, generator=generator)
    shared = LayerView(keys, keys, torch.arange(24).expand(1, 2, 24), torch.tensor([0]), 24, 24, 1, 4)
    together = PopulationPolicy(crowd).decide(shared)
    rows = LayerView(
        keys.expand(4, -1, -1, -1), keys.expand(4, -1, -1, -1), torch.arange(24).expand(4, 2, 24),
        torch.zeros(4, dtype=torch.int64), 24, 24, 1, 4, evicted=torch.tensor([[0, 4, 8, 12]] * 4),
    )  # fmt: skip
    again = PopulationPolicy(crowd).decide(rows)
    alone = rows.map(lambda part: part[:1])
    for place, manager in enumerate(crowd):
        for one, whole in ((manager.decide(shared), together), (manager.decide(alone), again)):
            assert torch.equal(whole.keep[place], one.keep[0])
            wanted = torch.zeros(4, dtype=torch.int64) if one.evicted is None else one.evicted[0]
            assert torch.equal(whole.evicted[place], wanted)


def test_another_engine_hands_back_what_the_last_decision_said():
    """`layer_view` takes it; without it the layer would ask for slots that it let go."""
    rule, totals = Rule(0.4, Ends(4, 8), build_allocation("depth_shares(log_shares=[3, -3])")), [0, 0]
    for layer in range(4):
        keep, evicted = torch.zeros(0, dtype=torch.bool), None
        for number, read in enumerate((8, 48)):
            held = torch.cat((keep, torch.ones(read - len(keep), dtype=torch.bool))).nonzero()[:, 0]
            keys = torch.zeros(1, 1, len(held), 2)
            view = layer_view(keys, keys, held, seen=read, layer=layer, layers=4, evicted=evicted)
            decision = rule.decide(Judgement(held[None, None].float()), view)
            evicted, keep = decision.evicted, torch.zeros(read, dtype=torch.bool)
            keep[held[decision.keep[0, 0]]] = True
            totals[number] += int(keep.sum())
    assert totals == [16, 80]
    with pytest.raises(CacheError, match="one number a row and layer"):
        layer_view(keys, keys, layer=1, layers=4, evicted=evicted[:, :3])


# ---- the arithmetic ------------------------------------------------------------------------------------------------


def parts(count, rows, generator, *, spread):
    """Weights, floors, ceilings and a total that lies between the sums of both."""
    weights = torch.rand(count, rows, 1, 1, generator=generator, dtype=torch.float64) ** spread
    least = torch.randint(0, 5, (count, rows, 1, 1), generator=generator)
    most = least + torch.randint(0, 40, (count, rows, 1, 1), generator=generator)
    low, high = least.sum(0), most.sum(0)
    total = low + ((high - low) * torch.rand(rows, 1, 1, generator=generator)).long()
    return weights, least, most, total


@pytest.mark.parametrize("count", [1, 2, 3, 7, 30, 200])
def test_shares_between_bounds_are_those_of_the_old_formula(count):
    generator = torch.Generator().manual_seed(count)
    for spread in (0, 1, 30):  # equal weights, plain ones, and ones over many orders of magnitude
        given = parts(count, 9, generator, spread=spread)
        assert torch.equal(clamped_shares(*given), quadratic_shares(*given))
        weights, least, most, _ = given
        for total in (least.sum(0), most.sum(0)):
            assert torch.equal(clamped_shares(weights, least, most, total).sum(0), total)


def test_ten_thousand_parts_are_shared_out_without_ten_thousand_squared():
    given = parts(10_000, 1, torch.Generator().manual_seed(0), spread=3)
    found = clamped_shares(*given)
    assert torch.equal(found, quadratic_shares(*given))
    many = torch.stack([given[0], given[0].flip(0)])
    both = torch.func.vmap(clamped_shares, in_dims=(0, None, None, None))(many, *given[1:])
    assert torch.equal(both[0], found)
    assert torch.equal(both.sum(1), given[3].expand(2, 1, 1, 1))
