"""What an allocation observes is recorded for it, wherever a cache asks its manager what to record."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from evomem.errors import ConfigError
from evomem.evaluation import EvaluationProtocol, Evaluator, PopulationPolicy
from evomem.evaluation.measurement import EXACT
from evomem.managers import MemoryManager, allocations, build, names
from evomem.managers.allocation import LayerAllocation, ModelAllocation, recorded_for, register_allocation
from evomem.managers.selection import Ends
from evomem.memory import LayerView
from evomem.models import LoadedModel
from evomem.plugins import load, save
from evomem.testing.conformance import CHECKS, run_check
from evomem.testing.models import tiny, tiny_tokenizer
from tests.evaluation.test_evaluation import TASK, make_sample

SEEN = "window_attention:3"


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """Two allocations that observe: one a layer, one of the whole model."""

    @register_allocation("by_newest_query")
    class ByNewestQuery(LayerAllocation):
        """Gives every head the mean; looks at what it observes."""

        @property
        def observes(self) -> frozenset[str]:
            return frozenset({"window_attention:2"})

        def layer_limit(self, view: LayerView, mean: Tensor, ends: Ends, shares: Tensor | None = None) -> Tensor:
            return mean + 0 * recorded_for(self, view, "window_attention:2").sum((1, 2)).long()[:, None, None]

    @register_allocation("by_attention")
    class ByAttention(ModelAllocation):
        """Gives the head whose newest slots get least attention everything but one slot a head; learns one number."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.sign = torch.nn.Parameter(torch.ones(()))

        @property
        def observes(self) -> frozenset[str]:
            return frozenset({SEEN})

        def limits(
            self,
            views: Sequence[LayerView],
            means: Sequence[Tensor],
            scores: Sequence[Tensor],
            ends: Ends,
            shares: Tensor | None = None,
        ) -> list[Tensor]:
            paid = torch.cat([recorded_for(self, v, SEEN)[..., -4:].sum(-1) for v in views], 1) * self.sign
            first = torch.nn.functional.one_hot(paid.argmin(1), paid.shape[1])
            mean, heads = means[0][..., 0], paid.shape[1]
            limits = 1 + first * (mean - 1) * heads
            return list(limits[..., None].split([v.slots.shape[1] for v in views], 1))

    yield
    for name in ("by_newest_query", "by_attention"):
        del allocations._classes[name]


def test_every_manager_observes_what_its_allocation_does() -> None:
    """Also those that say for themselves what they observe, and those around another manager."""
    for name in names():
        spec = {"adakv": "adakv(keydiff)", "kv_policy": "kv_policy(features=[keydiff])"}.get(name, name)
        alone = build(spec, allocation="uniform" if name in {"cake", "lava"} else None)
        if name in {"full", "pyramidkv", "surprise_gate", "write_gate"}:  # which have their own way
            continue
        made = build(spec, budget=9, allocation="by_newest_query")
        assert made.observes == alone.observes | {"window_attention:2"}
        assert made.describe()["options"]["allocation"]["name"] == "by_newest_query"
    assert build("adakv(keydiff(allocation=by_newest_query))").observes == {"window_attention:2"}
    assert build("snapkv(window=5,allocation=by_attention)").observes == {"window_attention:5", SEEN}
    assert build("keydiff").observes == frozenset()


def test_observes_may_be_an_attribute_and_nothing_else_than_names() -> None:
    base = type(build("keydiff"))
    made = type("Attribute", (base,), {"observes": frozenset({"attention_sum"})})
    assert made(allocation="by_attention").observes == {"attention_sum", SEEN}
    with pytest.raises(ConfigError, match="neither a property"):
        type("Wrong", (base,), {"observes": ["attention_sum"]})


def spec(options: str = "") -> str:
    return f"keydiff(budget=6,{options}allocation=by_attention)"


def test_the_evaluator_equals_the_plain_way() -> None:
    """In both protocols, several candidates at once through vmap, among managers that observe nothing."""
    model = tiny("llama")
    for kind in ("compress_once", "streaming"):
        evaluator = Evaluator(
            LoadedModel("llama", model, tiny_tokenizer(), "llama"), EvaluationProtocol(kind=kind, every=16)
        )
        population: list[MemoryManager] = [build(spec()), build("keydiff(budget=6)"), build(spec())]
        population[2].allocation.sign.data.neg_()  # type: ignore[union-attr,operator]
        sample = make_sample()
        fast = evaluator.evaluate(population, sample, TASK, EXACT)
        plain = [evaluator.evaluate_plainly(one, sample, TASK, EXACT) for one in population]
        for mine, theirs in zip(fast, plain, strict=True):
            assert mine.loglik == pytest.approx(theirs.loglik, abs=1e-5)
            assert (mine.exact, mine.slots, mine.bytes_peak) == (theirs.exact, theirs.slots, theirs.bytes_peak)
        assert len({one.loglik for one in fast}) == 3
    assert PopulationPolicy(population).observes == {SEEN}


@pytest.mark.parametrize("check", CHECKS)
def test_conformance(check: str) -> None:
    run_check(check, build(spec("every=16,")), tiny("llama"))


def test_plugins_say_what_is_recorded(tmp_path: Any) -> None:
    save(build(spec()), tmp_path / "plugin")
    assert json.loads((tmp_path / "plugin" / "config.json").read_text())["observes"] == [SEEN]
    assert load(tmp_path / "plugin").observes == {SEEN}


def test_a_view_without_the_observation_is_refused() -> None:
    empty = torch.zeros(1, 1, 20, 2)
    view = LayerView(empty, empty, torch.arange(20)[None, None], torch.zeros(1, dtype=torch.long), 20, 20, 0, 1)
    made = build(spec())
    with pytest.raises(ConfigError, match=r"by_attention.*layer 0.*window_attention:3.*does not hold"):
        made.decide_all([view])
    with pytest.raises(ConfigError, match="traces somewhere hold features only"):
        made.decide_all([replace(view, source="somewhere")])
