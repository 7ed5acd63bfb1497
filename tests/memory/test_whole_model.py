"""Managers that decide about all layers at once: held against views taken by hand of a cache that keeps everything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from evomem.errors import CacheError, ConfigError
from evomem.evaluation import EvaluationProtocol, Evaluator
from evomem.evaluation.measurement import EXACT
from evomem.evaluation.population import PopulationPolicy, Recording
from evomem.managers import MemoryManager, build
from evomem.managers.base import Schedule
from evomem.managers.selection import Ends
from evomem.memory import Decision, LayerView, SlotCache
from evomem.memory.kv.snapshot import take
from evomem.models import LoadedModel
from evomem.plugins import load, load_cache, save, save_cache
from evomem.search_space.space import SearchSpace, load_space
from evomem.testing.conformance import CHECKS, run_check
from evomem.testing.models import tiny, tiny_tokenizer
from tests.evaluation.test_evaluation import TASK, make_sample

ALLOCATION = "allocation=per_head_shares(layers=3,heads=2)"
SHARES = torch.tensor([[1.0, 0.0], [-1.0, 2.0], [0.0, 0.5]])


def manager(spec: str = f"snapkv(budget=8,window=4,{ALLOCATION})", shares: Tensor = SHARES) -> MemoryManager:
    made = build(spec)
    with torch.no_grad():
        made.allocation.log_shares.copy_(shares)
    return made


@dataclass(frozen=True)
class Unequal:
    """Decides about all layers: the newest slots, more of them the more all layers hold. Notes what it is asked."""

    every: int | None = None
    asked: list[tuple[tuple[int, ...], ...]] = field(default_factory=list)
    observes: frozenset[str] = frozenset()
    whole_model: bool = True

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.every)

    def decide(self, view: LayerView) -> Decision:
        raise AssertionError("a layer was decided about by itself")

    def decide_all(self, views: Sequence[LayerView]) -> list[Decision]:
        self.asked.append(tuple((view.seen, view.fresh, int(view.valid[-1].sum())) for view in views))
        return [Decision(view.valid & (view.age < 3 + 2 * view.layer)) for view in views]


class Choosy(Unequal):
    """Stores every fourth of the tokens that came since the row's last decision, and keeps all older ones."""

    def decide_all(self, views: Sequence[LayerView]) -> list[Decision]:
        return [Decision(view.valid & ((view.age >= view.fresh) | (view.age % 4 == 0))) for view in views]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


