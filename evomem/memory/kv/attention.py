"""Memory: the attention function that reads from slots and builds its mask from what the slots hold."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evomem.errors import CacheError, UnsupportedModelError
from evomem.memory.kv.callers import given_cache
from evomem.memory.kv.masks import Visibility, leading_padding
from evomem.memory.kv.model_mask import ModelMask
from evomem.memory.kv.switch import note_pass, previous_implementation
from evomem.memory.kv.versions import argument

if TYPE_CHECKING:
    from evomem.memory.kv.cache import SlotCache
    from evomem.memory.kv.layer import SlotLayer

Function = TypeVar("Function", bound=Callable[..., Any])

IMPLEMENTATION = "evomem_slots"
"""Name under which the managed attention is registered with transformers."""


class _Handover(threading.local):
    """The layer that the last `SlotLayer.update` of this thread belongs to, and the keys and values that it returned.

    A model calls ``cache.update(k, v, layer)`` and then, in the same module, the attention function with what update
    returned. That identity is how the function finds its slots: no hooks, no state on other people's modules.
    """

    key: Tensor | None = None
    value: Tensor | None = None
    layer: SlotLayer | None = None
    attended: weakref.ref[Tensor] | None = None
    """Keys that the managed attention read last."""
    reading: tuple[weakref.ref[SlotCache], int] | None = None
    """Cache, and layer of it, over which the managed attention ran last."""

    def give(self, layer: SlotLayer, key: Tensor, value: Tensor) -> None:
        """Note what the attention that follows must be called with."""
        self.layer, self.key, self.value, self.attended = layer, key, value, None

    def take(self, module: nn.Module, key: Tensor, value: Tensor) -> SlotLayer | None:
        """Return the layer that keys and values belong to, or None where no slot cache is in use.

        Raises `UnsupportedModelError` when the model changed them after `give`, or attends to them a second time: the
        slots would hold something else than what the stock model attends to.
        """
        layer, held_key, held_value = self.layer, self.key, self.value
        self.layer = self.key = self.value = None
        family = type(module).__name__
        if layer is None:
            if self.attended is not None and self.attended() is key:
                raise UnsupportedModelError(
                    f"{family} attends twice to the keys of one layer, which evomem does not manage"
                )
            return None
        for what, stored, given in (("keys", held_key, key), ("values", held_value, value)):
            if stored is not given and not _equal(stored, given):
                # Without this check the new tokens would silently attend to something that the slots do not hold.
                raise UnsupportedModelError(
                    f"{family} changes {what} between cache and attention, which evomem does not manage"
                )
        self.attended = weakref.ref(key)
        self.reading = weakref.ref(layer.cache), layer.index
        return layer

    def clear(self) -> None:
        """Forget what an interrupted forward pass left."""
        self.layer = self.key = self.value = self.attended = self.reading = None


def _equal(stored: Tensor | None, given: Tensor) -> bool:
    """Whether a model handed on a copy or another view of what the cache returned."""
    return (
        stored is not None
        and stored.shape == given.shape
        and stored.dtype == given.dtype
        and stored.device == given.device
    ) and torch.equal(stored, given)


handover = _Handover()

UNTRACED = (
    "the slots of evomem's cache change from call to call, so no graph can hold them: compile without fullgraph=True, "
    "and export or trace a model outside of `with manager.attach(model):`"
)
"""Why functions that touch slots stay out of compiled graphs; torch shows it where it may not leave a graph."""


def uncompiled(function: Function) -> Function:
    """Return ``function`` for transformers to call: always the same object, which `torch.compile` leaves alone.

    Compiled, the attention would be wrong without a word: Dynamo does not see that the handover changes between calls.
    """
    if function not in _uncompiled:
        _uncompiled[function] = torch.compiler.disable(function, reason=UNTRACED)  # type: ignore[no-untyped-call]
    left_alone: Function = _uncompiled[function]
    return left_alone


_uncompiled: dict[Any, Any] = {}


def refuse_tracing() -> None:
    """Raise `CacheError` while a model is exported or traced: the program would hold one moment's slots for ever."""
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if tracing or torch.compiler.is_exporting():
        raise CacheError(f"a cache of slots was given to a model that is exported or traced; {UNTRACED}")


