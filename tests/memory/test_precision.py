"""fp16, bf16, fp64, autocast: observing changes no bit of the output, and decisions are those of exact arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from evomem.evaluation.population import PopulationPolicy, Recording
from evomem.managers import MemoryManager, build
from evomem.memory import Decision, LayerView, SlotCache, attached, layer_view
from evomem.memory.kv.attention import attention_probabilities, grouped_attention
from evomem.memory.kv.recompute import recomputed
from evomem.memory.kv.rotary import find_rotaries
from evomem.testing.comparing import random_rows, read
from evomem.testing.conformance import CHECKS, ConformanceError, run_check
from evomem.testing.models import tiny
from evomem.testing.reference import Batch

LENGTH = 70
OBSERVING = ("h2o", "observed_attention", "namm", "feature_scorer", "kv_policy", "snapkv", "tova", "expected_attention")
DECIDING = (
    "h2o(budget=20)", "observed_attention(budget=20)", "snapkv(window=8, budget=20)", "tova(budget=20)",
    "pyramidkv(window=8, budget=20)", "expected_attention(budget=20)", "adakv(snapkv(window=8), budget=20)",
    "keydiff(budget=20)", "knorm(budget=20)",
)  # fmt: skip


def scaled(dtype: torch.dtype, factor: float = 1.0) -> PreTrainedModel:
    """A tiny model whose queries and keys are ``factor`` times as large."""
    model = tiny("llama", layers=2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(factor)
            layer.self_attn.k_proj.weight.mul_(factor)
    return model.to(dtype)


def searched(kind: str, **options: object) -> MemoryManager:
    """A manager with parameters that are not zero."""
    manager = build(kind, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in manager.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return manager


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.float16, 1), (torch.float16, 16), (torch.bfloat16, 1), (torch.float64, 1)]
)
def test_observing_changes_no_bit_of_the_output(dtype: torch.dtype, factor: float, padded: bool) -> None:
    model = scaled(dtype, factor)
    batch = Batch.of(random_rows(model, [LENGTH, 33 if padded else LENGTH], 0))
    pieces = [50, 16, 1, 1, 1, 1]
    stock = read(model, None, batch)
    with build("full").attach(model) as cache:
        wanted = read(model, cache, batch, pieces)
    error = (wanted.double() - stock.double())[batch.real].abs().max() / stock[batch.real].abs().max()
    assert error <= 4 * torch.finfo(dtype).eps
    for spec in OBSERVING:
        with build(spec).attach(model) as cache:
            assert torch.equal(read(model, cache, batch, pieces)[batch.real], wanted[batch.real]), spec


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "mistral"])
def test_observing_changes_no_bit_in_other_families(family: str) -> None:
    more = {"sliding_window": 9} if family == "mistral" else {}
    model = tiny(family, layers=2, **more).bfloat16()
    batch = Batch.of(random_rows(model, [40, 29], 0))
    with build("full").attach(model) as cache:
        wanted = read(model, cache, batch, [30, 9, 1])
    with build("h2o(budget=64)").attach(model) as cache:
        assert torch.equal(read(model, cache, batch, [30, 9, 1]), wanted)


def test_in_fp32_observing_changes_roundings_only() -> None:
    """There the observed probabilities make the output as well, which saves a product."""
    model = scaled(torch.float32)
    batch = Batch.of(random_rows(model, [LENGTH, 33], 0))
    with build("full").attach(model) as cache:
        wanted = read(model, cache, batch)[batch.real]
    for spec in OBSERVING:
        with build(spec).attach(model) as cache:
            got = read(model, cache, batch)[batch.real]
        assert (got - wanted).abs().max() <= 2e-6 * wanted.abs().max(), spec


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_neither_lets_observing_change_the_output_nor_decides(dtype: torch.dtype) -> None:
    model = scaled(torch.float32)
    batch = Batch.of(random_rows(model, [LENGTH, 33], 0))
    seen: list[tuple[MemoryManager, LayerView, Decision]] = []

    class Watching:
        def __init__(self, manager: MemoryManager) -> None:
            self.manager, self.observes, self.schedule = manager, manager.observes, manager.schedule

        def decide(self, view: LayerView) -> Decision:
            seen.append((self.manager, view, self.manager.decide(view)))
            return Decision(view.valid)

    managers = [build("full"), *(searched(kind, budget=20) for kind in ("feature_scorer", "kv_policy", "namm"))]
    outputs = []
    for manager in [*managers, build("expected_attention(budget=20)")]:
        with attached(model), torch.autocast("cpu", dtype):
            cache = SlotCache.for_model(model, Watching(manager.with_options(every=None)))
            outputs.append(read(model, cache, batch))
        assert torch.equal(outputs[-1][batch.real], outputs[0][batch.real]), manager
    for manager, view, decision in seen:
        view.memo.clear()
        assert torch.equal(manager.decide(view).keep, decision.keep), manager
        if view.layer == 0:
            with torch.autocast("cpu", dtype), torch.no_grad():
                view.memo.clear()
                population = PopulationPolicy([manager, manager])
                assert torch.equal(population.decide(_first_row(view)).keep[0], decision.keep[0]), manager


def _first_row(view: LayerView) -> LayerView:
    recorded = {name: part[:1] for name, part in view.recorded.items()}
    return LayerView(
        view.keys[:1], view.values[:1], view.slots[:1], view.start[:1], view.seen, view.fresh, view.layer, view.layers,
        recorded,
    )  # fmt: skip


# ---- decisions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float16, 40), (torch.bfloat16, 1)])
def test_decisions_are_those_of_fp32_on_the_same_rounded_numbers(dtype: torch.dtype, factor: float) -> None:
    """Also where q·k is beyond the largest number of fp16."""
    model = scaled(dtype, factor)
    rotaries = find_rotaries(model, 2)
    batch = Batch.of(random_rows(model, [LENGTH], 0))
    with attached(model):
        cache = SlotCache.for_model(model, Recording(frozenset({f"window_attention:{LENGTH}"})))
        cache.decides_after_forward = False
        read(model, cache, batch)
    managers = [build(spec) for spec in DECIDING]
    managers += [searched(kind, budget=20) for kind in ("feature_scorer", "kv_policy")]
    managers += [searched("namm", budget=20, every=None)]
    largest = 0.0
    for manager in managers:
        with manager.attach(model) as own:
            read(model, own, batch)
        for layer, mine, rotary in zip(cache.layers, own.layers, rotaries, strict=True):
            query, keys = layer.recorder.rowwise["queries"].float(), layer.keys.float()
            wide = keys.repeat_interleave(query.shape[1] // keys.shape[1], 1)
            largest = max(largest, float((query @ wide.mT).abs().max()))
            recorded = recomputed(manager.observes, query, keys, scale=layer.scale, rotary=_rounded(rotary, dtype))
            view = layer_view(
                keys, layer.values.float(), recorded=recorded, observes=manager.observes, layer=layer.index, layers=2
            )
            keep = manager.decide(view).keep
            for head in range(keys.shape[1]):
                held = mine.slots[0, head]
                assert torch.equal(held[held >= 0], keep[0, head].nonzero()[:, 0]), (manager, layer.index, head)
    assert dtype != torch.float16 or largest > torch.finfo(torch.float16).max


def _rounded(rotary: Callable, dtype: torch.dtype) -> Callable:
    """The embedding whose cosines and sines are rounded as the model's are, except for those of future positions."""

    def turned(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rotary(x if x.dim() == 3 else x.to(dtype), positions)

    return turned


@pytest.mark.parametrize("softcap", [None, 50.0])
def test_products_beyond_fp16_neither_overflow_nor_round(softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 9, 16, generator=generator).half() * 200 for heads in (4, 2))
    value = torch.randn(2, 2, 9, 16, generator=generator).half()
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    got = attention_probabilities(query, key, 0.25, mask, softcap)
    assert torch.equal(got, attention_probabilities(query.float(), key.float(), 0.25, mask, softcap))
    assert (query.float() @ key.float().repeat_interleave(2, 1).mT).abs().max() > 65504
    mixed = grouped_attention(query, key, value, 0.25, mask=mask, softcap=softcap)
    wanted = grouped_attention(query.float(), key.float(), value.float(), 0.25, mask=mask, softcap=softcap)
    torch.testing.assert_close(mixed.float(), wanted, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decays_are_not_rounded_to_the_models_type(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 6, 16, generator=generator).to(dtype) for _ in range(3))
    decays = -3 * torch.rand(1, 2, 1, 6, generator=generator)
    decays -= decays.amax(-1, keepdim=True) + 100.3  # only differences matter, and those are lost in large numbers
    wide = (part.float() for part in (query, key, value))
    wanted = grouped_attention(*wide, 0.25, mask=decays.expand(1, 2, 6, 6))
    got = grouped_attention(query, key, value, 0.25, mask=decays.expand(1, 2, 6, 6)).float()
    assert (got - wanted).abs().max() <= 2 * torch.finfo(dtype).eps * wanted.abs().max()


# ---- the kit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    ("dtype", "spec"),
    [(torch.bfloat16, "h2o(budget=14, every=16)"), (torch.float16, "adakv(snapkv(window=8), budget=10)")],
)
def test_kit_in_half_precision(check: str, dtype: torch.dtype, spec: str) -> None:
    run_check(check, build(spec), scaled(dtype))


class Cheating(MemoryManager):
    """Looks at its neighbours, or at chance."""

    def __init__(self, fault: str) -> None:
        super().__init__(budget=10)
        self.fault = fault

    def score(self, view: LayerView) -> Tensor:
        score = -view.keys.float().norm(dim=-1)
        if self.fault == "batch":
            return (score - score.mean((0, 2), keepdim=True)).abs()
        return torch.rand(score.shape) if self.fault == "chance" else score


@pytest.mark.parametrize(("fault", "check"), [("batch", "row_alone"), ("chance", "chunks"), ("chance", "repeatable")])
def test_kit_in_half_precision_catches_what_breaks_the_contract(fault: str, check: str) -> None:
    model = scaled(torch.bfloat16)
    run_check(check, Cheating("none"), model)
    with pytest.raises(ConformanceError):
        run_check(check, Cheating(fault), model)