def tokens(count: int, rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(5, 120, (rows, count), generator=torch.Generator().manual_seed(seed))


def by_hand(model: Any, made: MemoryManager, ids: Tensor, then: Tensor, **inputs: Any) -> tuple[Tensor, list[Tensor]]:
    """Read with everything kept, take the views, let the manager decide, evict; the logits of what follows."""
    with made.attach(model):
        cache = SlotCache.for_model(model, Recording(made.observes))
        cache.decides_after_forward = False
        model(ids, past_key_values=cache, **inputs)
        decisions = made.decide_all([layer.view() for layer in cache.layers])
        cache.keep([decision.keep for decision in decisions])
        held = [layer.slots for layer in cache.layers]
        if inputs:
            inputs = {"attention_mask": torch.cat((inputs["attention_mask"], torch.ones_like(then)), 1)}
        return model(then, past_key_values=cache, **inputs).logits, held


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("pieces", [[30], [11, 19]])
def test_reading_equals_deciding_by_hand(family: str, pieces: list[int]) -> None:
    model = tiny(family, **({"sliding_window": 12} if family == "mistral" else {}))
    made, ids, then = manager(), tokens(30, 2), tokens(1, 2, 1)
    wanted, slots = by_hand(model, made, ids, then)
    with made.attach(model) as cache:
        if len(pieces) == 1:
            model(ids, past_key_values=cache)
        else:
            with cache.reading():
                for piece in ids.split(pieces, 1):
                    model(piece, past_key_values=cache)
        assert all(map(torch.equal, slots, (layer.slots for layer in cache.layers)))
        # Everything was held when it decided, and so the peak is that of a cache which keeps everything.
        full = SlotCache.for_model(model, Recording(made.observes))
        full.decides_after_forward = False
        model(ids, past_key_values=full)
        assert cache.bytes_peak == full.bytes_peak == full.nbytes()
        assert sum(held.sum(-1) for held in cache.slots_held()).tolist() == [3 * 2 * 8] * 2
        torch.testing.assert_close(model(then, past_key_values=cache).logits, wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_every_layer_has_read_when_it_is_asked(model: Any) -> None:
    for every, expected in ((None, [20]), (8, [20, 24, 34])):
        policy = Unequal(every)
        with build("full").attach(model) as full:
            cache = SlotCache.for_model(model, policy)
            for piece in tokens(34).split([20, 1, 1, 1, 1, 1, 1, 8], 1)[: 1 if every is None else 8]:
                model(piece, past_key_values=cache)
            model(tokens(4), past_key_values=full)
        assert [one[0][0] for one in policy.asked] == expected
        assert policy.asked[0] == ((20, 20, 40),) * 3
        if every:  # what stayed, and all that came since
            assert policy.asked[1] == tuple((24, 4, 2 * (3 + 2 * layer + 4)) for layer in range(3))
            assert policy.asked[2] == tuple((34, 10, 2 * (3 + 2 * layer + 10)) for layer in range(3))


@torch.no_grad()
def test_rows_decide_by_their_own_clocks(model: Any) -> None:
    """A row of a padded batch is decided about in the passes in which it would be alone, by the same tokens."""
    real = torch.ones(2, 34, dtype=torch.int64)
    real[1, :5] = 0
    pieces = [12, 6, 1, 1, 10, 4]
    for made in (manager(f"snapkv(budget=4,every=8,window=2,{ALLOCATION})"), Unequal(8), Choosy(8)):
        ids = tokens(34, 2)
        with build("full").attach(model) as used:
            together = SlotCache.for_model(model, made)
            at = 0
            for count in pieces:
                part, at = ids[:, at : at + count], at + count
                model(part, past_key_values=together, attention_mask=real[:, :at])
            for row in range(2):
                alone, at, pad = SlotCache.for_model(model, made), 0, 5 * row
                for count in pieces:
                    begin, at = max(at, pad), at + count
                    model(ids[row : row + 1, begin:at], past_key_values=alone)
                for mine, own in zip(together.layers, alone.layers, strict=True):
                    for head in range(2):
                        held = mine.slots[row, head]
                        assert (held[held >= 0] - pad).tolist() == own.slots[0, head][own.slots[0, head] >= 0].tolist()
            model(tokens(4), past_key_values=used)


@torch.no_grad()
def test_the_clock_goes_with_rows_copies_and_files(model: Any, tmp_path: Any) -> None:
    made = manager(f"keydiff(budget=4,every=8,{ALLOCATION})")
    real = torch.ones(2, 20, dtype=torch.int64)
    real[1, :5] = 0
    with made.attach(model) as cache:
        model(tokens(10, 2), past_key_values=cache, attention_mask=real[:, :10])  # only row 0 has its turn
        assert cache.layers[0].since_turn() == [0, 10]
        save_cache(cache, tmp_path / "context.safetensors")
        copies = [cache.clone(), load_cache(tmp_path / "context.safetensors", model)]
        wanted = model(tokens(10, 2, 1), past_key_values=cache, attention_mask=real).logits
        for copy in copies:
            assert torch.equal(model(tokens(10, 2, 1), past_key_values=copy, attention_mask=real).logits, wanted)
            copy.reorder_cache(torch.tensor([1, 0]))
            assert copy.layers[1].since_turn() == cache.layers[1].since_turn()[::-1]


@torch.no_grad()
def test_a_decision_that_fails_is_not_forgotten(model: Any) -> None:
    class Failing(Unequal):
        def decide_all(self, views: Sequence[LayerView]) -> list[Decision]:
            raise ValueError("the manager failed")

    with build("full").attach(model) as used:
        cache = SlotCache.for_model(model, Failing())
        with pytest.raises(ValueError, match="the manager failed"):
            model(tokens(20), past_key_values=cache)
        assert all((layer.slots >= 0).sum() == 40 for layer in cache.layers)  # no half of a decision
        with pytest.raises(CacheError, match="was not made"):
            model(tokens(1), past_key_values=cache)
        with pytest.raises(CacheError, match="was not made"):
            take(cache)
        cache.policy = Unequal()
        cache.decide()
        model(tokens(1), past_key_values=cache)
        assert [int(held[0, 0]) for held in cache.slots_held()] == [4, 6, 8]
        short = SlotCache.for_model(model, type("Short", (Unequal,), {"decide_all": lambda self, views: []})())
        with pytest.raises(CacheError, match="0 decisions about 3 layers"):
            model(tokens(20), past_key_values=short)
        model(tokens(4), past_key_values=used)


@torch.no_grad()
@pytest.mark.parametrize("left", [[0, 2], [0, 1]])
def test_a_pass_that_leaves_layers_out_is_refused(left: list[int]) -> None:
    policy, model = Unequal(), tiny("llama")
    whole = model.model.layers
    with build("full").attach(model) as used:
        model(tokens(4), past_key_values=used)
        cache = SlotCache.for_model(model, policy)
        model.model.layers, model.config.num_hidden_layers = torch.nn.ModuleList([whole[i] for i in left]), 2
        if 2 in left:  # the last layer has read, and a decision is due
            with pytest.raises(CacheError, match="not all the others"):
                model(tokens(20), past_key_values=cache)
        else:
            model(tokens(20), past_key_values=cache)
        model.model.layers, model.config.num_hidden_layers = whole, 3
        for go_on in (cache.decide, lambda: model(tokens(1), past_key_values=cache)):
            with pytest.raises(CacheError, match="cut short"):
                go_on()
    assert not policy.asked


@torch.no_grad()
@pytest.mark.parametrize("every", [None, 8])
def test_a_model_that_leaves_early_is_noticed_where_the_block_or_the_reading_ends(every: int | None) -> None:
    """Nothing was decided, and no further pass may ever come to say so."""
    policy, model = Unequal(every), tiny("llama")
    whole, cache = model.model.layers, SlotCache.for_model(model, policy)
    model.model.layers, model.config.num_hidden_layers = whole[:2], 2
    with pytest.raises(CacheError, match="did not run all layers"), build("full").attach(model):
        model(tokens(20), past_key_values=cache)
    cache.reset()
    with build("full").attach(model), pytest.raises(CacheError, match="did not run all layers"), cache.reading():
        model(tokens(20), past_key_values=cache)
    # Said once; and an error inside the block is not replaced by this one.
    cache.reset()

    def interrupted() -> None:
        with build("full").attach(model):
            model(tokens(20), past_key_values=cache)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    # A manager that decides layer by layer has decided about the layers that ran.
    single = build("keydiff(budget=8)")
    with single.attach(model) as used:
        model(tokens(20), past_key_values=used)
    assert not policy.asked
    model.model.layers, model.config.num_hidden_layers = whole, 3
    cache.reset()
    with build("full").attach(model):
        model(tokens(20), past_key_values=cache)
    assert len(policy.asked) == 1


@pytest.mark.parametrize("kind", ["compress_once", "streaming"])
def test_the_evaluator_equals_the_plain_way(kind: str, model: Any) -> None:
    """Managers of one kind through vmap, one with another scorer, and one that decides layer by layer."""
    protocol = EvaluationProtocol(kind=kind, every=16)
    evaluator = Evaluator(LoadedModel("llama", model, tiny_tokenizer(), "llama"), protocol)
    sample = make_sample()
    population = [
        manager(f"keydiff(budget=12,{ALLOCATION})"),
        build("keydiff(budget=12)"),
        manager(f"keydiff(budget=12,{ALLOCATION})", -SHARES),
        manager(f"snapkv(budget=12,window=4,{ALLOCATION})"),
    ]
    fast = evaluator.evaluate(population, sample, TASK, EXACT)
    plain = [evaluator.evaluate_plainly(one, sample, TASK, EXACT) for one in population]
    for mine, theirs in zip(fast, plain, strict=True):
        assert mine.loglik == pytest.approx(theirs.loglik, abs=1e-5)
        assert (mine.exact, mine.slots, mine.bytes_peak) == (theirs.exact, theirs.slots, theirs.bytes_peak)
        assert mine.bytes_mean == pytest.approx(theirs.bytes_mean)
    assert len({one.loglik for one in fast}) == 4  # the decisions matter
    # Whoever else is in the population.
    alone = evaluator.evaluate([population[1]], sample, TASK, EXACT)[0]
    assert alone.loglik == pytest.approx(fast[1].loglik, abs=1e-5)
    assert (alone.exact, alone.slots, alone.bytes_peak) == (fast[1].exact, fast[1].slots, fast[1].bytes_peak)


@torch.no_grad()
def test_a_population_decides_as_its_members_do(model: Any) -> None:
    members = [
        manager(f"keydiff(budget=6,{ALLOCATION})"),
        manager(f"keydiff(budget=6,{ALLOCATION})", -SHARES),
        build("keydiff(budget=6)"),
    ]
    policy = PopulationPolicy(members)
    with build("full").attach(model):
        for rows in (1, 3):
            cache = SlotCache.for_model(model, Recording())
            cache.decides_after_forward = False
            model(tokens(30, rows), past_key_values=cache)
            views = [layer.view() for layer in cache.layers]
            made = policy.decide_all(views)
            for place, member in enumerate(members):
                row = slice(0, 1) if rows == 1 else slice(place, place + 1)
                own = [
                    replace(v, keys=v.keys[row], values=v.values[row], slots=v.slots[row], start=v.start[row], memo={})
                    for v in views
                ]
                alone = member.decide_all(own)
                assert all(torch.equal(m.keep[place], a.keep[0]) for m, a in zip(made, alone, strict=True))
    with pytest.raises(ConfigError, match="all layers"):
        policy.decide(views[0])


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("options", ["", "every=16,"])
def test_conformance(check: str, options: str, model: Any) -> None:
    run_check(check, manager(f"snapkv(budget=8,window=4,{options}{ALLOCATION})"), model)


def test_a_plugin_goes_to_models_of_other_shapes(tmp_path: Any) -> None:
    made = build("keydiff(budget=8,allocation=per_head_shares(points=2,heads=2))")
    with torch.no_grad():
        made.allocation.log_shares.copy_(torch.tensor([[1.0, 0.0], [-1.0, 2.0]]))
    save(made, tmp_path / "plugin")
    loaded = load(tmp_path / "plugin")
    assert loaded.describe() == made.describe()
    assert torch.equal(loaded.allocation.log_shares, made.allocation.log_shares)
    for layers, heads in ((5, 2), (3, 4), (1, 1)):
        model = tiny("llama", layers=layers, num_key_value_heads=heads)
        with loaded.attach(model) as cache, torch.no_grad():
            model(tokens(60), past_key_values=cache)
        held = torch.stack(cache.slots_held())[:, 0]
        assert held.sum() == layers * heads * 8
        if heads == 2:  # halfway between two points lies their mean
            logs = torch.stack(
                [torch.lerp(torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 2.0]), i / 4) for i in range(5)]
            )
            shares = torch.softmax(logs.flatten(), 0).view(5, 2)
            assert ((held - 1 - shares * (8 - 1) * 10).abs() < 1).all()
        else:
            assert (held == held[:, :1]).all()
    with pytest.raises(ConfigError, match="either layers"):
        build("keydiff(allocation=per_head_shares(heads=2))")


