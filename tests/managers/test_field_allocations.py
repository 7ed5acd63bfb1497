"""The allocations of the field against their formulas, worked out slowly; their scorers, and where they are used."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomem.errors import ConfigError
from evomem.evaluation import EvaluationProtocol, Evaluator
from evomem.evaluation.measurement import EXACT
from evomem.managers import allocations, build, build_allocation
from evomem.managers.allocation import PROBES, HeadProbes, head_probes
from evomem.managers.allocation.by_weight import ends_at
from evomem.managers.selection import Ends, slots_of_budget
from evomem.memory import LayerView
from evomem.memory.observations import parse_observation
from evomem.models import LoadedModel
from evomem.plugins import load, save
from evomem.testing.conformance import CHECKS, run_check
from evomem.testing.models import tiny, tiny_tokenizer
from tests.evaluation.test_evaluation import TASK, make_sample
from tests.support import field_allocations as slow

WINDOW, SEEN, DIM = 5, 30, 4
ENDS = (Ends(), Ends(2, 3), Ends(recent=WINDOW, recent_share=0.5), Ends(3, 0.25), Ends(0.1, 0.1))
OBSERVING = ("cake", "lava")
PROBED = ("razor", "duo", "headkv")


def made_views(seed: int, held: list[list[list[int]]], starts: tuple[int, ...] = (0, 4)) -> list[LayerView]:
    """Views of layers whose heads hold so many tokens: held[layer][row][head]; the newest, and older ones by chance."""
    generator = torch.Generator().manual_seed(seed)
    views = []
    for layer, rows in enumerate(held):
        most = max(max(row) for row in rows)
        slots = torch.full((len(rows), len(rows[0]), most), -1)
        for row, counts in enumerate(rows):
            for head, count in enumerate(counts):
                tokens = torch.randperm(SEEN - starts[row] - 1, generator=generator)[: count - 1] + starts[row]
                slots[row, head, most - count :] = torch.cat((tokens.sort().values, torch.tensor([SEEN - 1])))
        shape = {"batch": len(rows), "kv_heads": len(rows[0]), "slots": most}
        recorded: dict[str, torch.Tensor] = {}
        for name in ("window_entropy", "window_variance", "window_group_peak"):
            recorded |= parse_observation(f"{name}:{WINDOW}").example(shape, generator)
        recorded = {name: x * 10.0 ** torch.randint(-3, 2, (1,), generator=generator) for name, x in recorded.items()}
        keys, values = (torch.randn(*slots.shape, DIM, generator=generator) for _ in range(2))
        start = torch.tensor(starts)
        views.append(LayerView(keys, values, slots, start, SEEN, SEEN, layer, len(held), recorded))
    return views


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[LayerView], Ends, torch.Tensor, list[torch.Tensor]]:
    """Views of ragged heads, or of heads that hold everything; ends, a budget's means, and scores."""
    layers, heads = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    whole = draw(st.booleans())
    starts = (0, 4)
    held = [
        [[SEEN - start if whole else draw(st.integers(1, SEEN - start)) for _ in range(heads)] for start in starts]
        for _ in range(layers)
    ]
    views = made_views(draw(st.integers(0, 99)), held, starts)
    mean = slots_of_budget(draw(st.integers(1, 40) | st.floats(0.05, 1)), views[0])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    scores = [torch.where(v.valid, torch.randn(v.slots.shape, generator=generator), -torch.inf) for v in views]
    return views, draw(st.sampled_from(ENDS)), mean, scores


def close(found: list[float], ideal: list[float]) -> bool:
    return all(abs(a - b) <= 1 + 1e-3 for a, b in zip(found, ideal, strict=True))


