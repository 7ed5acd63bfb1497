"""Memory: how many tokens a model has positions for, evicted ones counted, and what happens beyond."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from evomem.errors import ModelError
from evomem.memory.kv.versions import given

if TYPE_CHECKING:  # seconds to import
    from transformers import PreTrainedModel

_TABLE = re.compile(r"wpe|positions?_embed(dings?)?|embed_positions|pos(itional)?_emb(ed(ding)?)?|pos_encoding")
"""What the tables of learned (or precomputed) positions are called in transformers' decoders."""

_SCALED = frozenset({"linear", "dynamic", "yarn"})
"""Kinds of rotary scaling whose factor stretches the positions that the configuration names."""


@dataclass(frozen=True)
class PositionLimit:
    """How far a model can read.

    Attributes
    ----------
    tokens : positions that it has, or that it was made for. Every token ever read takes one, evicted ones too.
    learned : it has a table of positions, and beyond its end there is nothing; otherwise (rotary positions) it goes on
        without an error, at positions that it was not trained for.
    masked : the table counts by the padding mask (OPT), not by the tokens read.
    """

    tokens: int
    learned: bool
    masked: bool = False


def position_limit(model: PreTrainedModel) -> PositionLimit | None:
    """Return how many tokens a model can read; None where nothing is known (ALiBi, no positions).

    For rotary positions that is ``max_position_embeddings``, with the scaling (``rope_parameters``) that stretches it:
    YaRN's, linear and dynamic scaling multiply the original positions; Llama 3's and LongRoPE's configurations name
    the stretched number themselves.
    """
    own = getattr(model, "learned_positions", None)  # a model of ours, which counts in a way of its own
    if isinstance(own, int):
        return PositionLimit(own, learned=True)
    text: Any = model.config.get_text_config(decoder=True)
    if model not in _scanned:
        _scanned[model] = _scan(_decoder(model, text))
    table, rotary = _scanned[model]
    if table is not None:
        return table
    stated = getattr(text, "max_position_embeddings", None)
    if not rotary or not isinstance(stated, int) or stated < 1:
        return None
    return PositionLimit(_stretched(stated, getattr(text, "rope_parameters", None)), learned=False)


_scanned: WeakKeyDictionary[nn.Module, tuple[PositionLimit | None, bool]] = WeakKeyDictionary()
"""What `_scan` found: it looks at every module, and caches are made often."""


def _scan(decoder: nn.Module) -> tuple[PositionLimit | None, bool]:
    """Return the shortest table of positions, if there is one, and whether there are rotary positions."""
    tables = [limit for name, module in decoder.named_modules() for limit in _tables(name.rpartition(".")[2], module)]
    rotary = any(name.endswith("inv_freq") for name, _ in decoder.named_buffers())
    return min(tables, key=lambda limit: limit.tokens, default=None), rotary


def _decoder(model: PreTrainedModel, text: Any) -> nn.Module:
    """Return the part of a model that reads text: a picture's positions are of no concern."""
    decoders = [module for module in model.modules() if getattr(module, "config", None) is text]
    return decoders[0] if decoders else model


def _tables(name: str, module: nn.Module) -> Iterator[PositionLimit]:
    """Yield the limits of the tables that a module is, or holds as a buffer."""
    if hasattr(module, "make_weights"):  # it grows (XGLM)
        return
    if _TABLE.fullmatch(name) and isinstance(module, nn.Embedding):
        first = getattr(module, "offset", None)  # OPT's and BART's first two rows are no positions
        padding = module.padding_idx  # RoBERTa's positions begin after it
        unused = first if isinstance(first, int) else 0 if padding is None else int(padding) + 1
        yield PositionLimit(module.num_embeddings - unused, learned=True, masked=type(module) is not nn.Embedding)
    for label, buffer in module.named_buffers(recurse=False):
        if _TABLE.fullmatch(label) and buffer.dim() == 2:  # GPT-J, CodeGen
            yield PositionLimit(buffer.shape[0], learned=True)


def _stretched(stated: int, rope: Any) -> int:
    """Return the positions of a rotary model with its scaling (`position_limit`)."""
    if not isinstance(rope, Mapping) or any(isinstance(part, Mapping) for part in rope.values()):
        return stated  # nothing, or per layer type (Gemma 3), where the stretched number is stated
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if rope.get("rope_type", rope.get("type")) not in _SCALED or not isinstance(factor, int | float):
        return stated
    return max(stated, int((original if isinstance(original, int) else stated) * factor))


def beyond(model: PreTrainedModel, limit: PositionLimit) -> str:
    """Return what to tell somebody who reads further than a model can, as the end of a sentence."""
    family = type(model).__name__
    if limit.learned:
        return f"{family} has positions for {limit.tokens:,} tokens, and evicted tokens count"
    return (
        f"{family} was made for {limit.tokens:,} positions (max_position_embeddings and its scaling), and evicted "
        "tokens count: it goes on, but was not trained for this"
    )


@contextmanager
def within_positions(model: PreTrainedModel) -> Iterator[None]:
    """Refuse inside the block to read beyond a table of positions; without one nothing is changed.

    The error comes before the table is asked, which on an accelerator would end the process.
    """
    limit = position_limit(model)
    if limit is None or not limit.learned or isinstance(getattr(model, "learned_positions", None), int):
        yield  # a model of ours says so itself
        return

    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        last = _last_position(args, kwargs, masked=limit.masked)
        if last >= limit.tokens:
            raise ModelError(
                f"token {last + 1:,} of a text was to be read, but {beyond(model, limit)}; give a shorter text, a "
                "smaller max_new_tokens, or take a model with rotary positions"
            )

    reader: nn.Module = model.base_model
    # It looks at numbers, which no compiled graph can.
    untraced: Any = torch.compiler.disable(check)  # type: ignore[no-untyped-call]
    handle = reader.register_forward_pre_hook(untraced, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _last_position(args: tuple[Any, ...], kwargs: dict[str, Any], *, masked: bool) -> int:
    """Return the greatest position that a call of a decoder asks for, counted from 0; -1 if it cannot be told."""
    positions = kwargs.get("position_ids")
    if isinstance(positions, Tensor) and positions.numel():
        return int(positions.max())
    fed = kwargs.get("input_ids", args[0] if args else None)
    fed = kwargs.get("inputs_embeds") if fed is None else fed
    if not isinstance(fed, Tensor):
        return -1
    mask, cache = kwargs.get("attention_mask"), given(kwargs)
    seen = 0 if cache is None else int(cache.get_seq_length())
    last = seen + fed.shape[1] - 1
    return int(mask.long().sum(-1).max()) - 1 if masked and isinstance(mask, Tensor) and mask.dim() == 2 else last