def managed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function for transformers' AttentionInterface.

    Parameters
    ----------
    query : (batch, query_heads, queries, head_dim).
    key, value : (batch, kv_heads, keys, head_dim); the new tokens when a slot cache is in use.
    attention_mask : a `ModelMask`; or (batch, tokens) padding; or (batch, 1 or kv_heads, queries, tokens), bool or
        additive, as users and some models make them; or None when nothing is padded.

    Returns
    -------
    output : (batch, queries, query_heads, head_dim), and None for the weights; without a slot cache what the model's
        own attention returns.
    """
    layer = handover.take(module, key, value)
    if layer is None:
        return _stock_attention(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if layer.index == 0:
        note_pass(module, layer.cache)
        if not layer.cache.is_for(module):
            raise CacheError(
                f"the cache that {type(module).__name__} was given belongs to another model; make one for this model: "
                "manager.new_cache(model), or the one that manager.attach(model) yields"
            )
    if kwargs.get("output_attentions"):
        raise CacheError(
            "output_attentions: the attention over slots returns no weights (heads hold different tokens); leave it "
            "out, or run the model without this cache"
        )
    if dropout:
        raise CacheError(
            f"{type(module).__name__} is in train mode with an attention dropout of {dropout:g}, which the managed "
            "attention does not apply; call model.eval()"
        )
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} uses attention sinks or a position bias in its softmax, "
            "which evomem does not manage"
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    softcap = kwargs.get("softcap")
    visibility = _visibility(module, query, key, attention_mask, layer.seen, kwargs.get("sliding_window"), causal)
    if softcap is not None:  # the softmax that is written out has no answer where nothing is to be seen
        visibility = visibility.seeing_themselves()
    output = layer.attend(query, visibility, scale, softcap, kwargs.get("position_ids"))
    return output.transpose(1, 2).contiguous(), None


def _visibility(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, seen: int, window: int | None, causal: bool
) -> Visibility:
    """Return what the ``seen`` tokens read before and the new ones are to the new queries."""
    count, tokens = query.shape[2], seen + key.shape[2]
    if mask is None:
        if causal or count == 1:
            return Visibility(None, window)
        return Visibility(explicit=torch.ones(1, 1, count, tokens, dtype=torch.bool, device=query.device))
    covers = mask.request.padding if isinstance(mask, ModelMask) else mask
    if mask.dim() not in (2, 4) or (covers is not None and covers.shape[-1] != tokens):
        shape = tuple(mask.shape if covers is None else covers.shape)
        raise CacheError(
            f"attention_mask of shape {shape} covers {shape[-1]} tokens, but with this input {tokens} were read: it "
            "must cover every token ever read, evicted ones too"
        )
    if isinstance(mask, ModelMask):
        # The stock attention reads the mask alone; a keyword for the window is meant for kernels without masks.
        return mask.request.visibility(query.device)
    if mask.dim() == 2:
        return Visibility(mask.bool(), window)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise CacheError(
            f"attention_mask of shape {tuple(mask.shape)} and type {str(mask.dtype).removeprefix('torch.')}: a mask of "
            "four dimensions is bool (True: look at it) or floating (added to the logits)"
        )
    if mask.shape[2] != count:
        raise CacheError(f"attention_mask of shape {tuple(mask.shape)} for {count} new tokens: one row a token")
    if mask.shape[1] not in (1, key.shape[1]):
        raise UnsupportedModelError(
            f"{type(module).__name__} masks every query head by itself (attention_mask of shape {tuple(mask.shape)}, "
            f"{key.shape[1]} KV heads), which evomem does not manage"
        )
    return Visibility(leading_padding(mask), None, mask)


def _stock_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Run the model's own attention under its own mask: for calls over another cache or none, and vision towers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import eager_mask

    _require_not_lost(module)
    implementation = previous_implementation(module)
    if isinstance(mask, ModelMask):
        mask = mask.request.stock(implementation)
        mask = None if mask is None else mask.to(query.device)
    elif mask is not None and mask.dtype == torch.bool and mask.dim() == 4:
        known: dict[str, Any] = AttentionMaskInterface._global_mapping
        if known.get(implementation) is eager_mask:  # numbers that a model cut out of a `ModelMask`
            mask = torch.where(mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    functions: dict[str, Any] = AttentionInterface._global_mapping
    attention = functions.get(implementation) or eager_attention(module) or sdpa_attention_forward
    output: tuple[Tensor, Tensor | None] = attention(module, query, key, value, mask, **kwargs)
    return output


def eager_attention(module: nn.Module) -> Callable[..., Any] | None:
    """Return the eager attention that a module falls back on: a function of the file that its forward is written in."""
    for kind in type(module).__mro__:
        if (forward := vars(kind).get("forward")) is not None:
            attention = getattr(inspect.unwrap(forward), "__globals__", {}).get("eager_attention_forward")
            if attention is not None:
                return cast(Callable[..., Any], attention)
    return None


def _require_not_lost(module: nn.Module) -> None:
    """Raise `CacheError` when a decoder's attention has no cache of slots though the calls around it were given one."""
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int) or getattr(module, "is_cross_attention", False):
        return
    before, handover.reading = handover.reading, None
    if index == 0:
        note_pass(module, None)
        lost = given_cache(module)
    else:  # a pass that began over a cache of slots goes on over it, one attention a layer
        lost = before[0]() if before is not None and before[1] in (index - 1, index) else None
        lost = lost if lost is not None and index < lost.depth and lost.is_for(module) else None
        if lost is not None and before is not None and before[1] == index:
            raise UnsupportedModelError(
                f"{type(module).__name__} attends a second time in layer {index}, to keys that no cache has seen, "
                "which evomem does not manage"
            )
    if lost is not None:
        raise CacheError(
            f"a cache of evomem's was given, but layer {index} ({type(module).__name__}) attends without it: the "
            "model, generate or a wrapper exchanged or dropped it, so nothing would be managed. Known causes: another "
            f"name than that of the installed transformers (pass {argument()} to the model); gradient "
            "checkpointing in train mode (use model.eval()); PEFT's prefix tuning (it brings a cache of its own); long "
            "rope (Phi-3): generate drops a cache when a text crosses original_max_position_embeddings, so read a "
            "context longer than that with the model first, inside `with cache.reading():`, and then generate"
        )


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
) -> Tensor:
    """Attention with grouped query heads and one mask per KV head, without copying keys for the group.

    Parameters
    ----------
    query : (batch, query_heads, queries, head_dim); query head h belongs to KV head h // group.
    key, value : (batch, kv_heads, slots, head_dim).
    mask : bool or additive float, broadcastable to (batch, kv_heads, queries, slots).
    causal : lower-triangular mask for as many queries as slots; excludes ``mask``.

    Returns
    -------
    (batch, query_heads, queries, head_dim).
    """
    batch, heads, queries, size = query.shape
    kv_heads, slots = key.shape[1], key.shape[2]
    group = heads // kv_heads
    if softcap is not None:
        probabilities = attention_probabilities(
            query, key, scale, _triangle(queries, slots, key) if causal else mask, softcap
        )
        return mixed(probabilities, value)
    if group == 1:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=_like(mask, query), is_causal=causal, scale=scale
        )
    if mask is None and causal:
        # The fused kernel wants as many key heads as query heads; expanded views cost nothing.
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    if queries == 1:
        packed = query.reshape(batch, kv_heads, group, size)
        out = F.scaled_dot_product_attention(packed, key, value, attn_mask=_like(mask, query), scale=scale)
        return out.reshape(batch, heads, 1, value.shape[-1])
    folded = query.reshape(batch * kv_heads, group, queries, size)
    wide_key = key.reshape(batch * kv_heads, 1, slots, size).expand(-1, group, -1, -1)
    wide_value = value.reshape(batch * kv_heads, 1, slots, value.shape[-1]).expand(-1, group, -1, -1)
    if mask is not None and mask.shape[:2] != (1, 1):
        mask = mask.expand(batch, kv_heads, -1, -1).reshape(batch * kv_heads, 1, *mask.shape[2:])
    out = F.scaled_dot_product_attention(folded, wide_key, wide_value, attn_mask=_like(mask, query), scale=scale)
    return out.view(batch, heads, queries, value.shape[-1])