@settings(max_examples=60, deadline=None)
@given(case=cases(), tau1=st.floats(0.3, 3), tau2=st.floats(0.3, 3))
def test_cake_gives_layers_what_its_preferences_say(case: Any, tau1: float, tau2: float) -> None:
    views, ends, mean, scores = case
    allocation = build_allocation({"name": "cake", "options": {"window": WINDOW, "tau1": tau1, "tau2": tau2}})
    limits = allocation.limits(views, [mean] * len(views), scores, ends)
    found = torch.stack([x.expand(2, views[0].slots.shape[1], 1) for x in limits])[..., 0]
    heads = found.shape[-1]
    sure = ends_at(ends, mean)
    for row in range(2):
        weights = [slow.cake_preference(view, row, WINDOW, tau1, tau2) for view in views]
        usable = [view.valid[row].sum(-1).tolist() for view in views]
        flat = [u for layer in usable for u in layer]
        n, mine = int(mean[row]), found[:, row].flatten().tolist()
        assert sum(mine) == n * len(flat)
        each = [w for w in weights for _ in range(heads)]
        ideal = slow.shared(each, [min(int(sure[row]), u) for u in flat], flat, n * len(flat))
        assert close(mine, ideal)
        if all(u == layer[0] for layer in usable for u in layer):
            assert (found[:, row] == found[:, row, :1]).all()  # the same for all heads of a layer


