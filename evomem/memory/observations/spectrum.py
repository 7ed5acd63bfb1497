"""Memory: the attention spectrogram of every slot, as a pure streaming function.

Source: "An Evolved Universal Transformer Memory" (arXiv 2410.13166), section 3: the attention that a key receives is
read as a signal over the queries; its short-time Fourier transform is averaged over time with a decaying weight.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from evomem.errors import CacheError
from evomem.modes import outside_inference_mode

HOP = 16
"""Queries between two frames; also the number of queries of the past that the next frame needs (the tail)."""
WINDOW = 2 * HOP
"""Queries in a frame."""
BINS = WINDOW // 2 + 1
"""Frequencies of a frame (one-sided)."""
DECAY = 0.99**HOP
"""What a frame leaves of the average before it (0.99 a query)."""


@lru_cache(maxsize=16)
def _basis(device: torch.device) -> Tensor:
    """Windowed DFT, (32, 32) fp32: rows 0-16 the cosines of the 17 bins, rows 17-31 the sines of bins 1-15.

    Periodic Hann window. Bins 0 and 16 have no sine part, so that the rows are as many as the window's queries.
    """
    with outside_inference_mode(), torch.device("cpu"):  # it outlives whatever context it is first needed in
        time = torch.arange(WINDOW, dtype=torch.float64)
        angle = 2 * math.pi / WINDOW * torch.arange(BINS, dtype=torch.float64)[:, None] * time
        window = 0.5 - 0.5 * torch.cos(2 * math.pi / WINDOW * time)
        rows = torch.cat([torch.cos(angle), torch.sin(angle)[1 : BINS - 1]]) * window
        return rows.float().to(device)


@torch.no_grad()
def advance(state: Tensor, tail: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
    """Carry the spectrogram of every slot over further queries.

    A frame ends whenever another 16 queries are complete; it covers these 16 and the 16 before. Its magnitudes
    ``|S|`` (periodic Hann window of 32, unnormalised) enter the average as ``state <- g state + (1 - g) |S|`` with
    ``g = 0.99 ** 16``. Because the recursion is per frame, many small calls equal one large call.

    Parameters
    ----------
    state
        (batch, kv_heads, slots, 17) fp32; zeros for a new slot.
    tail
        (batch, kv_heads, 16, slots) fp32, the attention of the 16 queries before; zeros for a new slot.
    attention
        (batch, kv_heads, queries, slots) fp32, queries a multiple of 16: attention after the softmax, averaged over
        the query heads of a KV head; zero where the key did not yet exist. (A frame that ends before the key exists
        is then zero by itself: no further mask.)

    Returns
    -------
    The new ``state`` and ``tail``; the arguments are not changed and not referred to.

    Raises
    ------
    CacheError : shapes that do not belong together, or a number of queries that is not a multiple of 16.
    """
    batch, heads, queries, slots = attention.shape
    if queries % HOP:
        raise CacheError(f"spectrogram: {queries} queries are not a multiple of {HOP}; hold the remainder back")
    if state.shape != (batch, heads, slots, BINS) or tail.shape != (batch, heads, HOP, slots):
        raise CacheError(
            f"spectrogram: state {tuple(state.shape)} and tail {tuple(tail.shape)} do not fit attention "
            f"{tuple(attention.shape)} (batch, kv_heads, queries, slots)"
        )
    if not queries:
        return state.clone(), tail.clone()
    rows = batch * heads
    signal = attention.reshape(rows, queries, slots)
    frame = torch.cat([tail.reshape(rows, HOP, slots), signal[:, :HOP]], dim=1)
    basis = _basis(attention.device).expand(rows, WINDOW, WINDOW)
    average = attention.new_zeros(rows, BINS, slots)
    # Frame by frame: a frame's 32 x slots stay in the processor's cache, which measured twice as fast as all frames
    # in one multiplication, and needs 1/16 of the attention's memory instead of four times it.
    for end in range(HOP, queries + 1, HOP):
        if end > HOP:
            frame = signal[:, end - WINDOW : end]
        power = torch.bmm(basis, frame).square_()
        power[:, 1 : BINS - 1] += power[:, BINS:]
        average.mul_(DECAY).add_(power[:, :BINS].sqrt_(), alpha=1 - DECAY)
    fresh = average.view(batch, heads, BINS, slots).transpose(2, 3)
    faded = DECAY ** (queries // HOP)
    return torch.add(fresh, state, alpha=faded).contiguous(), attention[:, :, -HOP:].clone()
