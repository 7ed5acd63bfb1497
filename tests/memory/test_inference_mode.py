"""Reading, generating and evaluating in any mixture of inference mode, no_grad and autograd gives the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from evomem.evaluation import Evaluator
from evomem.evaluation.costs import ranking_costs
from evomem.evaluation.measurement import EXACT, Evaluation, Measurement
from evomem.evaluation.objectives import Attention, ExpectedCost
from evomem.evaluation.rollouts import rollouts
from evomem.managers import build
from evomem.testing.comparing import greedy, random_rows
from evomem.testing.models import tiny
from evomem.testing.reference import Batch
from tests.evaluation.test_ranking_costs import SAMPLE, policy
from tests.evaluation.test_traces import Words, load

MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}
MIXTURES = (
    ("inference", "no_grad", "grad"), ("inference", "grad", "inference"), ("no_grad", "inference", "no_grad"),
    ("grad", "inference", "grad"), ("inference", "inference", "inference"),
)  # fmt: skip
SPECS = (
    "full", "h2o(budget=20, every=16)", "observed_attention(budget=20)", "namm(every=16)", "tova(budget=20, every=16)",
    "feature_scorer(budget=20, every=16)", "kv_policy(budget=20, every=16, actions=[evict, store, forget])",
    "snapkv(window=8, budget=20)", "expected_attention(budget=20)", "expected_attention(budget=20, every=16)",
    "adakv(h2o, budget=20)",
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny("llama", layers=2)


def _fed(model: PreTrainedModel, cache: Any, batch: Batch, begin: int, end: int) -> Tensor:
    return model(batch.ids[:, begin:end], attention_mask=batch.real[:, :end].long(), past_key_values=cache).logits


@pytest.mark.parametrize("spec", SPECS)
def test_modes_may_change_between_passes(spec: str, model) -> None:
    whole = Batch.of(random_rows(model, [44, 31], 0))
    cuts = [(0, 25), (25, 39), (39, 40)]
    manager = build(spec)

    def run(modes: tuple[str, ...]) -> list[Tensor]:
        found = []
        with manager.attach(model) as cache:
            for mode, (begin, end) in zip(modes, cuts, strict=True):
                with MODES[mode]():
                    found.append(_fed(model, cache, whole, begin, end))
            with MODES[modes[0]]():
                other = cache.clone()
                cache.batch_select_indices(torch.tensor([1]))
            found.append(_fed(model, cache, Batch(whole.ids[1:], whole.real[1:], whole.positions[1:]), 40, 44))
            found.append(greedy(model, other, whole.ids, 3, whole.real))
        return found

    wanted = run(("no_grad",) * 3)
    for modes in MIXTURES:
        for got, right in zip(run(modes), wanted, strict=True):
            assert torch.equal(got, right), modes


def test_gradients_flow_where_nothing_is_evicted() -> None:
    """Also after a context that was read in inference mode, and whatever is observed on the way."""
    model = tiny("llama", layers=2).requires_grad_(True)
    batch = Batch.of(random_rows(model, [30, 30], 0))

    def gradient(cache: Any) -> Tensor:
        with torch.inference_mode():
            _fed(model, cache, batch, 0, 20)
        model.zero_grad()
        _fed(model, cache, batch, 20, 30).square().mean().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    wanted = gradient(DynamicCache(config=model.config))
    for spec in ("full", "h2o", "expected_attention"):
        with build(spec).attach(model) as cache:
            torch.testing.assert_close(gradient(cache), wanted, atol=1e-5, rtol=1e-4)


# ---- evaluation ------------------------------------------------------------------------------------------------------


def _calls(evaluator: Evaluator) -> dict[str, Callable[[], list[Evaluation]]]:
    one, task = policy(1), Words()
    several = [policy(seed) for seed in range(3)]
    costs = ExpectedCost.measurement.also(Measurement.of("oracle"))
    return {
        "likelihood": lambda: evaluator.evaluate(several, SAMPLE, task, EXACT),
        "attention": lambda: evaluator.evaluate(several, SAMPLE, task, Attention.measurement),
        "costs": lambda: evaluator.evaluate(several, SAMPLE, task, costs),
        "gradients": lambda: ranking_costs(evaluator, several, SAMPLE, "expected", gradient=True),
        "draws": lambda: ranking_costs(evaluator, [one] * 3, SAMPLE, "drawn", seeds=[1, 2, 3], gradient=True),
        "rollouts": lambda: rollouts(evaluator, one, SAMPLE, task, [1, 2]),
    }


def _numbers(found: list[Evaluation]) -> str:
    return repr([(e.values, e.steps) for e in found])


def test_evaluations_in_inference_mode_are_those_outside_and_leave_what_gradients_need() -> None:
    calls = _calls(Evaluator(load()))
    wanted = {name: _numbers(call()) for name, call in calls.items()}
    for first in calls:
        evaluator = Evaluator(load())
        with torch.inference_mode():
            inside = _calls(evaluator)[first]()  # its managers are made there as well
        assert _numbers(inside) == wanted[first]
        for then in ("gradients", "draws"):
            assert _numbers(_calls(evaluator)[then]()) == wanted[then], (first, then)


def test_nothing_but_inference_mode_is_left() -> None:
    """Leaving it alone would switch the recording of gradients on: every reading would hold its graph."""
    evaluator = Evaluator(load())
    evaluator.loaded.model.requires_grad_(True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            reading = evaluator.reading(evaluator.tokens(SAMPLE).read, frozenset({"attention_sum"}))
        assert not any(view.keys.requires_grad or view.keys.is_inference() for view in reading.views)
        evaluator.store.close()