def attention_probabilities(
    query: Tensor, key: Tensor, scale: float, mask: Tensor | None, softcap: float | None = None
) -> Tensor:
    """Post-softmax attention in fp32: (batch, kv_heads, group, queries, slots). For blocks of queries only.

    ``mask`` as in `grouped_attention`. The group axis keeps the query heads of a KV head apart.
    """
    return torch.softmax(attention_logits(query, key, scale, mask, softcap), dim=-1)


def attention_logits(
    query: Tensor, key: Tensor, scale: float, mask: Tensor | None, softcap: float | None = None
) -> Tensor:
    """Logits of `attention_probabilities`, in fp32 and of the same shape; -inf where the mask hides a slot.

    The product of queries and keys is taken in fp32 whatever their type and whatever `torch.autocast` says: in fp16 it
    passes 65,504 and becomes infinite, in bf16 its rounding is as large as the differences that a manager decides by.
    """
    batch, heads, queries, size = query.shape
    kv_heads = key.shape[1]
    with full_precision(query):
        grouped = query.reshape(batch, kv_heads, (heads // kv_heads) * queries, size)
        logits = torch.matmul(_widened(grouped), _widened(key).transpose(-1, -2)).float().mul_(scale)
        logits = logits.view(batch, kv_heads, heads // kv_heads, queries, key.shape[2])
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if mask is not None:
            wide = mask[:, :, None]
            logits = logits.masked_fill_(~wide, -torch.inf) if wide.dtype == torch.bool else logits + wide
        return logits


def mixed(probabilities: Tensor, value: Tensor) -> Tensor:
    """Values mixed by `attention_probabilities`: (batch, query_heads, queries, head_dim), in the values' type."""
    batch, kv_heads, group, queries, _ = probabilities.shape
    output = torch.matmul(probabilities.to(value.dtype).flatten(2, 3), value)
    return output.view(batch, kv_heads * group, queries, value.shape[-1])


def full_precision(like: Tensor) -> AbstractContextManager[object]:
    """Return a context in which `torch.autocast` leaves types alone on the tensor's device: what is observed and
    decided must not depend on it.
    """
    device = like.device.type
    return torch.autocast(device, enabled=False) if autocasts(like) else nullcontext()


def autocasts(like: Tensor) -> bool:
    """Whether `torch.autocast` is at work on the tensor's device."""
    device = like.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _widened(x: Tensor) -> Tensor:
    """``x`` in fp32 if its type is smaller."""
    return x.float() if x.element_size() < torch.float32.itemsize else x


def _triangle(queries: int, slots: int, like: Tensor) -> Tensor:
    """Lower-right causal mask (1, 1, queries, slots)."""
    return torch.ones(queries, slots, dtype=torch.bool, device=like.device).tril(slots - queries)[None, None]


def _like(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Bool masks as they are; additive ones in fp32 where SDPA takes them so, or else in the query's type.

    Processors take them so for fp16 and bf16; there a decay is as exact as in fp32. Kernels of accelerators want the
    query's type.
    """
    if mask is None or mask.dtype == torch.bool:
        return mask
    if mask.dtype == torch.float32 and query.device.type == "cpu" and query.element_size() < mask.element_size():
        return mask
    return mask.to(query.dtype)
