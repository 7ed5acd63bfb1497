"""Manager: random numbers that are functions of integers, not of the order in which they are drawn.

Source: the finaliser of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def seeded(seed: int, like: Tensor) -> Tensor:
    """Return the state that a seed begins with, int64 in the shape of ``like``."""
    return _mix(torch.full_like(like, _signed(seed)))


def uniform(state: Tensor) -> Tensor:
    """Turn hashed int64 into uniform fp32 in [0, 1), from the best-mixed 24 bits (all that fp32 holds)."""
    return ((state >> 40) & 0xFFFFFF).float() * 2.0**-24


def absorb(state: Tensor, value: Tensor) -> Tensor:
    """Hash one more integer into the state (both int64, broadcast)."""
    return _mix(state ^ _mix(value * _signed(_GOLDEN) + _signed(_GOLDEN)))


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) on int64, whose products wrap around modulo 2^64."""
    x = (x ^ _shift(x, 30)) * _signed(_FIRST)
    x = (x ^ _shift(x, 27)) * _signed(_SECOND)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift right: torch's is arithmetic and would fill with the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the same 64 low bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def mixed_seed(parts: tuple[int, ...]) -> int:
    """Return one 63-bit seed for several integers; near ones give unrelated streams."""
    low = (1 << 64) - 1
    state = _GOLDEN
    for part in parts:
        state = (state ^ (part & low)) * _FIRST & low
        state = (state ^ (state >> 27)) * _SECOND & low
        state ^= state >> 31
    return state >> 1
