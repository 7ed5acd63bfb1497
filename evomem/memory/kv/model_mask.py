"""Memory: the mask that a model asks transformers for, kept as what it says until somebody needs its numbers.

A model describes its mask as a function of token indices: causal, a sliding window, chunks, images whose tokens see
each other, packed sequences, combined with "and" and "or". Causal masks and windows are worked out from the indices
that the slots hold, without a (queries, tokens) tensor. Every other mask is written out as the stock model would, and
gathered by those indices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from inspect import getclosurevars
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from evomem.memory.kv.masks import Visibility


@dataclass(frozen=True, eq=False)
class MaskRequest:
    """What a model asked of transformers' mask interface in one forward pass."""

    arguments: dict[str, Any]
    _written: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def padding(self) -> Tensor | None:
        """The padding mask that the model was given: (batch, tokens) bool, or None."""
        mask: Tensor | None = self.arguments.get("attention_mask")
        return mask

    def visibility(self, device: torch.device) -> Visibility:
        """Return what the mask says, in the cheapest form that is exact, with tensors on ``device``."""
        if device not in self._written:
            self._written[device] = self._visibility.to(device)
        visibility: Visibility = self._written[device]
        return visibility

    @cached_property
    def _visibility(self) -> Visibility:
        padding = self.padding
        if padding is not None and bool(padding.all()):
            padding = None
        causal, window = recognise(self.arguments.get("mask_function"))
        if causal:
            return Visibility(padding, window)
        written = self.numbers()
        if torch.equal(written, self._causal(padding, written).expand(written.shape)):
            return Visibility(padding)  # as where a model can read images, and has none to read
        return Visibility(padding, None, written)

    def numbers(self) -> Tensor:
        """Return the mask written out: (batch, 1, queries, tokens) bool, also where the stock model would skip it."""
        from transformers.masking_utils import sdpa_mask

        mask = self._make(sdpa_mask, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        return cast(Tensor, mask)

    def stock(self, implementation: str | None) -> Tensor | None:
        """Return the mask as ``implementation`` ("sdpa", "eager", …) wants it; None where it wants none."""
        from transformers import AttentionMaskInterface

        known: dict[str, Any] = AttentionMaskInterface._global_mapping
        make = known.get(implementation or "sdpa")
        return None if make is None else self._make(make)

    def _make(self, make: Callable[..., Tensor | None], **changed: Any) -> Tensor | None:
        key = (make, *changed)
        if key not in self._written:
            self._written[key] = make(**{**self.arguments, **changed})
        mask: Tensor | None = self._written[key]
        return mask

    @staticmethod
    def _causal(padding: Tensor | None, like: Tensor) -> Tensor:
        queries, tokens = like.shape[-2:]
        causal = torch.ones(queries, tokens, dtype=torch.bool, device=like.device).tril(tokens - queries)[None, None]
        return causal if padding is None else causal & padding[:, None, None, :]


class ModelMask(Tensor):
    """A mask (batch, 1, queries, tokens) that is written out only when a model computes with it.

    The managed attention reads `request` instead. Any operation on it gives a plain tensor with the stock model's
    numbers, so a model that cuts or combines its masks stays right.
    """

    request: MaskRequest

    @staticmethod
    def __new__(cls, request: MaskRequest, device: torch.device | None = None) -> ModelMask:
        """Return the mask that ``request`` describes; no memory is taken for it."""
        asked = request.arguments
        mask: ModelMask = Tensor._make_wrapper_subclass(
            cls,
            (asked["batch_size"], 1, asked["q_length"], asked["kv_length"]),
            dtype=torch.bool,
            device=device or torch.device(asked.get("device", "cpu")),
        )
        mask.request = request
        return mask

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ModelMask(shape={tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compute with the numbers; what changes the place at most stays unwritten."""
        kwargs = kwargs or {}
        mask, aten = args[0], torch.ops.aten
        if func in (aten.detach.default, aten.alias.default):
            return ModelMask(mask.request, mask.device)
        if func is aten._to_copy.default and kwargs.get("dtype") in (None, torch.bool):
            return ModelMask(mask.request, kwargs.get("device") or mask.device)
        if func is aten.slice.Tensor and isinstance(mask, ModelMask):
            cut: tuple[Any, ...] = (*args[1:], *(0, None, None, 1)[len(args) - 1 :])  # axis, start, end, step
            if not cut[1] and cut[3] == 1 and (cut[2] is None or cut[2] >= mask.shape[cut[0]]):
                return ModelMask(mask.request, mask.device)
        args, kwargs = tree_map_only(ModelMask, lambda mask: mask.request.numbers().to(mask.device), (args, kwargs))
        return func(*args, **kwargs)


def slots_mask(**arguments: Any) -> ModelMask:
    """Mask function for transformers' AttentionMaskInterface: keeps what the model asks for."""
    # A static cache tells its length as a tensor, which it counts up before the mask is read.
    now = {
        name: value.clone() if isinstance(value, Tensor) and not value.dim() else value
        for name, value in arguments.items()
    }
    return ModelMask(MaskRequest(now))


def recognise(function: Callable[..., Any] | None) -> tuple[bool, int | None]:
    """Tell whether a mask function is causal, alone or with a sliding window, and return the window.

    Functions that are not recognised are not wrong, only slower: their masks are written out.
    """
    from transformers.masking_utils import causal_mask_function

    if function is None or function is causal_mask_function:
        return True, None
    parts = _closed_over(function, "and_masks.<locals>.and_mask").get("mask_functions", ())
    others = [part for part in parts if part is not causal_mask_function]
    if len(parts) == 2 and len(others) == 1:
        window = _closed_over(others[0], "sliding_window_overlay.<locals>.inner_mask").get("sliding_window")
        if isinstance(window, int):
            return True, window
    return False, None


def _closed_over(function: Callable[..., Any], name: str) -> dict[str, Any]:
    """Variables that one of transformers' own mask functions closes over; nothing of any other function."""
    known = getattr(function, "__module__", "") == "transformers.masking_utils" and function.__qualname__ == name
    return dict(getclosurevars(function).nonlocals) if known else {}
