"""Model: the families of the zoo and how each is trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
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

from evomem.models.architectures.fam import Fam, FamConfig
from evomem.models.architectures.memory_matrix import MemoryMatrix, MemoryMatrixConfig
from evomem.models.architectures.mosaic import MemoryMosaic, MosaicConfig
from evomem.tasks.text.zoo_words import KEYS, VALUES
from experiments.zoo.data import FEW, POSITIONS, TASKS
from experiments.zoo.matrix import begin_as_pairs
from experiments.zoo.mosaic import begin_as_copies


@dataclass(frozen=True)
class Recipe:
    """How a model is made.

    Attributes
    ----------
    family : configuration class of ``transformers``.
    config : its fields, besides vocabulary and special tokens.
    tasks : whose lessons it is trained on.
    lengths : tokens of a lesson, one a stage of the curriculum.
    tokens : of a batch of lessons shorter than 256 tokens, and of the longer ones.
    learning_rate, warmup, steps, decay : AdamW's rate, steps of its rise, the most steps, and steps of its fall to
        zero, which begins when the last stage is passed.
    passed : running accuracy of every kind of answer at which a stage is passed.
    everywhere : weight of the loss on all tokens, beside that on the answers.
    anywhere : lessons stand at random places among the positions.
    notes : tokens before each one that the first layer begins by noting; with two, the others look where both are.
    """

    family: type[PreTrainedConfig]
    config: dict[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] = TASKS
    lengths: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)
    tokens: tuple[int, int] = (2048, 4096)
    learning_rate: float = 3e-3
    warmup: int = 100
    steps: int = 6000
    decay: int = 400
    passed: float = 0.95
    everywhere: float = 0.1
    anywhere: bool = False
    notes: int = 1


_SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
}

RECIPES: dict[str, Recipe] = {
    "gpt2": Recipe(
        GPT2Config, {**_SHAPE, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, anywhere=True, notes=2
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
    ),
}
RECIPES["forgetting"] = replace(RECIPES["gpt-neox"], tasks=("zoo_forgetting",), passed=0.97)
RECIPES["memory-matrix"] = Recipe(
    MemoryMatrixConfig,
    {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "window": 16,
        "matrix_slots": 32,
        "matrix_width": 80,
        "matrix_layers": [1],
    },
    tasks=(FEW,),
    tokens=(1024, 1024),
    lengths=(128,),
    learning_rate=2e-4,
    warmup=10,
    decay=40,
    passed=0.9,
)
RECIPES["mosaic"] = Recipe(
    MosaicConfig,
    {
        "form": "v1",
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "persistent_size": 256,
        "initializer_range": 0.05,
        "tie_word_embeddings": False,
    },
    learning_rate=1e-3,
    warmup=30,
    decay=100,
)
RECIPES["fam"] = Recipe(
    FamConfig,
    {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "block": 16,
        "segments": 1,
        "feedback": 4,
        "initializer_range": 0.1,
    },
    tasks=("zoo_passkey",),
    lengths=(32, 64, 96, 128, 160),
    tokens=(3072, 3072),
    warmup=50,
    steps=1500,
    decay=100,
    passed=0.97,
    everywhere=0.02,
)
RECIPES["fam-wide"] = replace(
    RECIPES["fam"],
    config={**RECIPES["fam"].config, "hidden_size": 96, "num_hidden_layers": 3, "intermediate_size": 192},
    learning_rate=2e-3,
)
# The same without feedback: block sliding-window attention alone. It passes no stage past its field.
RECIPES["fam-blocks"] = replace(RECIPES["fam"], config={**RECIPES["fam"].config, "feedback": 0}, steps=300)
"""Every recipe by name, its family's or its task's; the model's alias is ``zoo-`` and this name."""


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
            if isinstance(model, MemoryMatrix):
                ids: Any = tokenizer.convert_tokens_to_ids
                begin_as_pairs(model, (torch.tensor(ids(list(KEYS))), torch.tensor(ids(list(VALUES)))))
            elif isinstance(model, MemoryMosaic):
                begin_as_copies(model)
            elif not isinstance(model, Fam):  # which begins at random
                _begin_as_induction(model, recipe.notes)
    return model


