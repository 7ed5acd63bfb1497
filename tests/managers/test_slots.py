"""The allocation `slots`: its features against plain loops, totals by the input, and what it is at the start."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from evomem.errors import ConfigError
from evomem.managers import build, build_allocation
from evomem.managers.allocation import slots as slots_module
from evomem.managers.allocation.slots import INPUT_FEATURES, SHARE_FEATURES, TOTAL_FEATURES
from evomem.managers.decision import Judgement, Rule
from evomem.managers.selection import Ends
from evomem.memory import LayerView
from evomem.search_space.space import SearchSpace, load_space
from evomem.testing.conformance import CHECKS, run_check
from evomem.testing.models import tiny
from tests.support.probes import made_up, with_made_up_probes

LAYERS, HEADS, READ, DIM = 3, 2, 40, 6
STARTS = (0, 7)


def random_views(seed=0, read=READ, starts=STARTS, window=8):
    generator = torch.Generator().manual_seed(seed)
    views = []
    for layer in range(LAYERS):
        slots = torch.arange(read).expand(len(starts), HEADS, read).clone()
        start = torch.tensor(starts)
        slots[slots < start[:, None, None]] = -1
        rest = torch.rand(len(starts), HEADS, read, generator=generator) ** 3 * (slots >= 0)
        attention = rest / rest.sum(-1, keepdim=True)
        recorded = {
            f"window_attention:{window}": attention,
            f"window_entropy:{window}": -attention * torch.log(attention.clamp(min=1e-9)),
            f"window_variance:{window}": attention * torch.rand(attention.shape, generator=generator) / 10,
        }
        keys, values = (torch.randn(len(starts), HEADS, read, DIM, generator=generator) + layer for _ in range(2))
        views.append(LayerView(keys, values, slots, start, read, read, layer, LAYERS, recorded))
    return views


def allocation_of(spec="slots(window=8)", **numbers):
    made = with_made_up_probes(build_allocation(spec), LAYERS, HEADS)
    with torch.no_grad():
        for name, values in numbers.items():
            getattr(made, name).copy_(torch.tensor(values))
    return made


def only(name, names, value=1.0):
    return [value if one == name else 0.0 for one in names]


def slow_distinct(directions):
    """The tokens whose directions are further from the mean one than two standard deviations over the mean."""
    mean = sum(directions) / len(directions)
    apart = [1 - float(one @ mean / mean.norm()) for one in directions]
    return [token for token, one in enumerate(apart) if one > statistics.fmean(apart) + 2 * statistics.pstdev(apart)]


def slow_features(view, row, head):
    """Of one head, from its tokens one by one."""
    held = [(s, int(p)) for s, p in enumerate(view.slots[row, head]) if p >= 0]
    seen = {
        what: view.recorded[f"window_{what}:8"][row, head].tolist() for what in ("attention", "entropy", "variance")
    }
    keys = [view.keys[row, head, s].double() / view.keys[row, head, s].double().norm() for s, _ in held]
    values = [view.values[row, head, s].double() / view.values[row, head, s].double().norm() for s, _ in held]
    start, count = int(view.start[row]), len(held)
    return {
        "attention_entropy": sum(seen["entropy"][s] for s, _ in held) / math.log(count),
        "attention_variance": math.sqrt(sum(seen["variance"][s] for s, _ in held)),
        "recent_mass": sum(seen["attention"][s] for s, p in held if view.seen - 1 - p < 64),
        "sink_mass": sum(seen["attention"][s] for s, p in held if p - start < 4),
        "key_spread": 1 - float((sum(keys) / count).norm()),
        "distinct_keys": math.log((1 + len(slow_distinct(keys))) / 16),
        "distinct_values": math.log((1 + len(slow_distinct(values))) / 16),
    }


@pytest.mark.parametrize("name", SHARE_FEATURES)
def test_every_feature_is_that_of_a_loop_over_tokens(name):
    views, probes, mean = random_views(read=90), made_up(LAYERS, HEADS), torch.full((2, 1, 1), 6)
    logs = allocation_of(weights=only(name, SHARE_FEATURES)).log_shares(views, mean)
    for place in range(LAYERS * HEADS):
        view, head = views[place // HEADS], place % HEADS
        for row in range(2):
            depth = view.layer / (LAYERS - 1) - 0.5
            known = slow_features(view, row, head) | {"depth": depth, "depth_squared": depth**2}
            for probe in ("induction", "echo", "retrieval", "beyond_window"):
                known[f"probe_{probe}"] = math.log(float(probes[probe][place]) + 0.001)
            known |= {f"probe_{probe}": float(probes[probe][place]) for probe in ("sinks", "entropy")}
            read = view.seen - int(view.start[row])
            known["induction_by_scarcity"] = known["probe_induction"] * math.log(read / (8 * 6))
            assert float(logs.detach()[place, row]) == pytest.approx(known[name], abs=1e-5)


def test_at_first_it_is_the_shares_of_induction():
    views, mean = random_views(), torch.full((2, 1, 1), 6)
    scores = [torch.where(view.valid, torch.rand(view.slots.shape), -torch.inf) for view in views]
    plain = with_made_up_probes(build_allocation("probe_shares(power=0.5)"), LAYERS, HEADS)
    for ends in (Ends(), Ends(2, 3)):
        wanted = plain.limits(views, [mean] * LAYERS, scores, ends)
        found = allocation_of().limits(views, [mean] * LAYERS, scores, ends)
        assert all(map(torch.equal, found, wanted))
        with_total = allocation_of("slots(window=8, total=[0.5, 2])").limits(views, [mean] * LAYERS, scores, ends)
        assert all(map(torch.equal, with_total, wanted))


def kept(allocation, views, budget=6):
    generator = torch.Generator().manual_seed(3)
    judgements = [Judgement(torch.rand(view.slots.shape, generator=generator)) for view in views]
    decisions = Rule(budget, Ends(), allocation).decide_all(judgements, views)
    return sum(decision.keep.sum((1, 2)) for decision in decisions).tolist()


def test_the_total_is_between_its_bounds_and_goes_with_the_input():
    spec, heads = "slots(window=8, total=[0.5, 2])", LAYERS * HEADS
    for value, wanted in ((-9.0, 3), (0.0, 6), (math.log(1.5), 9), (9.0, 12)):
        allocation = allocation_of(spec, total_weights=only("one", TOTAL_FEATURES, value))
        assert kept(allocation, random_views()) == [wanted * heads] * 2
    longer = allocation_of(spec, total_weights=only("log_length", TOTAL_FEATURES, 0.5))
    totals = [kept(longer, random_views(read=read, starts=(0,)))[0] for read in (256, 512, 1024)]
    assert totals == [round(6 * 0.5**0.5) * heads, 6 * heads, round(6 * 2**0.5) * heads]


def test_without_a_budget_there_is_no_total_to_have_less_than():
    made = allocation_of("slots(window=8, total=[0.5, 2])", total_weights=only("one", TOTAL_FEATURES, -9.0))
    assert kept(made, random_views(), budget=None) == [(READ - start) * LAYERS * HEADS for start in STARTS]
    assert kept(made, random_views(), budget=1.0) == [
        math.ceil((READ - start) / 2) * LAYERS * HEADS for start in STARTS
    ]


@pytest.mark.parametrize(("bounds", "budget", "fewest", "most"), [
    ([0.5, 2], 5, 3, 10), ([0.37, 1.3], 2, 1, 2), ([0.37, 1.3], 16, 6, 20), ([0.1, 1.1], 10, 1, 11),
    ([0.01, 1], 3, 1, 3),
])  # fmt: skip
def test_whole_slots_are_within_the_bounds_whatever_the_numbers(bounds, budget, fewest, most):
    """Rounding to whole slots leaves them nowhere, and numbers that cancel leave the budget as it is."""
    views, mean = random_views(read=90), torch.full((2, 1, 1), budget)
    for value, wanted in ((-math.inf, fewest), (-9.0, fewest), (0.0, budget), (9.0, most), (math.inf, most)):
        made = allocation_of(f"slots(window=8, total={bounds})", total_weights=only("one", TOTAL_FEATURES, value))
        assert made.mean_slots(views, mean).flatten().tolist() == [wanted] * 2
    cancelling = [math.inf, math.inf, -math.inf, math.nan, 1e38]
    made = allocation_of(f"slots(window=8, total={bounds})", total_weights=cancelling)
    assert all(fewest <= count <= most for count in made.mean_slots(views, mean).flatten().tolist())
    made = allocation_of(f"slots(window=8, total={bounds})", total_weights=[0.0, math.inf, -math.inf, 0.0, 0.0])
    views[0].keys[:] = math.nan
    assert made.mean_slots(views, mean).flatten().tolist() == [budget] * 2


@pytest.mark.parametrize("name", TOTAL_FEATURES[:3])
def test_what_the_total_goes_by_are_means_over_all_heads(name):
    views, mean = random_views(), torch.full((2, 1, 1), 1000)
    made = allocation_of("slots(window=8, total=[0.01, 60])", total_weights=only(name, TOTAL_FEATURES))
    for row, found in enumerate(made.mean_slots(views, mean)[:, 0, 0].tolist()):
        slow = [slow_features(view, row, head)[name] for view in views for head in range(HEADS)]
        assert found == pytest.approx(1000 * math.exp(sum(slow) / len(slow)), abs=1)


@pytest.mark.parametrize("name", ["distinct_keys", "distinct_values"])
def test_the_total_grows_with_what_stands_out_and_not_with_filler(name):
    made = allocation_of("slots(window=8, total=[0.05, 9])", total_weights=only(name, TOTAL_FEATURES))
    mean = torch.full((1, 1, 1), 160)

    def total(facts, filler):
        generator = torch.Generator().manual_seed(5)
        views = random_views(read=facts + filler, starts=(0,))
        common, rare = torch.randn(2, DIM, generator=generator)
        for view in views:
            tensor = view.keys if name == "distinct_keys" else view.values
            tensor[:] = common + torch.randn(tensor.shape, generator=generator) / 100
            tensor[:, :, :facts] = rare + torch.randn(tensor[:, :, :facts].shape, generator=generator) / 100
        return int(made.mean_slots(views, mean))

    assert total(0, 300) < 200  # rounding and chance alone
    assert [total(facts, 300) for facts in (3, 6, 12)] == [40, 70, 130]
    assert [total(6, filler) for filler in (200, 400, 800)] == [70] * 3


def test_whether_a_token_is_distinct_does_not_depend_on_rounding():
    """One that fills a fifth of a text of two kinds is exactly two deviations away, with padding and without."""
    generator = torch.Generator().manual_seed(0)
    for fifth in range(1, 40):
        kinds = torch.nn.functional.normalize(torch.randn(2, DIM, generator=generator), dim=-1).double()
        text = kinds[(torch.randperm(5 * fifth, generator=generator) < fifth).long()]
        for padding in (0, 1, 5):
            directions = torch.cat((torch.zeros(padding, DIM), text))[None, None]
            valid = (torch.arange(padding + 5 * fifth) >= padding)[None, None]
            assert float(slots_module._distinct(directions, valid)) == math.log(1 / 16)
        fewer = torch.cat((text, kinds[:1].expand(fifth, -1)))[None, None]
        found = slots_module._distinct(fewer, torch.ones(1, 1, 6 * fifth, dtype=torch.bool))
        assert float(found) == pytest.approx(math.log((1 + fifth) / 16))


def test_a_padded_row_decides_as_alone():
    made = allocation_of(weights=[0.3 * (-1) ** n * n for n in range(len(SHARE_FEATURES))])
    together = random_views()
    logs = made.log_shares(together, torch.full((2, 1, 1), 6))
    for row, start in enumerate(STARTS):
        alone = [
            LayerView(
                *(t[row : row + 1, :, start:] for t in (view.keys, view.values)),
                view.slots[row : row + 1, :, start:] - start, torch.zeros(1, dtype=torch.int64), READ - start,
                READ - start, view.layer, LAYERS,
                {name: t[row : row + 1, :, start:] for name, t in view.recorded.items()},
            )
            for view in together
        ]  # fmt: skip
        torch.testing.assert_close(made.log_shares(alone, torch.full((1, 1, 1), 6))[:, 0], logs[:, row])


def test_log_shares_of_single_heads_come_on_top():
    made = allocation_of("slots(window=8, per_head=per_head_shares(layers=3, heads=2))", weights=[0.0] * 14)
    plain = build_allocation("per_head_shares(layers=3, heads=2)")
    shares = torch.tensor([[1.0, 0.0], [-1.0, 2.0], [0.0, 0.5]])
    with torch.no_grad():
        made.per_head.log_shares.copy_(shares)
        plain.log_shares.copy_(shares)
    views, mean = random_views(), torch.full((2, 1, 1), 6)
    scores = [torch.where(view.valid, 1.0, -torch.inf) for view in views]
    assert all(map(torch.equal, *(one.limits(views, [mean] * 3, scores, Ends()) for one in (made, plain))))
    assert [name for name, _ in made.named_parameters()] == ["weights", "per_head.log_shares"]


@pytest.mark.parametrize("spec", [
    "slots(total=[2, 3])", "slots(total=[0, 2])", "slots(total=[1, 1000])", "slots(per_head=uniform)",
    "slots(window=0)",
])  # fmt: skip
def test_what_means_nothing_is_refused(spec):
    with pytest.raises(ConfigError, match=r"total|per_head|window"):
        build_allocation(spec)


@pytest.mark.parametrize("check", CHECKS)
def test_conformance(check):
    spec = "snapkv(budget=8, window=4, every=16, allocation=slots(window=4, total=[0.5, 2]))"
    manager, generator = build(spec), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in manager.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 4)
    run_check(check, manager, tiny("llama"))


def test_the_search_space_has_fourteen_numbers_and_begins_at_induction():
    space = SearchSpace(load_space("slots"))
    assert space.dim == len(SHARE_FEATURES) == 14
    manager = space.decode(space.start)
    assert manager.allocation.weights[SHARE_FEATURES.index("probe_induction")] == 0.5
    assert len(INPUT_FEATURES) == 5
    model = tiny("llama", seed=1)
    spec = "keydiff(budget=6,allocation={})"
    held = []
    for made in (space.decode(space.start).with_options(budget=6), build(spec.format("probe_shares(power=0.5)"))):
        with made.attach(model) as cache, torch.no_grad():
            model(input_ids=torch.arange(40, 80)[None], past_key_values=cache)
        held.append(torch.stack(cache.slots_held()))
    assert torch.equal(*held)
