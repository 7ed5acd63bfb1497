"""Model: the families of the zoo and how each is trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from experiments.zoo.data import POSITIONS


@dataclass(frozen=True)
class Recipe:
    """How a model is made.

    Attributes
    ----------
    family : configuration class of ``transformers``.
    config : its fields, besides vocabulary and special tokens.
    lengths : tokens of a lesson, one a stage of the curriculum.
    tokens : of a batch of lessons shorter than 256 tokens, and of the longer ones.
    learning_rate, warmup, steps, decay : AdamW's rate, steps of its rise, the most steps, and steps of its fall to
        zero, which begins when the last stage is passed.
    passed : running accuracy of both tasks at which a stage is passed.
    everywhere : weight of the loss on all tokens, beside that on the answers.
    quiet : the layers' MLPs begin with nothing to say; otherwise their noise drowns the tokens at first.
    anywhere : lessons stand at random places among the positions.
    """

    family: type[PreTrainedConfig]
    config: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)
    tokens: tuple[int, int] = (2048, 4096)
    learning_rate: float = 3e-3
    warmup: int = 100
    steps: int = 6000
    decay: int = 400
    passed: float = 0.95
    everywhere: float = 0.1
    quiet: bool = False
    anywhere: bool = False


_SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}

RECIPES: dict[str, Recipe] = {
    "gpt2": Recipe(
        GPT2Config, {**_SHAPE, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, anywhere=True, quiet=True
    ),
    "gpt-neox": Recipe(
        GPTNeoXConfig,
        {
            **_SHAPE,
            "intermediate_size": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
        },
    ),
    "qwen3": Recipe(
        Qwen3Config,
        {
            **_SHAPE,
            "intermediate_size": 352,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "num_key_value_heads": 2,
            "head_dim": 32,
        },
        quiet=True,
    ),
}
"""Every recipe by the name of its family; the model's alias is ``zoo-`` and this name."""


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """Return an untrained model; the global random state is left as it was."""
    config = recipe.family(
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **recipe.config,
    )
    auto: Any = AutoModelForCausalLM  # not annotated
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            _begin_as_induction(model)
            for name, weight in model.named_parameters():
                if recipe.quiet and name.endswith(("mlp.c_proj.weight", "mlp.down_proj.weight")):
                    weight.zero_()
    return model


def _begin_as_induction(model: PreTrainedModel) -> None:
    """Let the heads of the model begin as induction heads (Olsson et al. 2022).

    Those of the first layer look at the token before and note what it is in a subspace of its own. Those of the others
    look where the token that they stand on is noted, and copy what is there. A random start finds the same, but needs
    hours of a core for it. Everything stays trainable, and how far to look and what to make of it remains to be learnt.
    """
    config, spread = model.config, model.config.initializer_range
    width, heads = config.hidden_size, config.num_attention_heads
    groups, size = getattr(config, "num_key_value_heads", heads), width // heads
    bases = torch.stack([torch.nn.init.orthogonal_(torch.empty(width, width)) for _ in range(2)])
    if config.model_type == "gpt2":
        bases[..., :size] = 0.0  # there the positions are
    # The token itself is read through `tokens`, the one before through `notes`: (KV heads, head size, width).
    tokens, notes = bases.unflatten(1, (heads, size))[:, :groups]
    before, this = _looking_back(model)
    for name, weight in model.named_parameters():
        if name.endswith("q_norm.weight"):
            weight.mul_(2.5)  # products of normalised queries and keys are small, and this grows by a rate a step only
    for number, (query, key, value, output) in enumerate(_attention_weights(model)):
        query.mul_(0.3).add_(_for_queries(tokens, heads) if number else this)
        key.mul_(0.3).add_(notes if number else before)
        value.mul_(0.3).add_(tokens)
        output.add_(2 * spread * _for_queries(tokens if number else notes, heads).flatten(0, 1).T)


def _for_queries(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """Repeat what KV heads have (KV heads, head size, width) for the query heads that share them."""
    return weights.repeat_interleave(heads // len(weights), 0)


def _looking_back(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and queries (head size, width) that agree most where the key's position is one below the query's.

    Learned positions get sinusoids for it, in a part of the width; rotated ones a direction that all tokens share.
    """
    config, spread = model.config, model.config.initializer_range
    width = config.hidden_size
    size = width // config.num_attention_heads
    before, this = torch.zeros(2, size, width)
    words: Any = model.get_input_embeddings()
    if config.model_type == "gpt2":
        turns = 100.0 ** (-torch.arange(size // 2) / (size // 2))  # radians a position
        angles = torch.arange(config.max_position_embeddings)[:, None] * turns
        positions: Any = model.get_submodule("transformer.wpe")
        words.weight[:, :size] *= 0.1
        positions.weight[:, :size] = 2 * spread * torch.cat((angles.cos(), angles.sin()), 1)
        for pair in range(min(4, size // 2)):  # the quickest: the others turn too little from one position to the next
            sine = pair + size // 2
            this[pair, pair] = this[sine, sine] = before[pair, pair] = before[sine, sine] = 2.2
            _turn(before, pair, sine, turns[pair])
        return before, this
    direction = torch.randn(width)
    words.weight.add_(spread * direction)
    rope = config.rope_parameters
    rotated = int(size * rope.get("partial_rotary_factor", 1.0))
    for pair in range(2):  # those that turn enough from one position to the next
        this[pair] = before[pair] = 1.2 / 2**0.5 * direction / direction.norm()
        _turn(before, pair, pair + rotated // 2, rope["rope_theta"] ** (-2 * pair / rotated))
    return before, this


def _turn(weights: torch.Tensor, first: int, second: int, angle: Any) -> None:
    """Turn a pair of rows (width,) of ``weights`` by an angle in radians, in place."""
    a, b = weights[first].clone(), weights[second].clone()
    cosine, sine = torch.cos(torch.as_tensor(angle)), torch.sin(torch.as_tensor(angle))
    weights[first], weights[second] = a * cosine - b * sine, b * cosine + a * sine


def _attention_weights(model: PreTrainedModel) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield each layer's queries, keys and values (heads, head size, width) and output (width, width), as views."""
    heads = model.config.num_attention_heads
    for layer in model.base_model.h if model.config.model_type == "gpt2" else model.base_model.layers:
        match model.config.model_type:
            case "gpt2":
                query, key, value = layer.attn.c_attn.weight.T.unflatten(0, (3, heads, -1))
                output = layer.attn.c_proj.weight.T
            case "gpt_neox":
                query, key, value = layer.attention.query_key_value.weight.unflatten(0, (heads, 3, -1)).unbind(1)
                output = layer.attention.dense.weight
            case _:
                attention = layer.self_attn
                size = attention.head_dim
                parts = (attention.q_proj, attention.k_proj, attention.v_proj)
                query, key, value = (part.weight.unflatten(0, (-1, size)) for part in parts)
                output = attention.o_proj.weight
        yield query, key, value, output
