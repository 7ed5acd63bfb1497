"""Memory: a frozen model's KV memory as slots; each slot remembers which token it holds."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from evomem.memory.kv.attach import attached, check_supported
from evomem.memory.view import Decision, LayerView, layer_view, masked_mean

if TYPE_CHECKING:
    from evomem.memory.kv.cache import SlotCache
    from evomem.memory.kv.policy import CachePolicy

__all__ = [
    "CachePolicy",
    "Decision",
    "LayerView",
    "SlotCache",
    "attached",
    "check_supported",
    "layer_view",
    "masked_mean",
]


def __getattr__(name: str) -> Any:
    """Import on first use what needs transformers: a manager that scores another engine's tensors does without."""
    if name in ("CachePolicy", "SlotCache"):
        return getattr(import_module("evomem.memory.kv.cache"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
