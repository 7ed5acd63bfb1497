"""Memory: switch a model to the managed attention, and back, exactly."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from evomem.errors import UnsupportedModelError
from evomem.memory.kv.attention import IMPLEMENTATION, eager_attention, handover, managed_attention, uncompiled
from evomem.memory.kv.positions import within_positions
from evomem.memory.kv.switch import Usage, implementation_of, is_switched, switched
from evomem.memory.kv.versions import warn_untested

if TYPE_CHECKING:  # seconds to import; whoever has a model has done so
    from transformers import PreTrainedModel

_lock = threading.RLock()

MANAGED_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Kinds of layers, as configurations call them, that differ by their masks only."""
UNMANAGEABLE = {
    "DiffLlamaAttention": "attends twice to every key, each time with half of the values",
    "DogeAttention": "makes its mask from the values of all tokens ever read",
    "JetMoeAttention": "repeats keys for every chosen expert after they were cached",
}
"""Attention classes that look like any other and do not do what a slot needs, with the reason."""


def has_own_memory(model: PreTrainedModel) -> bool:
    """Whether a model has a memory of its own that managers decide about, in a cache that it makes itself.

    It has a method ``decided_cache(policy)``, and tells `evomem.memory.kv.switch.note_pass` of its forward passes.
    """
    return hasattr(model, "decided_cache")


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder's self-attention modules in layer order: those that carry a ``layer_idx``."""
    named = {
        id(module): module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and any("attention" in kind.__name__.lower() for kind in type(module).__mro__)
        and not getattr(module, "is_cross_attention", False)
    }
    # A block around attention, with its norms, may be called attention too and carry the index: the inner one counts.
    inner = [m for m in named.values() if not any(part is not m and id(part) in named for part in m.modules())]
    return sorted(inner, key=lambda module: int(module.layer_idx))  # type: ignore[arg-type]


def check_supported(model: PreTrainedModel) -> int:
    """Return the number of managed layers; raise `UnsupportedModelError` for a family that cannot be managed."""
    warn_untested()
    family = type(model).__name__
    what = "a decoder whose attention goes through transformers' AttentionInterface (Llama, Qwen, Mistral, Gemma, ...)"
    modules = attention_modules(model)
    text = model.config.get_text_config(decoder=True)
    expected = getattr(text, "num_hidden_layers", None)
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{family} is an encoder-decoder; evomem manages the cache of {what}")
    if not modules or not model._can_set_attn_implementation():
        raise UnsupportedModelError(f"{family} has no attention that evomem can manage; it needs {what}")
    kinds = set(getattr(text, "layer_types", None) or ()) - MANAGED_LAYERS
    if kinds or getattr(text, "num_kv_shared_layers", None):
        what_else = ", ".join(sorted(kinds)) or "layers that share another layer's keys"
        raise UnsupportedModelError(f"{family} has {what_else}; evomem needs every layer to be {what}")
    for module in modules:
        if getattr(module, "sinks", None) is not None:
            raise UnsupportedModelError(
                f"{family} has learned attention sinks in its softmax, which evomem does not manage"
            )
        if getattr(module, "is_decoder", None) is False:
            raise UnsupportedModelError(
                f"{family} is an encoder (is_decoder=False) and uses no cache; evomem needs it to be {what}"
            )
        if (why := UNMANAGEABLE.get(type(module).__name__)) is not None:
            raise UnsupportedModelError(f"{family} {why}, which evomem does not manage; it needs {what}")
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{family} has multi-head latent attention: keys are made from a latent after it was cached, so there are "
            f"none that slots could hold; evomem needs {what}"
        )
    indices = [int(module.layer_idx) for module in modules]  # type: ignore[arg-type]
    if len(set(indices)) < len(indices):
        raise UnsupportedModelError(
            f"{family} has several attentions in a layer (cross-attention, or an encoder's); evomem needs {what}"
        )
    if expected is not None and indices != list(range(expected)):
        raise UnsupportedModelError(
            f"{family} has {expected} layers, of which {len(indices)} have managed attention "
            f"(the others are recurrent, linear or shared); evomem needs every layer to be {what}"
        )
    return len(modules)


