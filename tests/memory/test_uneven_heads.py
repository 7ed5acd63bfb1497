"""Layers with different numbers of KV heads: the slots of all heads add up to the budget, or the manager is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaAttention

from evomem.errors import UnsupportedModelError
from evomem.evaluation import EvaluationProtocol, Evaluator
from evomem.managers import build
from evomem.models import LoadedModel
from evomem.testing.models import tiny, tiny_tokenizer
from tests.evaluation.test_evaluation import TASK, make_sample

HEADS = (4, 2, 1, 2)
BY_DEPTH = (
    "keydiff(budget=10,allocation=pyramid)",
    "pyramidkv(budget=10)",
    "keydiff(budget=10,allocation=across_heads(layers=pyramid))",
    "feature_scorer(budget=10,allocation=3)",
    "kv_policy(budget=10,allocation=3)",
    "keydiff(budget=10,allocation=layer_budgets(layers=4))",
)
OTHERS = (
    "uniform", "across_heads", "cake", "lava", "probe_shares", "per_head_shares(layers=4,heads=2)", "razor", "duo",
    "headkv", "slots",
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    """Return a Llama whose layers have 4, 2, 1 and 2 KV heads, as Gemma 4 and DeciLM have layers of different heads."""
    made = tiny("llama", layers=len(HEADS))
    for layer, count in zip(made.model.layers, HEADS, strict=True):
        config = copy.deepcopy(made.config)
        config.num_key_value_heads = count
        layer.self_attn = LlamaAttention(config, layer.self_attn.layer_idx)
        layer.self_attn.config = made.config
    return made.eval()


def held(manager, model):
    with torch.no_grad(), manager.attach(model) as cache:
        model(input_ids=torch.arange(3, 43)[None], past_key_values=cache)
        return [layer[0].tolist() for layer in cache.slots_held()]


@pytest.mark.parametrize("spec", BY_DEPTH)
@pytest.mark.parametrize("every", [None, 8])
def test_parts_by_depth_are_refused(spec, every, model):
    """Equal parts a head of unequal layers: 111 slots were held for 90."""
    manager = build(spec).with_options(every=every)
    with pytest.raises(UnsupportedModelError, match="KV heads, so that the slots of all heads would not add up"):
        held(manager, model)
    for kind in ("compress_once", "streaming"):
        evaluator = Evaluator(
            LoadedModel("llama", model, tiny_tokenizer(), "llama"), EvaluationProtocol(kind=kind, every=16)
        )
        with pytest.raises(UnsupportedModelError, match="would not add up"):
            evaluator.evaluate([manager], make_sample(), TASK)


@pytest.mark.parametrize("allocation", OTHERS)
def test_others_hold_the_budget(allocation, model):
    """The total is heads times budget, and layers with more heads have more."""
    kept = held(build(f"keydiff(budget=10,allocation={allocation})"), model)
    assert [len(layer) for layer in kept] == list(HEADS)
    assert sum(map(sum, kept)) == 10 * sum(HEADS)
