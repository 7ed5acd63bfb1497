"""Cache: switch a model to the managed attention, and back, exactly."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from evomem.cache.attention import IMPLEMENTATION, handover, managed_attention
from evomem.errors import UnsupportedModelError

if TYPE_CHECKING:  # seconds to import; whoever has a model has done so
    from transformers import PreTrainedModel

_lock = threading.RLock()
_switched: dict[int, tuple[Any, int, str | None]] = {}
"""Per configuration object that is switched: itself, how many `attached` blocks are open, and what to put back.

By configuration and not by model, because that is where transformers keeps the switch and models may share one.
"""


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder's self-attention modules in layer order: those that carry a ``layer_idx``."""
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and "attention" in type(module).__name__.lower()
        and not getattr(module, "is_cross_attention", False)
    ]
    return sorted(found, key=lambda module: int(module.layer_idx))


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
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds or getattr(text, "num_kv_shared_layers", None):
        what_else = ", ".join(sorted(kinds)) or "layers that share another layer's keys"
        raise UnsupportedModelError(f"{family} has {what_else}; evomem needs every layer to be {what}")
    if any(getattr(module, "sinks", None) is not None for module in modules):
        raise UnsupportedModelError(
            f"{family} has learned attention sinks in its softmax, which evomem does not manage"
        )
    indices = [int(module.layer_idx) for module in modules]  # type: ignore[arg-type]
    if expected is not None and indices != list(range(expected)):
        raise UnsupportedModelError(
            f"{family} has {expected} layers, of which {len(set(indices))} have managed attention "
            f"(the others are recurrent, linear or shared); evomem needs every layer to be {what}"
        )
    return len(modules)


def is_attached(model: PreTrainedModel) -> bool:
    """Tell whether the model runs the managed attention now."""
    return bool(model.config.get_text_config(decoder=True)._attn_implementation == IMPLEMENTATION)


def _configurations(model: PreTrainedModel) -> list[Any]:
    """Every configuration object that a part of the model looks its attention up in, once."""
    from transformers import PreTrainedModel

    return list({id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values())


@contextmanager
def attached(model: PreTrainedModel) -> Iterator[None]:
    """Run ``model`` with the managed attention inside the block; restore its attention implementation exactly after.

    Blocks nest, also from several threads and with models that share a configuration: the last one to leave restores.
    Raises `UnsupportedModelError`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    from evomem.cache.model_mask import slots_mask

    check_supported(model)
    configurations = _configurations(model)
    with _lock:
        AttentionInterface.register(IMPLEMENTATION, managed_attention)
        # Without a registered mask function transformers would drop the model's mask silently.
        AttentionMaskInterface.register(IMPLEMENTATION, slots_mask)
        for config in configurations:
            _, count, previous = _switched.get(id(config), (config, 0, config._attn_implementation_internal))
            _switched[id(config)] = config, count + 1, previous
            config._attn_implementation_internal = IMPLEMENTATION
    try:
        yield
    finally:
        with _lock:
            for config in configurations:
                _, count, previous = _switched.pop(id(config))
                if count > 1:
                    _switched[id(config)] = config, count - 1, previous
                else:
                    config._attn_implementation_internal = previous
        handover.clear()  # left over where a forward pass was interrupted
