"""Calls over another cache, or none, while a model is attached: the stock model to the bit, under its own masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Gemma2Config, PreTrainedModel, StaticCache

from evomem.errors import CacheError
from evomem.managers import build
from evomem.memory import attached
from evomem.testing.comparing import greedy, random_rows, read
from evomem.testing.models import tiny
from evomem.testing.reference import Batch

PIECES = [13, 4, 1, 1, 1]


class Rounding(DynamicCache):
    """A cache that gives other keys back than it got, as quantized ones do."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **more: Any) -> Any:
        return super().update(keys.bfloat16().float(), values.bfloat16().float(), layer_idx, *args, **more)


def softcapped() -> PreTrainedModel:
    """Gemma 2: squashed logits, full and sliding layers, eager attention only."""
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, sliding_window=9, attn_logit_softcapping=2.0, initializer_range=0.3,
        query_pre_attn_scalar=8, pad_token_id=0, eos_token_id=None, attn_implementation="eager",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).requires_grad_(False).train(False)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: tiny("llama", layers=2),
    "window": lambda: tiny("mistral", layers=2, sliding_window=6),
    "gpt2": lambda: tiny("gpt2", layers=2),
    "softcap": softcapped,
}
CACHES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "without windows": lambda model: DynamicCache(),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=40),
    "rounding": lambda model: Rounding(config=model.config),
}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_calls_over_other_caches_are_the_stock_model(family: str, implementation: str) -> None:
    model = MODELS[family]()
    if family != "softcap":
        model.set_attn_implementation(implementation)
    for lengths in ([20, 20], [20, 13]):
        batch = Batch.of(random_rows(model, lengths, 0))
        for name, make in CACHES.items():
            stock = read(model, make(model), batch, PIECES)
            with attached(model):
                got = read(model, make(model), batch, PIECES)
            assert torch.equal(got[batch.real], stock[batch.real]), name
        stock = model(batch.ids, attention_mask=batch.real.long(), use_cache=False, output_attentions=True)
        with attached(model):
            got = model(batch.ids, attention_mask=batch.real.long(), use_cache=False, output_attentions=True)
        assert torch.equal(got.logits[batch.real], stock.logits[batch.real])
        weights = [(mine, theirs) for mine, theirs in zip(got.attentions, stock.attentions, strict=True)]
        assert len(weights) == (model.config.num_hidden_layers if implementation == "eager" else len(weights))
        assert all(torch.equal(mine, theirs) for mine, theirs in weights if theirs is not None)


@pytest.mark.parametrize("more", [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 2}])
@pytest.mark.parametrize("family", ["llama", "window"])
def test_generate_without_our_cache_is_the_stock_model(family: str, more: dict[str, Any]) -> None:
    model = MODELS[family]()
    for lengths in ([20, 20], [20, 13]):
        batch = Batch.of(random_rows(model, lengths, 1))
        stock = greedy(model, None, batch.ids, 5, batch.real, **more)
        with attached(model):
            assert torch.equal(greedy(model, None, batch.ids, 5, batch.real, **more), stock)


def test_a_cache_of_another_model_is_refused() -> None:
    model, batch = tiny("llama", layers=2), Batch.of(random_rows(tiny("llama", layers=2), [9], 0))
    with build("full").attach(model) as cache:
        read(model, cache, batch)
        for other in (tiny("llama", layers=2, seed=1), tiny("llama", layers=3)):
            with attached(other), pytest.raises(CacheError, match="belongs to another model"):
                read(other, build("full").new_cache(model), batch)