def test_drawing_with_it_is_refused(model: Any) -> None:
    from evomem.managers.stochastic import Noise

    policy = manager(f"kv_policy(budget=8,features=[keydiff],{ALLOCATION})")
    with torch.no_grad(), build("full").attach(model) as cache:
        model(tokens(20), past_key_values=cache)
        cache.observe_again()
        view = cache.layers[0].view()
    with pytest.raises(ConfigError, match="per_head_shares"):
        policy.draw(view, Noise.of([(0, 0, 0)], view))


def test_the_total_is_kept_wherever_bounds_bind() -> None:
    generator = torch.Generator().manual_seed(1)
    for budget in (1, 5, 12, 33):
        made = build(f"keydiff(budget={budget},allocation=per_head_shares(layers=4,heads=3))")
        for spread in (0.0, 1.0, 30.0):
            with torch.no_grad():
                made.allocation.log_shares.copy_(spread * torch.randn(4, 3, generator=generator))
            views = [
                LayerView(
                    torch.randn(2, 3, 40, 4, generator=generator), torch.randn(2, 3, 40, 4, generator=generator),
                    torch.where(torch.arange(40) >= 40 - held, torch.arange(40), -1).expand(2, 3, 40),
                    torch.tensor([0, 0]), 40, 40, layer, 4,
                )
                for layer, held in enumerate((40, 30, 20, 40))
            ]  # fmt: skip
            kept = torch.stack([one.keep.sum(-1) for one in made.decide_all(views)])
            assert kept.sum((0, 2)).tolist() == [min(12 * budget, 390)] * 2
            assert kept.min() >= 1


