"""Model: what a Memory Mosaic computes, as pure functions: leaky averages, bandwidths, and reading stored pairs.

Sources: Zhang et al. 2024, "Memory Mosaics" (arXiv 2405.06394), called v1 here; Zhang and Bottou 2025, "Memory Mosaics
at scale" (arXiv 2507.03285), called v2. Everything is decided in fp32, or in the input's type where that is finer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
"""Tokens whose leaky averages are worked out at once: a block costs tokens squared, and the state is carried over."""


def precise(x: Tensor) -> Tensor:
    """Return ``x`` in fp32, or as it is if its type is finer."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit_norm(x: Tensor) -> Tensor:
    """Return ``x`` (..., dim) with length 1 along its last axis; a vector of zeros stays one."""
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.clamp(min=1e-10)


def leaky_average(inputs: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``average_t = inputs_t + exp(log_decay_t) * average_{t-1}`` and the last of them.

    Equation 7 of v1 (a decay per head), equation 5 of v2 (a decay per head and token).

    Parameters
    ----------
    inputs : (batch, heads, tokens, dim).
    log_decay : (batch or 1, heads, tokens or 1), at most 0.
    state : (batch, heads, dim), the average before the first token; zeros if there is none.

    Returns
    -------
    averages : (batch, heads, tokens, dim).
    state : (batch, heads, dim).
    """
    tokens = inputs.shape[2]
    log_decay = log_decay.expand(*log_decay.shape[:2], tokens)
    averages = []
    for begin in range(0, tokens, BLOCK):
        part = inputs[:, :, begin : begin + BLOCK]
        total = log_decay[:, :, begin : begin + BLOCK].cumsum(-1)
        # Differences are at most 0 below the diagonal; above it they would overflow before they are masked.
        causal = torch.ones(part.shape[2], part.shape[2], dtype=torch.bool, device=inputs.device).tril()
        weights = (total[..., :, None] - total[..., None, :]).masked_fill(~causal, -torch.inf).exp()
        averages.append(weights @ part + total.exp()[..., None] * state[:, :, None])
        state = averages[-1][:, :, -1]
    return torch.cat(averages, 2), state


def bandwidth(pairs: Tensor, slope: Tensor, offset: Tensor, power: Tensor) -> Tensor:
    """Return ``slope * pairs ** power + offset``, the inverse temperature of reading among so many pairs.

    Equation 3 of v2; v1 has a constant one (power 0). pairs : (batch, heads or 1, tokens); the others (heads,).
    """
    slope, offset, power = (part[None, :, None] for part in (slope, offset, power))
    return slope * pairs.clamp(min=1).to(slope.dtype) ** power + offset


def readable(slots: Tensor, queries: Tensor, nearest: int, farthest: int | None) -> Tensor:
    """Return which pairs every query may read: (batch, heads or 1, queries, pairs) bool.

    Parameters
    ----------
    slots : (batch, heads or 1, pairs) int64, index of the token that a pair's key was made of; -1: no pair.
    queries : (queries,) int64, indices of the tokens that read.
    nearest, farthest : a query reads pairs of tokens that are at least and at most so many tokens back; None: all.
        At least 1, for a pair's value already knows the token after its key's.
    """
    back = queries[:, None] - slots[..., None, :]
    allowed = (slots[..., None, :] >= 0) & (back >= nearest)
    return allowed if farthest is None else allowed & (back <= farthest)


def read_weights(
    queries: Tensor, keys: Tensor, allowed: Tensor, inverse_temperature: Tensor, decays: Tensor | None = None
) -> Tensor:
    """Return the softmax over pairs: (batch, heads, queries, pairs); a query that may read nothing gives zeros.

    Parameters
    ----------
    queries : (batch, heads, queries, dim).
    keys : (batch or 1, heads, pairs, dim).
    allowed : (batch, heads or 1, queries, pairs) bool.
    inverse_temperature : (batch or 1, heads, queries or 1), β.
    decays : (batch, heads, pairs) <= 0, added to the pairs' logits; None: nothing fades.
    """
    scores = (precise(queries) @ precise(keys).transpose(-1, -2)) * inverse_temperature[..., None]
    if decays is not None:
        scores = scores + decays[:, :, None]
    # Not -inf: a row of nothing else would be NaN, and its gradient too.
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) * allowed.any(-1, keepdim=True)


def read_pairs(
    queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor, inverse_temperature: Tensor, dropout: float = 0.0
) -> Tensor:
    """Return what queries read: (batch, heads, queries, dim) in the values' type; zeros where there is nothing to read.

    The weights are those of `read_weights`, times the values (batch or 1, heads, pairs, dim), in one fused call.

    dropout : share of the pairs that each query overlooks.
    """
    something = allowed.any(-1, keepdim=True)
    read = F.scaled_dot_product_attention(
        precise(queries) * inverse_temperature[..., None],
        precise(keys),
        precise(values),
        attn_mask=allowed | ~something,  # a row of nothing would be NaN
        dropout_p=dropout,
        scale=1.0,
    )
    return (read * something).to(values.dtype)
