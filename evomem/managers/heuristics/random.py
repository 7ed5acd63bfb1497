"""Manager: tokens drawn by lot, the floor that every other manager must beat."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from evomem.bounds import SEED
from evomem.managers.base import ManagerOptions, MemoryManager, register
from evomem.memory.view import LayerView

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


class RandomOptions(ManagerOptions):
    """Options of `Random`."""

    seed: int = Field(default=0, le=SEED, ge=-SEED, description="another seed draws other tokens")


@register("random")
class Random(MemoryManager):
    """Keeps tokens drawn uniformly; the same seed always draws the same.

    The score is a hash of (seed, layer, head, the token's position in its own row), so it does not depend on the batch,
    on the order of evaluation, or on what was evicted before: at a later decision the lot of a token is the same.
    """

    Options = RandomOptions
    options: RandomOptions

    def score(self, view: LayerView) -> Tensor:
        """Return uniform numbers in [0, 1): (batch, kv_heads, slots) fp32."""
        heads = torch.arange(view.slots.shape[1], device=view.slots.device)[:, None]
        seed = torch.full_like(heads, _signed(self.options.seed))
        state = _absorb(_absorb(_mix(seed), torch.full_like(heads, view.layer)), heads)
        return uniform(_absorb(state, view.position))


def uniform(state: Tensor) -> Tensor:
    """Turn hashed int64 into uniform fp32 in [0, 1), from the best-mixed 24 bits (all that fp32 holds)."""
    return ((state >> 40) & 0xFFFFFF).float() * 2.0**-24


def _absorb(state: Tensor, value: Tensor) -> Tensor:
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
