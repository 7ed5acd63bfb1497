"""Model: what models with a memory of their own ask of their configurations, masks and rows, in the same words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from evomem.errors import CacheError, ConfigError, ModelError

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
"""Sizes of a decoder, each at least 1."""


def require_counts(title: str, config: Any, names: Iterable[str]) -> None:
    """Raise `ConfigError` unless these attributes of a configuration are at least 1; ``title`` names it in messages."""
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(f"{title}: {name} is {getattr(config, name)}; give at least 1")


def require_rotary_heads(title: str, config: Any) -> None:
    """Raise `ConfigError` unless ``hidden_size`` gives every attention head an even size."""
    if config.hidden_size % (2 * config.num_attention_heads):
        raise ConfigError(
            f"{title}: hidden_size {config.hidden_size} does not give {config.num_attention_heads} attention heads an "
            "even size each, which rotary positions need"
        )


def require_rows(read: int | None, rows: int) -> None:
    """Raise `CacheError` where a memory has read other rows than the input has; None: it has read nothing."""
    if read not in (None, rows):
        raise CacheError(
            f"the memory has read {read} rows, and the input has {rows}; repeat or select its rows first "
            "(batch_repeat_interleave, batch_select_indices), or reset() it"
        )


def unpadded(mask: Tensor, batch: int, tokens: int, model: str, why: str) -> Tensor:
    """Return which tokens of a mask are no padding, (batch, at least ``tokens``) bool.

    Parameters
    ----------
    mask : (batch or 1, tokens ever read, or the new ones), 0 = padding.
    batch, tokens : rows and new tokens of the input.
    model, why : what the model is, with an article, and why no mask of other axes says anything to it.

    Raises
    ------
    ModelError : the mask has other axes.
    """
    if mask.dim() != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] < tokens:
        raise ModelError(
            f"attention_mask has shape {tuple(mask.shape)}; {model} takes (batch, tokens) for {batch} rows and at "
            f"least {tokens} tokens, 0 = padding: {why}"
        )
    return mask_bits(mask).expand(batch, -1)


def with_past(
    mask: Tensor, batch: int, tokens: int, seen: int, start: Tensor | None, model: str, why: str
) -> tuple[Tensor, bool]:
    """Return which tokens of a mask are no padding, and whether it is about all tokens that were ever read.

    A mask about the new tokens only gets a column before them: whether the row has read a token.

    Parameters
    ----------
    mask : (batch or 1, tokens ever read, or the new ones), 0 = padding.
    batch, tokens : rows and new tokens of the input.
    seen : tokens that the memory has read, padding included.
    start : (batch,) int64, index of every row's first real token, ``seen`` where it has none; None: nothing was read.
    model, why : see `unpadded`.

    Raises
    ------
    ModelError : the mask has other axes, or is about another number of tokens.
    CacheError : it says of tokens that were read that they are padding, and they were not, or the reverse.
    """
    real = unpadded(mask, batch, tokens, model, why)
    if real.shape[1] not in (tokens, seen + tokens):
        raise ModelError(
            f"attention_mask is about {real.shape[1]} tokens; give one about the {tokens} new tokens, or about all "
            f"{seen + tokens} that were ever read"
        )
    if not seen or start is None:
        return real, True
    if real.shape[1] == tokens:
        return torch.cat(((start < seen)[:, None].to(real.device), real), 1), False
    padding = (~real[:, :seen]).long().cumprod(1).sum(1)
    if bool(torch.ne(padding, start.to(real.device)).any()):
        raise CacheError(
            "attention_mask has other padding than the tokens were read with; reset() the memory and read again"
        )
    return real, True


def require_left_padding(real: Tensor, why: str) -> None:
    """Raise `CacheError` where padding stands behind a token.

    real : (batch, tokens) bool, no padding. why : what the memory would do with it.
    """
    if bool(torch.any(real[:, :-1] & ~real[:, 1:])):
        raise CacheError(
            f"attention_mask has padding behind a token; {why}: pad on the left (tokenizer.padding_side = 'left')"
        )


NOT_READ_BY = frozenset(
    {"model_type", "vocab_size", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id"}
    | {"tie_word_embeddings"}
)
"""Fields of a configuration that change nothing of what a model makes of a text's tokens."""


def reading_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields of a configuration's class on which it depends what a model keeps of a text."""
    return {name: getattr(config, name) for name in type(config).__annotations__ if name not in NOT_READ_BY}


def mask_bits(mask: Tensor) -> Tensor:
    """Return a mask of 0 and 1 as bool, of its shape.

    Raises
    ------
    ModelError : it has other numbers: those of several texts in a row, or what is to be added to logits.
    """
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise ModelError(
            "attention_mask has other numbers than 0 (padding) and 1: what is added to logits, and numbers of several "
            "texts in one row, mean nothing to this model; give every text a row"
        )
    return mask.bool()


def require_one_text(name: str, position_ids: Tensor | None, batch: int, tokens: int, real: Tensor | None) -> None:
    """Raise `ModelError` unless positions are whole numbers (batch or 1, tokens) that do not fall within a row.

    transformers takes positions that fall for the beginning of another text in the same row; the memory of a model
    would go on from one text to the other.

    real : (batch, tokens) bool, no padding, whose positions may be anything; None: there is none.
    """
    if position_ids is None:
        return
    rows, *rest = position_ids.shape or (0,)
    if position_ids.is_floating_point() or rows not in (1, batch) or rest != [tokens]:
        raise ModelError(
            f"{name} was given position_ids of shape {tuple(position_ids.shape)} and type {position_ids.dtype}; give "
            f"integers ({batch}, {tokens}), or leave them out"
        )
    falls = position_ids[:, 1:] < position_ids[:, :-1]
    if tokens > 1 and bool((falls if real is None else falls & real[:, 1:] & real[:, :-1]).any()):
        raise ModelError(
            f"{name} was given position_ids that fall within a row, as those of several texts in one row do; its "
            "memory would go on from one text to the next: give every text a row"
        )