def _begin_as_induction(model: PreTrainedModel, back: int) -> None:
    """Let the heads of the model begin as induction heads (Olsson et al. 2022).

    The width is divided into parts that do not disturb each other: where a token stands, what it is, what the one
    before it was, and what to say next. The heads of the first layer look at the token before and note what it is;
    those of the others look where the token that they stand on is noted, and copy what is there into the part that the
    output reads. A random start finds the same, but needs hours of a core for it. Everything stays trainable, and what
    to do with needles of several digits, or where a key occurs twice, remains to be learnt.
    """
    config = model.config
    width, heads = config.hidden_size, config.num_attention_heads
    size = width // heads
    places = 2 * _frequencies(size) if config.model_type == "gpt2" else 1
    basis = torch.nn.init.orthogonal_(torch.empty(width, width))
    place, tokens, notes, copies = basis.split((places, width - places - 2 * size, size, size))
    # Each head is smaller than the tokens' part: it sees them from one side.
    noted, copied = (torch.nn.init.orthogonal_(torch.empty(size, len(tokens))) @ tokens for _ in range(2))
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    words.weight.copy_(torch.randn(words.weight.shape[0], len(tokens)) / len(tokens) ** 0.5 @ tokens)
    head.weight.copy_(words.weight @ copied.T @ copies)
    befores, this = _looking_back(model, place, back)
    part = size // back
    seen = noted[:part]  # what is noted of a token
    wanted = torch.cat((seen, notes[:-part])) if back > 1 else seen
    values = torch.nn.functional.pad(seen, (0, 0, 0, size - part))
    # Head by head: how far it looks, and the part that it writes into.
    steps = [head * back // heads for head in range(heads)]
    keys = torch.stack([befores[step] for step in steps])
    written = torch.cat([torch.nn.functional.pad(notes.split(part)[step], (0, 0, 0, size - part)) for step in steps])
    for name, weight in model.named_parameters():
        if name.endswith("q_norm.weight"):
            weight.mul_(4.0)  # products of normalised queries and keys are small, and this grows by a rate a step only
        elif name.endswith(("mlp.c_proj.weight", "mlp.down_proj.weight", "mlp.dense_4h_to_h.weight")):
            weight.zero_()  # the noise of layers that have nothing to say yet would drown the notes
    for number, (query, key, value, output) in enumerate(_attention_weights(model)):
        query.mul_(0.3).add_(2 * wanted if number else this)
        key.mul_(0.3).add_(notes if number else keys[: len(key)])
        value.mul_(0.3).add_(copied if number else values)
        output.mul_(0.05).add_(0.14 * back / heads * (copies.repeat(heads, 1) / back if number else written).T)


def _frequencies(size: int) -> int:
    """Return of how many sinusoids learned positions begin to be made; the heads' size is ``size``."""
    return max(1, 3 * size // 8)


def _looking_back(model: PreTrainedModel, place: torch.Tensor, back: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return keys, and queries (head size, width), that agree most where the key's position is 1, 2, ... below.

    Learned positions get sinusoids for it, in the part ``place`` (places, width); rotated ones a direction there that
    all tokens share.
    """
    config = model.config
    width, words = config.hidden_size, model.get_input_embeddings()
    size = width // config.num_attention_heads
    before, this = torch.zeros(2, size, width)
    if config.model_type == "gpt2":
        count = _frequencies(size)
        turns = torch.linspace(0.3, 2.9, count) + 0.1 * torch.rand(count)  # radians a position
        angles = torch.arange(config.max_position_embeddings)[:, None] * turns
        positions: Any = model.get_submodule("transformer.wpe")
        positions.weight.copy_(torch.cat((angles.cos(), angles.sin()), 1) / count**0.5 @ place)
        this[: 2 * count] = before[: 2 * count] = 1.5 * place
        pairs = [(pair, pair + count, turns[pair]) for pair in range(count)]
        return _turned(before, pairs, back), this
    words.weight.add_(place)
    rope = config.rope_parameters
    rotated = int(size * rope.get("partial_rotary_factor", 1.0))
    this[:2] = before[:2] = place[0]
    # The two that turn enough from one position to the next.
    pairs = [(pair, pair + rotated // 2, rope["rope_theta"] ** (-2 * pair / rotated)) for pair in range(2)]
    return _turned(before, pairs, back), this


def _turned(weights: torch.Tensor, pairs: list[tuple[int, int, Any]], times: int) -> list[torch.Tensor]:
    """Return ``weights`` (head size, width) with pairs of rows turned by an angle once, twice, ..."""
    found = []
    for _ in range(times):
        for first, second, angle in pairs:
            _turn(weights, first, second, angle)
        found.append(weights.clone())
    return found


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
