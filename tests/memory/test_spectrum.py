"""The attention spectrogram against torch.stft."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomem.errors import CacheError
from evomem.memory.observations.spectrum import BINS, HOP, advance


def by_definition(state: Tensor, tail: Tensor, attention: Tensor) -> Tensor:
    """The closed sum of the paper, with torch.stft, in double precision."""
    batch, heads, queries, slots = attention.shape
    signal = torch.cat([tail, attention], 2).double().transpose(2, 3).reshape(-1, queries + HOP)
    window = torch.hann_window(32, periodic=True, dtype=torch.float64)
    frames = torch.stft(signal, 32, hop_length=16, window=window, center=False, return_complex=True).abs()
    gamma = 0.99**16
    weights = torch.tensor([(1 - gamma) * gamma ** (frames.shape[-1] - 1 - t) for t in range(frames.shape[-1])])
    summed = (frames * weights.double()).sum(-1).view(batch, heads, slots, BINS)
    return summed + 0.99**queries * state.double()


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    blocks=st.integers(1, 5),
    slots=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_equals_stft(batch: int, heads: int, blocks: int, slots: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    attention = torch.rand(batch, heads, blocks * HOP, slots, generator=draw)
    tail = torch.rand(batch, heads, HOP, slots, generator=draw)
    state = torch.rand(batch, heads, slots, BINS, generator=draw)
    before = state.clone(), tail.clone(), attention.clone()
    result, new_tail = advance(state, tail, attention)
    torch.testing.assert_close(result.double(), by_definition(state, tail, attention), atol=1e-5, rtol=1e-5)
    assert torch.equal(new_tail, attention[:, :, -HOP:])
    assert all(torch.equal(a, b) for a, b in zip(before, (state, tail, attention), strict=True))


def test_many_small_calls_equal_one_large_call() -> None:
    attention = torch.rand(2, 2, 6 * HOP, 9)
    state, tail = torch.rand(2, 2, 9, BINS), torch.rand(2, 2, HOP, 9)
    whole = advance(state, tail, attention)
    for block in attention.split([HOP, 2 * HOP, 3 * HOP], dim=2):
        state, tail = advance(state, tail, block)
    torch.testing.assert_close(state, whole[0])
    assert torch.equal(tail, whole[1])


def test_frames_before_a_key_exists_are_zero() -> None:
    """The mask m of the paper: a key at offset o has no frame t with 16 (t + 1) <= o."""
    offset, queries = 40, 5 * HOP
    attention = torch.rand(1, 1, queries, 1)
    attention[:, :, :offset] = 0
    zeros = torch.zeros(1, 1, 1, BINS), torch.zeros(1, 1, HOP, 1)
    assert not advance(*zeros, attention[:, :, :32])[0].any()
    whole = advance(*zeros, attention)[0]
    late = advance(*zeros, attention[:, :, 32:])[0]
    torch.testing.assert_close(whole, late)


def test_refuses_what_does_not_fit() -> None:
    state, tail = torch.zeros(1, 1, 4, BINS), torch.zeros(1, 1, HOP, 4)
    with pytest.raises(CacheError, match="multiple of 16"):
        advance(state, tail, torch.zeros(1, 1, 20, 4))
    with pytest.raises(CacheError, match="do not fit"):
        advance(state, tail, torch.zeros(1, 1, 16, 5))
    assert torch.equal(advance(state, tail, torch.zeros(1, 1, 0, 4))[0], state)
