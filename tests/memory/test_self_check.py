"""A model that computes something else under the managed attention is refused before it is used."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DbrxConfig,
    DeepseekV3Config,
    DiffLlamaConfig,
    DogeConfig,
    JetMoeConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlamaModel,
    MiniCPM3Config,
    MixtralConfig,
    PhimoeConfig,
    Qwen3MoeConfig,
)

from evomem.errors import UnsupportedModelError
from evomem.managers import Full
from evomem.memory import check_supported
from evomem.memory.kv import self_check as checking
from evomem.memory.kv.attach import attention_modules
from evomem.memory.kv.narrow import narrow
from evomem.memory.kv.self_check import SelfCheckWarning, self_check
from evomem.testing.models import tiny
from tests.support.own_attention import OwnAttention

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 32, "pad_token_id": 0,
}  # fmt: skip


class AveragingAttention(OwnAttention):
    """Adds the mean of all cached values to its output; of slots it gets the new tokens' only."""

    @staticmethod
    def step(attend: Any, key: Tensor, value: Tensor) -> Tensor:
        return attend(key, value) + value.mean((1, 2))[:, None, None]


class AveragingModel(LlamaModel):
    """As a stranger's repository would define one."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = AveragingAttention(config, index)


class OddModel(LlamaModel):
    """Cannot be made from a configuration alone."""

    def __init__(self, config: Any, secret: int) -> None:
        super().__init__(config)
        self.secret = secret


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has checked nothing yet."""
    monkeypatch.setattr(checking, "_done", {})
    monkeypatch.setattr(checking, "_checked", checking.WeakSet())
    monkeypatch.delenv(checking.VARIABLE, raising=False)


def test_a_model_that_computes_something_else_is_refused_with_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    model = AveragingModel(LlamaConfig(**SMALL))
    before = model.config._attn_implementation
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=r"AveragingModel .* differ by \d.*largest is \d"):
            Full().attach(model).__enter__()
    assert model.config._attn_implementation == before
    with Full().attach(model, self_check=False):
        pass
    monkeypatch.setenv(checking.VARIABLE, "0")
    with Full().attach(model):
        pass


def test_once_per_class_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make = checking.small_copy
    monkeypatch.setattr(checking, "small_copy", lambda decoder: made.append(type(decoder)) or make(decoder))
    config = MixtralConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1)
    first, second = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    for model in (first, second, first):
        self_check(model)
    assert len(made) == 1
    self_check(AutoModelForCausalLM.from_config(MixtralConfig(**{**SMALL, "sliding_window": 9}, num_local_experts=2)))
    assert len(made) == 2
    for family in ("llama", "gpt2", "mistral"):  # held to the stock model by evomem's own tests
        self_check(tiny(family, layers=1))
    assert len(made) == 2


def test_nothing_else_is_disturbed() -> None:
    torch.manual_seed(3)
    before, dtype = torch.random.get_rng_state(), torch.get_default_dtype()
    model = AutoModelForCausalLM.from_config(PhimoeConfig(**SMALL, num_local_experts=2, sliding_window=9))
    torch.random.set_rng_state(before)
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.inference_mode(), torch.device("meta"):
            self_check(model)
            assert torch.empty(()).device.type == "meta"
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(dtype)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model in checking._checked


def test_what_cannot_be_copied_is_warned_about_once_and_not_refused() -> None:
    model = OddModel(LlamaConfig(**SMALL), secret=1)
    with pytest.warns(SelfCheckWarning, match=r"OddModel was not compared.*secret"), Full().attach(model):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Full().attach(OddModel(LlamaConfig(**SMALL), secret=2)):
            pass


def test_narrow_keeps_what_decides_attention() -> None:
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    config = Qwen3MoeConfig(
        vocab_size=150_000, hidden_size=2048, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        num_hidden_layers=24, layer_types=kinds * 6, sliding_window=4096, use_sliding_window=True, num_experts=128,
    )  # fmt: skip
    copy = narrow(config)
    assert copy.layer_types == kinds[:2] + kinds[3:] * 2  # two of each, in their order
    assert (copy.head_dim, copy.num_attention_heads, copy.num_key_value_heads) == (128, 4, 2)
    assert copy.sliding_window == 6
    assert copy.hidden_size < 512
    assert copy.num_experts == 4
    assert config.num_hidden_layers == 24


# ---- refused, or accepted, when it is attached ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (DiffLlamaConfig(**SMALL), "attends twice"),
        (DogeConfig(**SMALL), "makes its mask from the values"),
        (JetMoeConfig(**SMALL, kv_channels=8, num_local_experts=2), "repeats keys"),
        (DeepseekV3Config(**SMALL, n_routed_experts=4, n_group=1, first_k_dense_replace=1), "latent"),
        (MiniCPM3Config(**SMALL), "latent"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_refused_at_attach_with_the_reason(config: Any, why: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModelError, match=f"{type(model).__name__}.*{why}"):
        Full().attach(model, self_check=False).__enter__()


def test_a_norm_around_attention_is_no_attention() -> None:
    attention = {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}
    feed = {"ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1}
    config = DbrxConfig(
        d_model=32, n_heads=4, n_layers=2, vocab_size=64, max_seq_len=64, attn_config=attention, ffn_config=feed
    )
    model = AutoModelForCausalLM.from_config(config)
    assert check_supported(model) == 2
    assert [type(module).__name__ for module in attention_modules(model)] == ["DbrxAttention"] * 2
    with Full().attach(model):
        pass


def test_chunked_attention() -> None:
    config = Llama4TextConfig(
        **SMALL, head_dim=8, intermediate_size_mlp=32, num_local_experts=2, attention_chunk_size=5,
        layer_types=["chunked_attention", "full_attention"],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error", SelfCheckWarning)
        self_check(AutoModelForCausalLM.from_config(config))
