"""Cache: a frozen model's KV memory as slots; each slot remembers which token it holds."""

from evomem.cache.attach import attached, check_supported
from evomem.cache.cache import CachePolicy, SlotCache
from evomem.cache.view import Decision, LayerView, masked_mean

__all__ = ["CachePolicy", "Decision", "LayerView", "SlotCache", "attached", "check_supported", "masked_mean"]
