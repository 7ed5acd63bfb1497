"""Cache: what a manager sees of one layer's slots, and what it may answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerView:
    """One layer's slots at a decision.

    Attributes
    ----------
    keys, values : (batch, kv_heads, slots, head_dim); keys are rotated to the positions at which they were read.
    slots : (batch, kv_heads, slots) int64, the index of the token that each slot holds, ascending, -1 = empty.
        Heads with fewer slots are right-aligned: the empty slots come first.
    start : (batch,) int64, index of the row's first real token (its left padding).
    seen : number of tokens read so far, padding included: the newest token has index ``seen - 1``.
    fresh : number of tokens that arrived since the last decision.
    layer, layers : which layer this is, of how many.
    recorded : observations that the cache recorded because the manager asked for them, by name (see
        `evomem.cache.observe`); slot-aligned ones have the slots on axis 2.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    start: Tensor
    seen: int
    fresh: int
    layer: int
    layers: int
    recorded: Mapping[str, Tensor] = field(default_factory=dict)
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """Values computed from this view once and shared by all candidates that look at it."""

    @property
    def valid(self) -> Tensor:
        """(batch, kv_heads, slots) bool: which slots hold a token."""
        return self.slots >= 0

    @property
    def age(self) -> Tensor:
        """(batch, kv_heads, slots) int64: newest token's index minus the slot's; empty slots give ``seen``."""
        return self.seen - 1 - self.slots

    @property
    def position(self) -> Tensor:
        """(batch, kv_heads, slots) int64: index of the slot's token within its own row, padding not counted."""
        return self.slots - self.start[:, None, None]

    @property
    def depth(self) -> float:
        """Relative depth of the layer in [-1/2, 1/2]; 0 for a model of one layer."""
        return self.layer / (self.layers - 1) - 0.5 if self.layers > 1 else 0.0

    def once(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """Return ``compute()``, computed at the first call for ``name`` on this view and remembered."""
        if name not in self.memo:
            self.memo[name] = compute()
        value: Tensor = self.memo[name]
        return value


@dataclass(frozen=True)
class Decision:
    """What a manager decides about one layer.

    Attributes
    ----------
    keep : (batch, kv_heads, slots) bool; slots that are False leave memory. Empty slots are always False.
    decay : (batch, kv_heads, slots) float or None: log-decay to be added to the slots' attention logits (<= 0).
    """

    keep: Tensor
    decay: Tensor | None = None


def masked_mean(x: Tensor, valid: Tensor) -> Tensor:
    """Mean over the slots that hold a token: x, valid (batch, kv_heads, slots) -> (batch, kv_heads, 1)."""
    count = valid.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(valid, x, 0.0).sum(-1, keepdim=True) / count