def _configurations(model: PreTrainedModel) -> list[Any]:
    """Every configuration object that a part of the model looks its attention up in, once."""
    from transformers import PreTrainedModel

    return list({id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values())


def _mend_copied(model: PreTrainedModel, configurations: list[Any]) -> None:
    """Give a model that was copied inside a block, switch and all, an attention of its own again."""
    for config in configurations:
        if config._attn_implementation_internal == IMPLEMENTATION and not is_switched(config):
            config._attn_implementation_internal = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"


def _check_own_functions(model: PreTrainedModel, configurations: list[Any]) -> None:
    """Raise `UnsupportedModelError` if a model attends or masks by a function that somebody registered or patched in.

    The managed attention stands in for transformers' own functions, which all compute the same; what another one
    computes would be lost.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    used: list[tuple[str, Any, tuple[str, ...]]] = []
    for name in {implementation_of(config) or "eager" for config in configurations} - {IMPLEMENTATION}:
        for what, known in (("attention", ALL_ATTENTION_FUNCTIONS), ("mask", ALL_MASK_ATTENTION_FUNCTIONS)):
            if name in known:
                used.append((f"{what} {name!r}", known[name], ()))
        if name == "eager":
            kinds = {type(module): module for module in attention_modules(model)}
            used += [
                ("eager attention", eager_attention(module), tuple(one.__module__ for one in kind.__mro__))
                for kind, module in kinds.items()
            ]
    for what, function, files in used:
        function = inspect.unwrap(getattr(function, "func", function)) if function is not None else None
        file = getattr(function, "__module__", None) or "transformers"
        if file.partition(".")[0] != "transformers" and file not in files:
            raise UnsupportedModelError(
                f"{type(model).__name__} runs {what} by a function that is none of transformers' own "
                f"({file}.{getattr(function, '__qualname__', function)}), which evomem does not manage; set one of its "
                'own first, for example model.set_attn_implementation("sdpa")'
            )


@contextmanager
def attached(model: PreTrainedModel, *, self_check: bool = True) -> Iterator[Usage]:
    """Run ``model`` with the managed attention inside the block; restore its attention implementation exactly after.

    Blocks nest, also from several threads and with models that share a configuration: the last one to leave restores.
    Yields what runs inside. Calls without a cache of slots run the model's own attention, over any cache or none.

    Parameters
    ----------
    self_check : compare a small random copy of a family that evomem's tests do not cover with the stock model, the
        first time in a process (`evomem.memory.kv.self_check`).

    Raises
    ------
    UnsupportedModelError : a family without a managed attention, or one that computes something else under it.
    CacheError : on leaving, when a pass left out layers of a manager that decides about all of them.
    ModelError : inside the block, where a model would read beyond its table of positions
    (`evomem.memory.kv.positions`).
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    from evomem.memory.kv.model_mask import slots_mask
    from evomem.memory.kv.self_check import self_check as check_computes_the_same

    if has_own_memory(model):  # reads and writes its cache by itself: nothing to switch, only to count
        with switched(_configurations(model), IMPLEMENTATION) as usage:
            yield usage
            usage.require_finished()
        return
    check_supported(model)
    configurations = _configurations(model)
    _mend_copied(model, configurations)
    _check_own_functions(model, configurations)
    if self_check:
        check_computes_the_same(model)
    with _lock:
        AttentionInterface.register(IMPLEMENTATION, uncompiled(managed_attention))
        # Without a registered mask function transformers would drop the model's mask silently.
        AttentionMaskInterface.register(IMPLEMENTATION, uncompiled(slots_mask))
    try:
        with switched(configurations, IMPLEMENTATION) as usage, within_positions(model):
            yield usage
            usage.require_finished()
    finally:
        handover.clear()  # left over where a forward pass was interrupted
