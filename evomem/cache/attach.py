"""Cache: switch a model to the managed attention, and back, exactly."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import flash_attention_mask

from evomem.cache.attention import IMPLEMENTATION, managed_attention
from evomem.errors import UnsupportedModelError

_lock = threading.RLock()
_attached: WeakKeyDictionary[PreTrainedModel, tuple[int, list[tuple[Any, str | None]]]] = WeakKeyDictionary()
"""Per attached model: how many `attached` blocks are open, and what to put back into each configuration."""


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder's self-attention modules in layer order: those that carry a ``layer_idx``."""
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and "attention" in type(module).__name__.lower()
        and not getattr(module, "is_cross_attention", False)
    ]
    return sorted(found, key=lambda module: int(module.layer_idx))  # type: ignore[arg-type]


def check_supported(model: PreTrainedModel) -> int:
    """Return the number of managed layers; raise `UnsupportedModelError` for a family that cannot be managed."""
    family = type(model).__name__
    what = "a decoder whose attention goes through transformers' AttentionInterface (Llama, Qwen, Mistral, Gemma, ...)"
    modules = attention_modules(model)
    text = model.config.get_text_config(decoder=True)
    expected = getattr(text, "num_hidden_layers", None)
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{family} is an encoder-decoder; evomem manages the cache of {what}")
    if not modules or not model._can_set_attn_implementation():
        raise UnsupportedModelError(f"{family} has no attention that evomem can manage; it needs {what}")
    indices = [int(module.layer_idx) for module in modules]  # type: ignore[arg-type]
    if expected is not None and indices != list(range(expected)):
        raise UnsupportedModelError(
            f"{family} has {expected} layers, of which {len(set(indices))} have managed attention "
            f"(the others are recurrent, linear or shared); evomem needs every layer to be {what}"
        )
    return len(modules)


def is_attached(model: PreTrainedModel) -> bool:
    """Tell whether the model runs the managed attention now."""
    return model in _attached


@contextmanager
def attached(model: PreTrainedModel) -> Iterator[None]:
    """Run ``model`` with the managed attention inside the block; restore its attention implementation exactly after.

    Blocks nest, also from several threads: the last one to leave restores. Raises `UnsupportedModelError`.
    """
    check_supported(model)
    with _lock:
        count, previous = _attached.get(model, (0, []))
        if count == 0:
            AttentionInterface.register(IMPLEMENTATION, managed_attention)
            # Without a registered mask the padding would be dropped silently; this one hands on the 2-D mask.
            AttentionMaskInterface.register(IMPLEMENTATION, flash_attention_mask)
            configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
            previous = [(config, config._attn_implementation) for config in configs.values()]
            for config in configs.values():
                config._attn_implementation_internal = IMPLEMENTATION
        _attached[model] = (count + 1, previous)
    try:
        yield
    finally:
        with _lock:
            count, previous = _attached[model]
            if count > 1:
                _attached[model] = (count - 1, previous)
            else:
                for config, implementation in previous:
                    config._attn_implementation_internal = implementation
                del _attached[model]
