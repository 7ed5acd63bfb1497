"""Every family under the conformance kit, with managers that evict raggedly, fade, refuse and record; and the kit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evomem.managers import MemoryManager, build
from evomem.managers.allocation import EmergentAllocation
from evomem.memory import Decision, LayerView
from evomem.testing import conformance
from evomem.testing.conformance import CHECKS, ConformanceError, check_manager, run_check
from evomem.testing.models import FAMILIES, tiny, tiny_tokenizer


class AboveMean(EmergentAllocation):
    """Slots scored above their head's mean, and the newest: ragged across heads."""

    def keep(self, scores, view, held, ends, budget):
        known = torch.where(view.valid, scores, torch.nan)
        return ((scores > known.nanmean(-1, keepdim=True)) | (view.age == 0)) & held


class Everything(MemoryManager):
    """Uses all that a manager can: every observation, ragged eviction, refusal of new tokens, decay."""

    @property
    def observes(self) -> frozenset[str]:
        return frozenset(
            {"attention_sum", "attention_spectrum", "window_attention:3", "window_attention:8", "query_statistics"}
        )

    def built_in_allocation(self) -> AboveMean:
        return AboveMean()

    def score(self, view: LayerView) -> Tensor:
        spectrum = view.recorded["attention_spectrum"].sum(-1)
        attention = view.recorded["attention_sum"] / (view.age + 1)
        window = view.recorded["window_attention:3"] - view.recorded["window_attention:8"]
        query = view.recorded["query_mean"].norm(dim=-1).view(*view.keys.shape[:2], -1).mean(-1)
        return spectrum + attention + window + query[..., None] * 0.01 + view.values.norm(dim=-1)

    def admit(self, view: LayerView) -> Tensor:
        return torch.where(view.position % 5 == 0, -1.0, 1.0)

    def decay(self, view: LayerView) -> Tensor:
        return -0.05 * view.age.float().clamp(max=40)


class Emptying(MemoryManager):
    """Keeps nothing at all in every second head of every second layer."""

    def built_in_allocation(self) -> AboveMean:
        return AboveMean()

    def score(self, view: LayerView) -> Tensor:
        return view.keys.norm(dim=-1)

    def decide(self, view: LayerView) -> Decision:
        keep = super().decide(view).keep
        if view.layer % 2 == 0:
            keep[:, 0] = False
        return Decision(keep)


@pytest.fixture(scope="module")
def models() -> dict[str, object]:
    return {family: tiny(family, layers=2) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("check", CHECKS)
def test_streaming_manager_that_uses_everything(check: str, family: str, models) -> None:
    run_check(check, Everything(every=16), models[family])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("check", ["evicted_is_hidden", "row_alone", "chunks", "beams", "evicted_values"])
def test_manager_that_decides_once(check: str, family: str, models) -> None:
    run_check(check, build("adakv(snapkv(window=8), budget=10)"), models[family])


@pytest.mark.parametrize(
    "spec",
    [
        "full",
        "knorm(budget=12)",
        "streaming_llm(budget=16, every=8)",
        "h2o(budget=14, every=16)",
        "expected_attention(budget=12)",
        "tova(budget=10, every=20)",
        "random(budget=10)",
    ],
)
def test_field(spec: str, models) -> None:
    results = check_manager(build(spec), models["llama"], tiny_tokenizer())
    assert [r.name for r in results] == list(CHECKS)
    assert not [r for r in results if not r.passed]


@pytest.mark.parametrize("check", ["evicted_is_hidden", "row_alone", "chunks", "continuation", "evicted_values"])
def test_heads_that_hold_nothing(check: str, models) -> None:
    run_check(check, Emptying(every=12), models["qwen2"])


@pytest.mark.parametrize("check", ["keep_everything", "evicted_is_hidden", "row_alone", "chunks", "continuation"])
@pytest.mark.parametrize("spec", ["knorm(budget=12, every=10)", "full", "h2o(budget=14, every=16)"])
def test_sliding_window(check: str, spec: str) -> None:
    run_check(check, build(spec), tiny("mistral", layers=2, sliding_window=9))


@pytest.mark.parametrize("check", ["keep_everything", "evicted_is_hidden", "chunks"])
def test_sliding_window_with_all_observations(check: str) -> None:
    run_check(check, Everything(every=16), tiny("mistral", layers=2, sliding_window=9))


# ---- the kit finds what is wrong -------------------------------------------------------------------------------------


class Cheating(MemoryManager):
    """Breaks one rule of the contract."""

    def __init__(self, fault: str, **options) -> None:
        super().__init__(budget=10, **options)
        self.fault = fault
        self.calls = 0

    def score(self, view: LayerView) -> Tensor:
        self.calls += 1
        score = -view.keys.float().norm(dim=-1)
        if self.fault == "slot number":  # counts padding
            score = ((view.slots * 7919) % 31).float()
        if self.fault == "batch":  # looks at its neighbours
            score = (score - score.mean((0, 2), keepdim=True)).abs()
        if self.fault == "state":
            score = score * (-1.0) ** (self.calls // view.layers)
        if self.fault == "global random":
            score = torch.rand(score.shape)
        if self.fault == "bf16":
            score = score.to(view.keys.dtype)
        return score


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("slot number", "row_alone"),
        ("batch", "row_alone"),
        ("state", "repeatable"),
        ("global random", "repeatable"),
        ("bf16", "ties"),
    ],
)
def test_kit_catches_a_manager_that_breaks_the_contract(fault: str, check: str, models) -> None:
    run_check(check, Cheating("none"), models["llama"])
    with pytest.raises(ConformanceError):
        run_check(check, Cheating(fault), models["llama"])
    assert [r.name for r in check_manager(Cheating(fault), models["llama"]) if r.name == check and not r.passed]


def test_unknown_check_is_named() -> None:
    with pytest.raises(ConformanceError, match="row_alone"):
        run_check("nonsense", build("full"), tiny("llama", layers=1))


def test_reference_equals_stock_attention(models) -> None:
    """The slow path is itself held against transformers' own eager attention."""
    from evomem.testing.comparing import random_rows, same_logits
    from evomem.testing.reference import Batch, explicit_biases, explicit_logits

    for family in FAMILIES:
        model = models[family]
        batch = Batch.of(random_rows(model, [20, 13], 1))
        biases = explicit_biases({}, batch, 2, conformance.kv_heads(model), None)
        stock = model(batch.ids, attention_mask=batch.real.long(), position_ids=batch.positions).logits
        same_logits(family, explicit_logits(model, batch, biases), stock, batch.real)
