"""Memory: a narrow copy of a model's configuration, in which nothing that decides how attention works is changed.

Kept are head size, rotary embedding, activation, norms, softcap, and two layers of each kind. Made small are the number
of heads (their grouping stays), widths that follow from it, experts, vocabulary, and sliding windows and chunks.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

VOCABULARY = 128
WINDOW = 6
"""Tokens of a sliding window in the copy; also of a chunk of chunked attention."""
MOST_LAYERS = 8
_FREE_WIDTH = 128

_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads")  # also in a part's configuration (DBRX)
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size")
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "sliding_window_size")
_INNER = re.compile(r"intermediate|ffn_|_ffn|n_inner|expert_dim|d_ff")
_EXPERTS = re.compile(r"^(moe_)?(num|n)_(local_|routed_|moe_)?experts$")
_CHOSEN = re.compile(
    r"(num|n)?_?experts_per_tok(en)?$|^(moe_)?top_?k(_experts)?$|^router_top_k$|^num_experts_per_token$|^moe_k$"
)
_TOKEN = re.compile(r"token_(id|index)s?$")


def narrow(config: Any, *, every_expert: bool = False, fewer_heads: bool = True, **changes: Any) -> Any:
    """Return a narrow copy of a decoder's configuration, with ``changes`` made first.

    Whatever goes wrong in the configuration's class is raised as it is.

    Parameters
    ----------
    every_expert : two experts, and both for every token: a choice between experts flips by rounding.
    fewer_heads : make heads and widths small; without it the copy has few layers and experts only.
    """
    fields = {**copy.deepcopy(config.to_dict()), **changes}
    _narrow(fields, 2 if every_expert else 4, fewer_heads)
    return type(config).from_dict(fields)


def _narrow(fields: dict[str, Any], experts: int, fewer_heads: bool) -> None:
    """Change fields in place."""
    for name, value in fields.items():
        if isinstance(value, dict) and (name.endswith("_config") or any(key in value for key in (*_LAYERS, *_HEADS))):
            _narrow(value, experts, fewer_heads)  # the configuration of a part: text, vision, a sublayer's attention
    layers = _pick(fields, _LAYERS)
    if layers is not None:
        _fewer_layers(fields, layers, fields[layers])
    heads = _pick(fields, _HEADS)
    if heads is not None and fewer_heads:
        _fewer_heads(fields, heads)
    for name, value in fields.items():
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        if name == "vocab_size" or name.startswith("vocab_size_"):
            fields[name] = min(value, VOCABULARY)
        elif name in _WINDOWS:
            fields[name] = min(value, WINDOW) if value > 0 else value
        elif _EXPERTS.search(name):
            fields[name] = min(value, experts)
        elif _CHOSEN.search(name):
            fields[name] = min(max(value, 2) if experts == 2 else value, 2)
        elif name in ("n_group", "topk_group", "num_expert_group"):
            fields[name] = 1
        elif _INNER.search(name):
            fields[name] = min(value, 64)
        elif _TOKEN.search(name):
            fields[name] = min(value, VOCABULARY - 1)


def _pick(fields: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if isinstance(fields.get(name), int)), None)


def _fewer_layers(fields: dict[str, Any], name: str, count: int) -> None:
    """Keep two layers of each kind, as the lists with one entry a layer tell the kinds apart."""
    lists = {key: value for key, value in fields.items() if isinstance(value, list) and len(value) == count}
    seen: Counter[str] = Counter()
    kept: list[int] = []
    for layer in range(count):
        kind = repr([value[layer] for key, value in lists.items() if not _numbers(value)])
        seen[kind] += 1
        if seen[kind] <= 2 and len(kept) < MOST_LAYERS:
            kept.append(layer)
    for key in ("first_k_dense_replace", "num_dense_layers"):
        if isinstance(fields.get(key), int) and fields[key] > 1:
            fields[key] = 1
    for key, value in lists.items():
        fields[key] = [value[layer] for layer in kept]
    for key, value in fields.items():
        if isinstance(value, dict) and value and all(str(layer).isdecimal() for layer in value):
            fields[key] = {new: value[old] for new, old in _in_both(kept, value)}
    fields[name] = len(kept)
    for key in _LAYERS:
        if fields.get(key) == count:
            fields[key] = len(kept)


def _in_both(kept: list[int], by_layer: dict[Any, Any]) -> Iterator[tuple[int, Any]]:
    """Pairs of a kept layer's new number and its key in a mapping from layer numbers, which may be text."""
    for new, old in enumerate(kept):
        for key in (old, str(old)):
            if key in by_layer:
                yield new, key


def _numbers(values: list[Any]) -> bool:
    """Whether a list says how much, and not which kind (0 and 1 are kinds)."""
    return any(isinstance(value, float) or (isinstance(value, int) and value not in (0, 1)) for value in values)


def _fewer_heads(fields: dict[str, Any], name: str) -> None:
    """Two KV heads (one if there was one), two query heads each if they were grouped; widths in proportion."""
    heads = fields[name]
    grouped = _pick(fields, _KV_HEADS)
    kv_heads = fields[grouped] if grouped is not None else heads
    fewer_kv = min(kv_heads, 2)
    fewer = fewer_kv * min(heads // kv_heads, 2) if kv_heads and heads % kv_heads == 0 else heads
    if fewer >= heads:
        return
    for width in _WIDTHS:
        if not isinstance(fields.get(width), int):
            continue
        if isinstance(fields.get("head_dim"), int) and fields[width] != heads * fields["head_dim"]:
            fields[width] = min(fields[width], _FREE_WIDTH)  # the heads have a width of their own
        elif fields[width] % heads == 0:
            fields[width] = fields[width] // heads * fewer
    for key in _HEADS:
        if fields.get(key) == heads:
            fields[key] = fewer
    for part in (fields, *(value for value in fields.values() if isinstance(value, dict))):
        for key in _KV_HEADS:
            if part.get(key) == kv_heads:
                part[key] = fewer_kv


def random_model(make: Any, config: Any, seed: int = 0) -> Any:
    """Return ``make(config)`` in fp32 on the CPU, in eval mode, with random weights that make attention matter.

    Weights have a deviation of 1.5 / sqrt(inputs), so that attention prefers some tokens clearly; norms and biases are
    moved a little from one and zero. The global random state, type and device stay as they were.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        torch.manual_seed(seed)
        model = make(config).to(torch.float32)
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float32))
            else:
                width = 1.5 * (3 / parameter.shape[-1]) ** 0.5
                parameter.uniform_(-width, width, generator=generator)
    model.requires_grad_(False)
    return model.train(False)