def test_a_search_space_evolves_it() -> None:
    space = SearchSpace(load_space("keydiff_per_head"))
    made = space.decode(np.arange(24) / 10)
    assert made.whole_model
    assert made.allocation.log_shares.flatten().tolist() == pytest.approx([number / 10 for number in range(24)])


def test_a_head_that_holds_less_than_its_floor_hands_the_rest_on() -> None:
    made = build("keydiff(budget=6,allocation=per_head_shares(layers=2,heads=1))")
    views = [
        LayerView(
            torch.randn(1, 1, 24, 4), torch.randn(1, 1, 24, 4),
            torch.where(torch.arange(24) >= 24 - held, torch.arange(24), -1).expand(1, 1, 24),
            torch.tensor([0]), 24, 24, layer, 2,
        )
        for layer, held in enumerate((1, 13))
    ]  # fmt: skip
    rule = made.with_options().rule
    scores = [torch.where(view.valid, made.score(view), -torch.inf) for view in views]
    limits = made.allocation.limits(views, [torch.full((1, 1, 1), 6)] * 2, scores, Ends(sinks=2, recent=4), None)
    assert [int(limit) for limit in limits] == [1, 11]
    assert [int(decision.keep.sum()) for decision in rule.decide_all([made.judge(v) for v in views], views)] == [1, 11]
