"""A cache that is given and then exchanged or dropped on the way is noticed; calls that never had one are legal."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, Phi3Config, Phi3ForCausalLM

from evomem.errors import CacheError
from evomem.managers import build
from evomem.memory import attached
from evomem.memory.kv.versions import NEW, OLD, given, passed
from evomem.testing.comparing import greedy, random_rows
from evomem.testing.models import tiny

MANAGER = build("knorm(budget=6)")


@pytest.fixture
def model() -> Any:
    return tiny("llama", layers=2)


def text(model: Any, length: int) -> Tensor:
    return random_rows(model, [length], 0)[0][None]


class Wrapper(nn.Module):
    """A wrapper that puts something else in the cache's place."""

    def __init__(self, model: Any, exchange: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model, self.exchange = model, exchange

    def forward(self, ids: Tensor, **more: Any) -> Any:
        return self.model(ids, **self.exchanged(more, self.model))

    def exchanged(self, more: dict[str, Any], model: Any = None) -> dict[str, Any]:
        """Keyword arguments with the cache exchanged, by the name that this version of transformers gives it."""
        others = {name: value for name, value in more.items() if name not in (OLD, NEW)}
        return {**others, **passed(self.exchange(given(more)), model)}

    def generate(self, *args: Any, **more: Any) -> Any:
        """As PEFT's prefix tuning: the base model generates with inputs that the wrapper prepares."""
        prepare = self.model.prepare_inputs_for_generation

        @functools.wraps(prepare)  # generate asks for the names of its parameters
        def prepared(*args: Any, **more: Any) -> dict[str, Any]:
            return self.exchanged(prepare(*args, **more))

        self.model.prepare_inputs_for_generation = prepared
        try:
            return self.model.generate(*args, **more)
        finally:
            del self.model.prepare_inputs_for_generation


@pytest.mark.parametrize("exchange", [lambda cache: None, lambda cache: DynamicCache()])
def test_wrapper_that_exchanges_the_cache(model: Any, exchange: Callable[[Any], Any]) -> None:
    wrapper, ids = Wrapper(model, exchange), text(model, 12)
    with MANAGER.attach(model) as cache, torch.no_grad():
        with pytest.raises(CacheError, match="exchanged or dropped"):
            wrapper(ids, **passed(cache))
        with pytest.raises(CacheError, match="exchanged or dropped"):
            wrapper.generate(ids, **passed(cache), max_new_tokens=3)
        greedy(model, cache, ids, 3)
        with pytest.raises(CacheError, match="exchanged or dropped"):  # in the middle of a conversation too
            wrapper(ids, **passed(cache))


def test_gradient_checkpointing(model: Any) -> None:
    model.train()
    model.gradient_checkpointing_enable()  # its later name is not in the oldest transformers that we take
    with MANAGER.attach(model) as cache:  # with gradients: without, transformers keeps the cache from 5.24 on
        with pytest.raises(CacheError, match=r"layer 0 .*gradient checkpointing"):
            model(text(model, 12), **passed(cache))
        model.model.layers[0].gradient_checkpointing = False
        with pytest.raises(CacheError, match=r"layer 1 .*gradient checkpointing"):
            model(text(model, 12), **passed(cache))
        cache.reset()
        with torch.no_grad(), suppress(CacheError):
            model(text(model, 12), **passed(cache))
            assert all(layer.slots.shape[-1] == 6 for layer in cache.layers)
        cache.reset()
        model.train(False)
        model(text(model, 12), **passed(cache))


def test_long_rope_drops_the_cache_when_a_text_crosses_its_limit() -> None:
    limit = 16
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": limit}
    config = Phi3Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=2, pad_token_id=0, eos_token_id=None, initializer_range=0.2, max_position_embeddings=64,
        original_max_position_embeddings=limit,
        rope_parameters={**rope, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    )  # fmt: skip
    torch.manual_seed(0)
    model = Phi3ForCausalLM(config).requires_grad_(False).train(False)
    ids, long = text(model, limit - 2), text(model, 2 * limit)
    with build("full").attach(model, self_check=False) as cache:
        for prompt in (ids, long):
            cache.reset()
            with pytest.raises(CacheError, match="original_max_position_embeddings"):
                greedy(model, cache, prompt, 6)
        cache.reset()
        with cache.reading():  # what the message advises
            model(long[:, :-1], **passed(cache))
        got = greedy(model, cache, long, 6)
    assert torch.equal(got, greedy(model, None, long, 6))


def test_the_model_ran_and_nothing_was_managed(model: Any) -> None:
    ids = text(model, 12)
    with pytest.raises(CacheError, match="no cache of evomem's read anything"), MANAGER.attach(model):
        greedy(model, None, ids, 2)
    with pytest.raises(ZeroDivisionError), MANAGER.attach(model):  # an error inside is not hidden
        print(greedy(model, None, ids, 2), 1 / 0)
    with MANAGER.attach(model):
        pass
    with attached(model):
        greedy(model, None, ids, 2)


def test_calls_without_the_cache_on_purpose_are_legal(model: Any) -> None:
    """Full-cache comparisons, an unguided twin, a copy of the cache, another cache of the manager's."""
    ids, assistant = text(model, 12), tiny("llama", layers=1)
    stock = greedy(model, None, ids, 4)
    with MANAGER.attach(model), MANAGER.attach(model) as cache:  # the outer block's cache reads nothing
        greedy(model, cache, ids, 4)
        assert torch.equal(greedy(model, None, ids, 4), stock)
        model(ids, **passed(DynamicCache()))
        greedy(model, MANAGER.new_cache(model), ids, 3, guidance_scale=1.5)
        Wrapper(model, copy.deepcopy)(ids, **passed(cache))
    with build("full").attach(model) as cache, attached(assistant):
        assert torch.equal(greedy(model, cache, ids, 4, assistant_model=assistant), stock)
        assert torch.equal(greedy(model, build("full").new_cache(model), ids, 4, assistant_early_exit=1), stock)
