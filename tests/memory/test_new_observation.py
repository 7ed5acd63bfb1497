"""A new observation is one class, and a new field of a view is written once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from evomem.errors import CacheError, ConfigError
from evomem.evaluation.evaluator import Evaluator
from evomem.evaluation.reference import evaluate_plainly
from evomem.managers import MemoryManager, register
from evomem.managers import managers as manager_registry
from evomem.memory import LayerView, layer_view
from evomem.memory.kv.recompute import recomputed
from evomem.memory.observations import Moment, Observation, Recorder, Sizes, Window, observations, register_observation
from evomem.models import LoadedModel
from evomem.plugins import load_cache, save_cache
from evomem.testing.models import tiny, tiny_tokenizer
from tests.evaluation.test_evaluation import TASK, make_sample

USED = 0.1


@pytest.fixture(autouse=True)
def _only_here():
    known, named = dict(observations._classes), dict(manager_registry._classes)
    yield
    for registry, before in ((observations, known), (manager_registry, named)):
        registry._classes.clear()
        registry._classes.update(before)


@pytest.fixture
def counting() -> type[MemoryManager]:
    """A manager over an observation that nobody else knows: how many queries paid a slot at least a tenth."""

    @register_observation("uses")
    class Uses(Observation):
        """Queries that paid the slot at least a tenth."""

        every_query: ClassVar[bool] = True
        needs_past: ClassVar[bool] = True

        def append(self, recorder: Recorder, shape: tuple[int, int, int], like: Tensor) -> None:
            recorder.extend("uses", torch.zeros(shape, device=like.device, dtype=torch.float32))

        def attended(self, recorder: Recorder, attention: Tensor, first: int, starts: tuple[int, ...]) -> None:
            more = (attention >= USED).sum(2).float()
            rest = recorder.slotwise["uses"].shape[2] - more.shape[2]
            recorder.slotwise["uses"] = recorder.slotwise["uses"] + torch.nn.functional.pad(more, (0, rest))

        def recorded(self, recorder: Recorder, moment: Moment, window: Callable[[int], Window]) -> dict[str, Tensor]:
            return {"uses": recorder.slotwise["uses"][:, :, : moment.slots.shape[2]]}

        def state(self, tensors: Mapping[str, Tensor], sizes: Sizes) -> dict:
            return {"slotwise.uses": ((sizes.batch, sizes.kv_heads, sizes.slots), torch.float32)}

    @register("by_uses")
    class ByUses(MemoryManager):
        """Keeps what was used most."""

        @property
        def observes(self) -> frozenset[str]:
            return frozenset({"uses"})

        def score(self, view: LayerView) -> Tensor:
            return view.recorded["uses"]

    return ByUses


def slow_uses(model, ids: Tensor) -> list[Tensor]:
    """Counts from the stock model's own attention: (batch, kv_heads, tokens) a layer."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    attentions = model(ids, output_attentions=True).attentions
    model.set_attn_implementation(before)
    kv_heads = model.config.num_key_value_heads
    grouped = [a.unflatten(1, (kv_heads, -1)).mean(2) for a in attentions]
    return [(attention >= USED).sum(2).float() for attention in grouped]


@torch.no_grad()
def test_one_class_is_recorded_followed_saved_and_decided_by(counting, tmp_path):
    model = tiny("llama")
    ids = torch.randint(5, 100, (2, 40), generator=torch.Generator().manual_seed(0))
    wanted = slow_uses(model, ids)
    manager = counting(budget=7)
    with manager.attach(model) as cache, cache.reading():
        for begin in range(0, 40, 13):
            model(ids[:, begin : begin + 13], past_key_values=cache)
        for layer, uses in zip(cache.layers, wanted, strict=True):
            assert torch.equal(layer.view().recorded["uses"], uses)
    for layer, uses in zip(cache.layers, wanted, strict=True):  # the best seven of every head; the older first
        order = torch.sort(uses, dim=-1, descending=True, stable=True).indices[..., :7].sort(-1).values
        assert torch.equal(layer.slots, order)

    streaming = counting(budget=7, every=20)
    with streaming.attach(model) as cache:
        model(ids, past_key_values=cache)
        save_cache(cache, tmp_path / "context.safetensors")
        again = load_cache(tmp_path / "context.safetensors", model)
        for one in (cache, again):
            one.reorder_cache(torch.tensor([1, 0]))
        more = ids[:, :20].flip(0)
        assert torch.equal(model(more, past_key_values=cache).logits, model(more, past_key_values=again).logits)
        for mine, theirs in zip(cache.layers, again.layers, strict=True):
            assert torch.equal(mine.slots, theirs.slots)
            assert torch.equal(mine.recorder.slotwise["uses"], theirs.recorder.slotwise["uses"])


def test_the_evaluator_other_engines_and_messages_know_it(counting):
    evaluator = Evaluator(LoadedModel("llama", tiny("llama", layers=2), tiny_tokenizer(), "llama"))
    sample = make_sample()
    managers = [counting(budget=n) for n in (6, 12)]
    for manager, fast in zip(managers, evaluator.evaluate(managers, sample, TASK), strict=True):
        plain = evaluate_plainly(evaluator, manager, sample, TASK)
        assert fast.slots == plain.slots
        assert fast.loglik == pytest.approx(plain.loglik, abs=1e-4)
    keys = torch.randn(1, 2, 12, 8)
    recorded = recomputed(frozenset({"uses"}), torch.randn(1, 4, 12, 8), keys, scale=1.0)
    view = layer_view(keys, keys, recorded=recorded, observes=managers[0].observes)
    assert managers[0].decide(view).keep.sum() == 12
    with pytest.raises(CacheError, match="'uses'"):
        layer_view(keys, keys, recorded={"uses": torch.zeros(1, 2, 5)})
    with pytest.raises(CacheError, match="recorded has no 'uses'"):
        layer_view(keys, keys, observes=managers[0].observes)
    with pytest.raises(ConfigError, match=r"the cache records .*uses"):
        layer_view(keys, keys, observes={"use"})


def test_a_new_field_of_a_view_is_carried_by_everything_that_carries_views():
    @dataclass(frozen=True)
    class Wider(LayerView):
        weights: Tensor = field(default_factory=lambda: torch.zeros(0))
        notes: Mapping[str, Tensor] = field(default_factory=dict)
        label: str = ""

    keys = torch.randn(3, 2, 5, 4)
    slots = torch.arange(5).expand(3, 2, 5)
    view = Wider(
        keys, keys * 2, slots, torch.zeros(3, dtype=torch.int64), 5, 5, 0, 1, {"attention_sum": keys[..., 0]},
        weights=torch.arange(3.0), notes={"a": torch.arange(3)}, label="x",
    )  # fmt: skip
    view.once(("twice", 2), lambda: keys * 2)
    assert ("weights",) in view.tensors()
    assert ("notes", "a") in view.tensors()
    assert view.facts()["label"] == "x"
    assert ("memo", ("twice", 2)) not in view.tensors()
    assert ("memo", ("twice", 2)) in view.tensors(memo=True)
    one = view.map(lambda tensor: tensor[1:2])
    assert isinstance(one, Wider)
    assert one.weights.tolist() == [1.0]
    assert one.notes["a"].tolist() == [1]
    again = Wider.of(view.facts(), view.tensors(memo=True))
    assert again.label == "x"
    assert all(torch.equal(tensor, again.tensors(memo=True)[name]) for name, tensor in view.tensors(memo=True).items())