@settings(max_examples=60, deadline=None)
@given(case=cases(), safeguard=st.sampled_from([0.0, 0.3, 1.0]))
def test_lava_gives_layers_their_entropy_and_heads_their_ranks(case: Any, safeguard: float) -> None:
    views, ends, mean, scores = case
    allocation = build_allocation({"name": "lava", "options": {"window": WINDOW, "kernel": 3, "safeguard": safeguard}})
    limits = allocation.limits(views, [mean] * len(views), scores, ends)
    sure, heads = ends_at(ends, mean), views[0].slots.shape[1]
    for row in range(2):
        n = int(mean[row])
        weights = [slow.lava_entropy(view, row, WINDOW, 3) for view in views]
        usable = [view.valid[row].sum(-1).tolist() for view in views]
        totals = [int(limit[row].sum()) for limit in limits]
        assert sum(totals) == n * heads * len(views)
        least = [sum(min(int(sure[row]), u) for u in layer) for layer in usable]
        assert close(totals, slow.shared(weights, least, [sum(layer) for layer in usable], n * heads * len(views)))
        for view, score, limit, total, counts in zip(views, scores, limits, totals, usable, strict=True):
            if total >= sum(counts):
                assert all(int(x) >= count for x, count in zip(limit[row], counts, strict=True))
                continue
            # One head at a time: protected tokens and the safe part first, then by score, older ones first.
            rows = []
            for head in range(heads):
                held = [s for s, token in enumerate(view.slots[row, head].tolist()) if token >= 0]
                window, sinks = int(ends.window(mean)[row]), int(ends.first(mean)[row])
                first = {
                    s for s in held if int(view.age[row, head, s]) < window or int(view.position[row, head, s]) < sinks
                }
                order = sorted(held, key=lambda s: (s not in first, -float(score[row, head, s]), s))
                safe = set(order[: int(safeguard * (total // heads) + 1e-9)]) | first
                rows += [
                    (s not in safe, -float(score[row, head, s]), int(view.slots[row, head, s]), head) for s in held
                ]
            if sum(not one[0] for one in rows) > total:
                continue  # heads that hold less than others leave less than all safe parts: any choice among them
            kept = sorted(rows)[:total]
            assert [int(x) for x in limit[row]] == [sum(one[3] == head for one in kept) for head in range(heads)]


@pytest.mark.parametrize("budget", [6, 9])
def test_layers_of_more_heads_get_more(budget: int) -> None:
    """Of two layers that are alike, the one of three heads has three times the slots of the one of a head."""
    views = made_views(7, [[[26] * 3, [26] * 3], [[26], [26]], [[26] * 3, [26] * 3]])
    for view in views:
        for tensor in view.recorded.values():
            tensor.fill_(0.25)
        view.values.fill_(1.0)
    scores = [torch.randn(view.slots.shape, generator=torch.Generator().manual_seed(1)) for view in views]
    mean = torch.full((2, 1, 1), budget)
    for name in OBSERVING:
        allocation = build_allocation({"name": name, "options": {"window": WINDOW}})
        limits = allocation.limits(views, [mean] * 3, scores, Ends())
        totals = torch.stack([limit.sum((1, 2)) for limit in limits])
        assert totals.sum(0).tolist() == [7 * budget] * 2
        assert ((totals - torch.tensor([3, 1, 3])[:, None] * budget).abs() <= 1).all()


# ---- by what heads do on synthetic text -----------------------------------------------------------------------------


def probed(spec: str, values: torch.Tensor, heads: int) -> Any:
    """An allocation that knows (heads of all layers, probes)."""
    allocation = build_allocation(spec)
    allocation.keep_probes(HeadProbes(values, (heads,) * (len(values) // heads), "ab" * 32))
    return allocation


def limits_of(allocation: Any, case: Any) -> tuple[list[list[int]], list[list[int]], list[int], list[int]]:
    """Per row: limits and slots held, of all heads, layer by layer; the mean, and what ends take at it."""
    views, ends, mean, scores = case
    limits = allocation.limits(views, [mean] * len(views), scores, ends)
    rows = range(2)
    found = [[int(x) for limit in limits for x in limit[row, :, 0]] for row in rows]
    held = [[int(x) for view in views for x in view.valid[row].sum(-1)] for row in rows]
    return found, held, mean.flatten().tolist(), ends_at(ends, mean).flatten().tolist()


def random_probes(count: int, seed: int) -> torch.Tensor:
    values = torch.rand(count, len(PROBES), generator=torch.Generator().manual_seed(seed))
    return torch.round(values * 4) / 4  # with equal ones


@settings(max_examples=60, deadline=None)
@given(case=cases(), seed=st.integers(0, 99), induction=st.floats(0, 1), echo=st.floats(0, 1), c=st.floats(1, 9))
def test_razor_gives_retrieval_heads_c_times_as_much(
    case: Any, seed: int, induction: float, echo: float, c: float
) -> None:
    views = case[0]
    heads = views[0].slots.shape[1]
    values = random_probes(heads * len(views), seed)
    options = {"induction": induction, "echo": echo, "compression": c}
    allocation = probed({"name": "razor", "options": options}, values, heads)
    kept = set(slow.first(values[:, PROBES.index("induction")].tolist(), induction))
    kept |= set(slow.first(values[:, PROBES.index("echo")].tolist(), echo))
    for found, held, n, sure in zip(*limits_of(allocation, case), strict=True):
        assert sum(found) == n * len(held)
        weights = [1.0 if head in kept else 1 / c for head in range(len(held))]
        ideal = slow.shared(weights, [min(sure, u) for u in held], held, n * len(held))
        assert close(found, ideal)


@settings(max_examples=60, deadline=None)
@given(case=cases(), seed=st.integers(0, 99), retrieval=st.floats(0, 1), streaming=st.integers(1, 20) | st.floats(0, 1))
def test_duo_gives_streaming_heads_a_fixed_number(case: Any, seed: int, retrieval: float, streaming: float) -> None:
    views = case[0]
    heads = views[0].slots.shape[1]
    values = random_probes(heads * len(views), seed)
    options = {"retrieval": retrieval, "streaming": streaming}
    allocation = probed({"name": "duo", "options": options}, values, heads)
    kept = set(slow.first(values[:, PROBES.index("beyond_window")].tolist(), retrieval))
    for found, held, n, sure in zip(*limits_of(allocation, case), strict=True):
        assert sum(found) == n * len(held)
        few = min(streaming, n) if isinstance(streaming, int) else int(streaming * n + 1e-6)
        least = [min(u, sure if head in kept else max(sure, few)) for head, u in enumerate(held)]
        # Retrieval heads share all that is left; what they cannot use, the others.
        most = [u if head in kept else low for head, (u, low) in enumerate(zip(held, least, strict=True))]
        if sum(most) >= n * len(held):
            ideal = slow.shared([float(head in kept) for head in range(len(held))], least, most, n * len(held))
        else:
            ideal = slow.shared([float(head not in kept) for head in range(len(held))], most, held, n * len(held))
        assert close([min(x, u) for x, u in zip(found, held, strict=True)], [*map(min, ideal, held)])


@settings(max_examples=60, deadline=None)
@given(case=cases(), seed=st.integers(0, 99), beta=st.floats(1, 10), power=st.floats(0, 3))
def test_headkv_shares_a_pool_by_scores(case: Any, seed: int, beta: float, power: float) -> None:
    views = case[0]
    heads = views[0].slots.shape[1]
    values = random_probes(heads * len(views), seed)
    allocation = probed({"name": "headkv", "options": {"beta": beta, "power": power}}, values, heads)
    scores = [x**power for x in values[:, PROBES.index("retrieval")].tolist()]
    count = len(scores)
    parts = [x / sum(scores) if sum(scores) else 1 / count for x in scores]
    for found, held, n, sure in zip(*limits_of(allocation, case), strict=True):
        assert sum(found) == n * count
        b = n - sure
        published = [sure + b - b / beta + part * count * b / beta for part in parts]
        if all(x <= u for x, u in zip(published, held, strict=True)):
            assert close(found, published)
        weights = [1 - 1 / beta + part * count / beta for part in parts]
        assert close(found, slow.shared(weights, [min(sure, u) for u in held], held, n * count))


# ---- their own scorers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBSERVING)
def test_a_method_by_its_name_is_scorer_and_allocation(name: str) -> None:
    """With the same window; another allocation leaves the scores."""
    made = build(f"{name}(window={WINDOW})", budget=9)
    assert made.whole_model
    assert made.allocation.name == name
    assert made.allocation.options.window == WINDOW
    views = made_views(3, [[[20, 20], [20, 20]]] * 3)
    for view in views:
        view.recorded[f"window_attention:{WINDOW}"] = view.recorded[f"window_group_peak:{WINDOW}"]
    kernel = ",kernel=7" if name == "lava" else ""
    explicit = build(f"{name}(window={WINDOW},allocation={name}(window={WINDOW}{kernel}))", budget=9)
    uniform = build(f"{name}(window={WINDOW},allocation=uniform)", budget=9)
    for mine, theirs, view in zip(made.decide_all(views), explicit.decide_all(views), views, strict=True):
        assert torch.equal(mine.keep, theirs.keep)
        assert torch.equal(made.score(view), uniform.score(view))
    assert [int(d.keep.sum()) for d in uniform.decide_all(views)] == [36] * 3
    with pytest.raises(ConfigError, match="adakv"):
        build(f"adakv({name})")


@pytest.mark.parametrize("name", OBSERVING)
def test_every_layer_keeps_its_window_as_published(name: str) -> None:
    """Where the budget is twice the window or more, all heads keep the window, whatever else their layer gets."""
    views = made_views(5, [[[26, 26], [26, 26]]] * 4)
    for weak, view in zip((1.0, 1e-6, 1e-3, 1.0), views, strict=True):
        view.recorded[f"window_attention:{WINDOW}"] = view.recorded[f"window_group_peak:{WINDOW}"]
        for tensor in view.recorded.values():
            tensor.mul_(weak)
    made = build(f"{name}(window={WINDOW})", budget=2 * WINDOW)
    kept = torch.stack([d.keep.sum(-1) for d in made.decide_all(views)])
    assert kept.sum((0, 2)).tolist() == [4 * 2 * 2 * WINDOW] * 2
    assert len(set(kept.flatten().tolist())) > 1
    for decision, view in zip(made.decide_all(views), views, strict=True):
        assert decision.keep[view.valid & (view.age < WINDOW)].all()


# ---- wherever managers are used -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


def spec(name: str, options: str = "") -> str:
    window = "(window=4)" if name in OBSERVING else ""
    return f"keydiff(budget=8,{options}allocation={name}{window})"


@pytest.mark.parametrize("kind", ["compress_once", "streaming"])
def test_the_evaluator_equals_the_plain_way(kind: str, model: Any) -> None:
    """Among scorers with parameters, which go through vmap, and with the methods as published."""
    evaluator = Evaluator(
        LoadedModel("llama", model, tiny_tokenizer(), "llama"), EvaluationProtocol(kind=kind, every=16)
    )
    population = [build(spec(name)) for name in (*OBSERVING, *PROBED)]
    population += [build(f"{name}(window=4,budget=8)") for name in OBSERVING]
    for seed in range(2):
        for name in (*OBSERVING, "razor"):
            scorer = build(spec(name).replace("keydiff(", "feature_scorer(features=[keydiff,age],"))
            scorer.weights.data = torch.randn(scorer.weights.shape, generator=torch.Generator().manual_seed(seed))
            population.append(scorer)
    sample = make_sample()
    fast = evaluator.evaluate(population, sample, TASK, EXACT)
    plain = [evaluator.evaluate_plainly(one, sample, TASK, EXACT) for one in population]
    for mine, theirs in zip(fast, plain, strict=True):
        assert mine.loglik == pytest.approx(theirs.loglik, abs=1e-5)
        assert (mine.exact, mine.slots, mine.bytes_peak) == (theirs.exact, theirs.slots, theirs.bytes_peak)
        assert kind == "streaming" or mine.slots == 8
    assert len({round(one.loglik or 0, 7) for one in fast}) > 4


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("made", ["cake(window=4,budget=8,every=16)", spec("lava", "every=16,"), spec("duo")])
def test_conformance(check: str, made: str, model: Any) -> None:
    run_check(check, build(made).for_model(model), model)


@pytest.mark.parametrize("name", [*OBSERVING, *PROBED])
def test_plugins_carry_them_to_models_of_other_shapes(name: str, tmp_path: Any) -> None:
    made = build(spec(name))
    save(made, tmp_path / "plugin")
    config = json.loads((tmp_path / "plugin" / "config.json").read_text())
    assert config["observes"] == sorted(made.observes)
    assert config["allocation"]["name"] == name
    again = load(tmp_path / "plugin")
    for layers, heads in ((5, 2), (1, 4)):
        other = tiny("llama", layers=layers, num_key_value_heads=heads)
        with again.attach(other) as cache, torch.no_grad():
            other(torch.randint(5, 120, (2, 40), generator=torch.Generator().manual_seed(1)), past_key_values=cache)
        assert sum(held.sum(-1) for held in cache.slots_held()).tolist() == [layers * heads * 8] * 2


def test_their_options_are_checked() -> None:
    wrongs = "cake(tau1=0)", "lava(kernel=4)", "lava(safeguard=2)", "cake(window=0)"
    for wrong in (*wrongs, "razor(compression=0)", "duo(streaming=true)", "duo(probe=sinks)", "headkv(beta=0.5)"):
        with pytest.raises(ConfigError, match="allocation"):
            build(f"keydiff(allocation={wrong})")
    assert {*OBSERVING, *PROBED} <= set(allocations.names())


def test_heads_are_told_apart_by_the_models_own_probes(model: Any) -> None:
    """Retrieval heads of this model hold more than its others, and another model has others."""
    ids = torch.randint(5, 120, (1, 60), generator=torch.Generator().manual_seed(1))
    for seed in (0, 1):
        other = tiny("llama", seed=seed, layers=4)
        induction = head_probes(other)["induction"]
        manager = build("streaming_llm(budget=12,allocation=razor(induction=0.3,echo=0,compression=4))")
        with manager.attach(other) as cache, torch.no_grad():
            other(ids, past_key_values=cache)
        held = torch.cat([count[0] for count in cache.slots_held()])
        kept = induction.argsort(descending=True, stable=True)[:3]  # ⌈.3 of 8⌉
        assert held.sum() == 12 * 8
        assert held[kept].min() > 5 + max(int(x) for i, x in enumerate(held) if i not in kept)
        # What stays is the beginning and the newest tokens, as many as the head gets.
        for layer in cache.layers:
            for row in layer.slots[0]:
                tokens = [int(t) for t in row if t >= 0]
                assert tokens == [*range(4), *range(60 - (len(tokens) - 4), 60)]
