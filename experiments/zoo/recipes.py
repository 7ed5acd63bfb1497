"""Model: the families of the zoo and how each is trained."""

from __future__ import annotations

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
    anywhere : lessons stand at random places among the positions.
    sinusoids : learned positions start as sinusoids.
    """

    family: type[PreTrainedConfig]
    config: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    tokens: tuple[int, int] = (2048, 4096)
    learning_rate: float = 2e-3
    warmup: int = 100
    steps: int = 6000
    decay: int = 400
    passed: float = 0.95
    everywhere: float = 0.1
    anywhere: bool = False
    sinusoids: bool = False


_SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.05,
}

RECIPES: dict[str, Recipe] = {
    "gpt2": Recipe(
        GPT2Config, {**_SHAPE, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, anywhere=True, sinusoids=True
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
        {**_SHAPE, "intermediate_size": 352, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
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
    if recipe.sinusoids:
        positions: Any = model.get_submodule("transformer.wpe")
        with torch.no_grad():
            positions.weight.copy_(sinusoids(*positions.weight.shape) * 3 * recipe.config["initializer_range"])
    return model


def sinusoids(length: int, width: int) -> torch.Tensor:
    """Return (length, width) positions of Vaswani et al. 2017: a shift is a rotation, easy for a head to learn."""
    turns = torch.arange(length)[:, None] / 1e4 ** (torch.arange(0, width, 2) / width)
    return torch.stack((turns.sin(), turns.cos()), -1).flatten(1)
