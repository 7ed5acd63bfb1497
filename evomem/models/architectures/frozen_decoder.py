"""Model: a frozen copy of a decoder of transformers whose layers are given other inputs, and are watched.

The copy shares the weights of the model that it is made of, and needs no gradient for them; hooks and the attention
implementation are the copy's own, so the model itself is left as it was.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from evomem.errors import UnsupportedModelError
from evomem.memory.kv.attach import attention_modules, check_supported
from evomem.memory.kv.positions import position_limit
from evomem.memory.kv.switch import implementation_of

HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)  # fmt: skip
"""Where a module keeps what is called around its forward pass."""
ABSOLUTE = frozenset({"dynamic", "longrope"})
"""Kinds of rotary scaling whose frequencies depend on how long a text is: distances alone do not matter there."""


class LayerPass(Protocol):
    """What happens to every layer in one pass over the decoder; tensors are (batch, tokens, hidden_size)."""

    def enter(self, index: int, hidden: Tensor) -> Tensor:
        """Return what the layer is given in place of ``hidden``."""

    def mask(self, index: int) -> Tensor:
        """Return what is added to the layer's logits: (batch or 1, 1, queries, keys)."""

    def keys(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values that are attended to, given those of the pass: (batch, kv_heads, tokens, size)."""

    def attended(self, index: int, output: Tensor) -> Tensor:
        """Return what the layer adds to its residual path in place of the attention's ``output``."""

    def leave(self, index: int, output: Tensor) -> None:
        """See what the layer has made."""


class FrozenDecoder:
    """A frozen copy of a decoder; see the module.

    Parameters
    ----------
    model : a causal language model of transformers.

    Raises
    ------
    UnsupportedModelError : positions are not rotary, or frequencies depend on the text's length; layers are not one
        module each with one attention inside; it has hooks; weights are quantised, or spread over devices; the
        model has more than text.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        require_rotary_text(model)
        if any(getattr(module, name) for module in model.modules() for name in HOOKS):
            raise UnsupportedModelError(
                f"{type(model).__name__} has forward hooks, which a copy of it would lose; remove them, or put "
                "feedback memory around the model before they are registered"
            )
        self._begin(model)

    def _begin(self, model: PreTrainedModel) -> None:
        implementation = implementation_of(model.config)
        self.model: Any = _copy(model)
        # The others take no mask that is not causal.
        self.model.config._attn_implementation_internal = "eager" if implementation == "eager" else "sdpa"
        self.depth = len(attention_modules(self.model))
        self._now = threading.local()
        self._watch()

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenDecoder:
        other = FrozenDecoder.__new__(FrozenDecoder)
        other._begin(self.model)  # the weights are shared: nobody changes them
        return other

    @property
    def head(self) -> nn.Module:
        """The layer that gives logits."""
        head: nn.Module = self.model.get_output_embeddings()
        return head

    @property
    def dtype(self) -> torch.dtype:
        """Type of the token embeddings."""
        dtype: torch.dtype = self.model.get_input_embeddings().weight.dtype
        return dtype

    def embedded(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings of tokens: (batch, tokens, hidden_size)."""
        embedded: Tensor = self.model.get_input_embeddings()(input_ids)
        return embedded

    def run(self, embedded: Tensor, positions: Tensor, layer_pass: LayerPass) -> Tensor:
        """Return what the decoder makes of embeddings (batch, tokens, hidden_size), its last norm included.

        positions : (batch or 1, tokens) int64.
        """
        with self._running(layer_pass):
            made = self.model.base_model(
                inputs_embeds=embedded,
                attention_mask=layer_pass.mask(0),
                position_ids=positions,
                past_key_values=_KeysOfPass(layer_pass),
                use_cache=True,
            )
        hidden: Tensor = made.last_hidden_state
        return hidden

    def logits(self, input_ids: Tensor) -> Tensor:
        """Return what the decoder answers by itself: (batch, tokens, vocab_size)."""
        logits: Tensor = self.model(input_ids, use_cache=False).logits
        return logits

    @contextmanager
    def _running(self, layer_pass: LayerPass) -> Iterator[None]:
        self._now.layer_pass = layer_pass
        try:
            yield
        finally:
            self._now.layer_pass = None

    def _watch(self) -> None:
        """Let every layer and its attention ask the pass that runs."""
        for index, attention in enumerate(attention_modules(self.model)):
            layer = _layer_of(self.model, attention)
            layer.register_forward_pre_hook(partial(self._enter, index), with_kwargs=True)
            attention.register_forward_hook(partial(self._attended, index))
            layer.register_forward_hook(partial(self._leave, index))

    def _enter(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        now: LayerPass | None = getattr(self._now, "layer_pass", None)
        if now is None:
            return None
        if args:
            args = (now.enter(index, args[0]), *args[1:])
        else:
            kwargs = {**kwargs, "hidden_states": now.enter(index, kwargs["hidden_states"])}
        return args, {**kwargs, "attention_mask": now.mask(index)}

    def _attended(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        now: LayerPass | None = getattr(self._now, "layer_pass", None)
        if now is None:
            return None
        if isinstance(output, tuple):
            return (now.attended(index, output[0]), *output[1:])
        return now.attended(index, output)

    def _leave(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        now: LayerPass | None = getattr(self._now, "layer_pass", None)
        if now is not None:
            now.leave(index, output[0] if isinstance(output, tuple) else output)


class _KeysOfPass(Cache):
    """What the layers of a decoder take for their cache: the keys and values that a pass has."""

    def __init__(self, layer_pass: LayerPass) -> None:
        super().__init__(layers=[])
        self._pass = layer_pass

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return what a layer attends to."""
        return self._pass.keys(layer_idx, key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions are given."""
        return 0


def _copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy with the same weights, without hooks."""
    # A parameter of its own with the same numbers: gradients stop here, and the model's own go on as they are.
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    shared |= {id(buffer): buffer for buffer in model.buffers()}
    shared |= {id(getattr(module, name)): OrderedDict() for module in model.modules() for name in HOOKS}
    made: PreTrainedModel = copy.deepcopy(model, shared)
    made.train(False)
    for module in made.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False  # type: ignore[assignment]  # layers would be read twice
    return made


def _layer_of(model: nn.Module, attention: nn.Module) -> nn.Module:
    """Return the layer that an attention is part of."""
    name = next(name for name, module in model.named_modules() if module is attention)
    while name:
        name = name.rpartition(".")[0]
        layer = model.get_submodule(name)
        if isinstance(layer, GradientCheckpointingLayer):
            return layer
    raise UnsupportedModelError(
        f"{type(model).__name__} has attention that is part of no layer of transformers' (GradientCheckpointingLayer); "
        "feedback memory goes around decoders like Llama, Qwen3, GPT-NeoX"
    )


def require_rotary_text(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` for a decoder that reads more than text, or by more than distances."""
    check_supported(model)
    family, text = type(model).__name__, model.config.get_text_config(decoder=True)
    what = "feedback memory goes around decoders of text with rotary positions, like Llama, Qwen3, GPT-NeoX"
    limit = position_limit(model)
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if text is not model.config or head is None or model.base_model is model:
        raise UnsupportedModelError(f"{family} is no causal language model of text alone; {what}")
    if (limit is not None and limit.learned) or not any(name.endswith("inv_freq") for name, _ in model.named_buffers()):
        raise UnsupportedModelError(f"{family} has no rotary positions, and its blocks go on without end; {what}")
    rope = getattr(text, "rope_parameters", None) or {}
    if {rope.get("rope_type")} & ABSOLUTE:
        raise UnsupportedModelError(
            f"{family} has rotary frequencies that depend on the text's length ({rope['rope_type']}), and keys of "
            f"earlier blocks were rotated by others; {what}"
        )
    if any(not p.is_floating_point() for p in model.parameters()):
        raise UnsupportedModelError(f"{family} has quantised weights, which cannot be copied by reference; {what}")
    if len({p.device for p in model.parameters()}) > 1 or any(hasattr(m, "_hf_hook") for m in model.modules()):
        raise UnsupportedModelError(f"{family} is spread over devices, or moved by accelerate; load it on one device")


def require_field(model: PreTrainedModel, tokens: int) -> None:
    """Raise `UnsupportedModelError` unless every layer of a decoder sees ``tokens`` back, its own included."""
    text = model.config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ())
    window = getattr(text, "sliding_window", None)
    if "chunked_attention" in kinds:
        raise UnsupportedModelError(
            f"{type(model).__name__} attends in chunks of its own (chunked_attention), which blocks do not respect"
        )
    slides = "sliding_attention" in kinds or (not kinds and getattr(text, "use_sliding_window", True))
    if slides and isinstance(window, int) and window < tokens:
        raise UnsupportedModelError(
            f"{type(model).__name__} has layers that see {window} tokens, and block and segments make {tokens} "
            "((segments + 1) · block); give smaller blocks, or fewer segments"
        )
