"""What a cache returns reaches the attention as it is, once: anything else is refused and not computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from evomem.errors import CacheError, UnsupportedModelError
from evomem.managers import build
from evomem.testing.comparing import same_logits
from tests.support.own_attention import OwnAttention, Step

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 32, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip


def model_with(step: Step) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).requires_grad_(False).eval()
    kind = type("OwnAttention", (OwnAttention,), {"step": staticmethod(step)})
    for layer in model.model.layers:
        layer.self_attn.__class__ = kind
    return model


def plain(attend: Any, key: Tensor, value: Tensor) -> Tensor:
    return attend(key, value)


def copied(attend: Any, key: Tensor, value: Tensor) -> Tensor:
    return attend(key.clone(), value.view(value.shape).contiguous())


def scaled_values(attend: Any, key: Tensor, value: Tensor) -> Tensor:
    return attend(key, value * 2)


def scaled_keys(attend: Any, key: Tensor, value: Tensor) -> Tensor:
    return attend(key * 2, value)


def shorter_values(attend: Any, key: Tensor, value: Tensor) -> Tensor:
    return torch.cat([attend(key, half) for half in value.chunk(2, dim=-1)], -1)


def repeated(attend: Any, key: Tensor, value: Tensor) -> Tensor:
    return attend(key.repeat_interleave(2, 1), value.repeat_interleave(2, 1))


def twice(attend: Any, key: Tensor, value: Tensor) -> Tensor:
    return attend(key, value) - 0.5 * attend(key, value)


def by_hand(attend: Any, key: Tensor, value: Tensor) -> Tensor:
    return value.repeat_interleave(2, 1).transpose(1, 2)


def run(model: Any, **options: Any) -> Tensor:
    ids = torch.arange(5, 29)[None]
    with torch.no_grad(), build("knorm(budget=500)").attach(model, self_check=False) as cache:
        first = model(ids, past_key_values=cache).logits
        return torch.cat((first, model(ids[:, :3], past_key_values=cache).logits), 1)


def test_copies_that_are_equal_are_let_through() -> None:
    same_logits("copied", run(model_with(copied)), run(model_with(plain)))


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (scaled_values, "changes values"),
        (scaled_keys, "changes keys"),
        (shorter_values, "changes values"),
        (repeated, "changes keys"),
        (twice, "attends twice"),
        (by_hand, "no managed attention read them"),
    ],
)
def test_what_changes_on_the_way_is_refused_at_the_first_pass(step: Step, why: str) -> None:
    model = model_with(step)
    for _ in range(2):  # also after an error
        with pytest.raises(UnsupportedModelError, match=why):
            run(model)


def test_keys_that_only_the_last_layer_leaves_unread_are_noticed() -> None:
    model = model_with(plain)
    last = model.model.layers[-1].self_attn
    last.__class__ = type("OwnAttention", (OwnAttention,), {"step": staticmethod(by_hand)})
    ids = torch.arange(5, 29)[None]
    with torch.no_grad(), build("knorm(budget=5)").attach(model, self_check=False) as cache:
        model(ids, past_key_values=cache)
        with pytest.raises((CacheError, UnsupportedModelError), match=r"layer 1|cut short"):
            model(ids, past_key_values=cache)
        cache.reset()
        model(ids, past_key_values=cache)
        with pytest.raises((CacheError, UnsupportedModelError), match="layer 1"):
            cache.decide()
    with torch.no_grad(), build("full").attach(model, self_check=False) as cache:  # nothing is left over
        model.model.layers[-1].self_attn.__class__ = model.model.layers[0].self_attn.__class__
        assert torch.isfinite(model(ids, past_key_values=cache).logits).all()


def test_a_call_without_the_cache_follows_at_once() -> None:
    """On a model of one layer nothing lies between: it is no second attention to the same keys."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_hidden_layers": 1})).eval()
    ids = torch.arange(5, 29)[None]
    with torch.no_grad():
        stock = model(ids).logits
        with build("full").attach(model) as cache:
            model(ids, past_key_values=cache)
            same_logits("no cache", model(ids, use_cache=False).logits, stock)
