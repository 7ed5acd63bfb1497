"""Memory: what is known of a model's rotary embedding, to take queries out of and into rotated frames."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from evomem.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Rotary = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def rotate_half(x: Tensor) -> Tensor:
    """The half-split rotation of Llama, Qwen, Mistral, Gemma, GPT-NeoX and Phi: (a, b) -> (-b, a)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def find_rotaries(model: PreTrainedModel, layers: int) -> tuple[Rotary | None, ...]:
    """Return every layer's rotary embedding as ``(x, position_ids) -> (cos, sin)``; None for a layer without one.

    Most models have one for all layers; some (Gemma 3, OLMo 3) keep frequencies per layer type in one module, which is
    called with the type.

    Raises `UnsupportedModelError` for rotary variants whose pairs are interleaved or that have several positions a
    token, and where it is not plain which frequencies a layer has.
    """
    text = model.config.get_text_config(decoder=True)
    if "mrope_section" in (getattr(text, "rope_parameters", None) or ()):
        raise UnsupportedModelError(
            f"{type(model).__name__} rotates by three positions a token (time, height, width); managers that need the "
            "queries before rotation (expected_attention) cannot be used with it"
        )
    types: list[str] = list(getattr(text, "layer_types", None) or ())
    for module in model.modules():
        typed = {kind for kind in types if hasattr(module, f"{kind}_inv_freq")}
        if hasattr(module, "inv_freq"):
            _check_pattern(model, module)
            return (module,) * layers
        if typed:
            _check_pattern(model, module)
            return tuple(partial(module, layer_type=kind) if kind in typed else None for kind in types[:layers])
        if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False)):
            raise UnsupportedModelError(
                f"{type(model).__name__}: which rotary frequencies a layer has cannot be told; managers that need the "
                "queries before rotation (expected_attention) cannot be used with it"
            )
    return (None,) * layers


def _check_pattern(model: PreTrainedModel, rotary: nn.Module) -> None:
    source = sys.modules[type(rotary).__module__]
    theirs: Any = getattr(source, "rotate_half", None)
    probe = torch.arange(4.0, device="cpu")
    if theirs is None or not torch.equal(theirs(probe), rotate_half(probe)):
        raise UnsupportedModelError(
            f"{type(model).__name__} rotates queries in another pattern than Llama's; managers that need the "
            "queries before rotation (expected_attention) cannot be used with it"
        )


def unrotate(query: Tensor, rotary: Rotary | None, positions: Tensor) -> Tensor:
    """Queries before rotation: query (batch, heads, queries, head_dim), positions (batch, queries)."""
    if rotary is None:
        return query
    cos, sin = (t.to(query.device).float()[:, None] for t in rotary(query, positions))
    width = cos.shape[-1]
    rotated, rest = query[..., :width].float(), query[..., width:].float()
    # cos² + sin² is 1, or the square of the attention scaling that some rotary types fold in.
    plain = (rotated * cos - rotate_half(rotated) * sin) / (cos.square() + sin.square())
    return torch.cat((plain, rest), dim=-1)


def frequencies(rotary: Rotary) -> tuple[Tensor, float]:
    """Return the angle per position of every pair, (pairs,) fp64, and the factor by which cosines and sines are scaled.

    rotary : of `find_rotaries`. Numbers i and i + pairs of a head are rotated together.
    """
    module, name = (rotary.func, f"{rotary.keywords['layer_type']}_") if isinstance(rotary, partial) else (rotary, "")
    speed: Tensor = getattr(module, f"{name}inv_freq")
    return speed.double(), float(getattr(module, f"{name}attention_scaling", 1.0))


def pair_lengths(x: Tensor, width: int) -> Tensor:
    """Return the length of the pair that every number is rotated with: (..., head_dim) fp32, 0 from ``width`` on."""
    rotated, rest = x[..., :width].float(), x[..., width:].float()
    lengths = (rotated.square() + rotate_half(rotated).square()).sqrt() if width else rotated
    return torch.cat((lengths, torch.zeros_like(rest)), dim=-1)


def rotate(query: Tensor, rotary: Rotary | None, positions: Tensor) -> Tensor:
    """Queries rotated: query (batch, heads, queries, head_dim) as `unrotate` returns it, positions (batch, queries)."""
    if rotary is None:
        return query
    cos, sin = (t.to(query.device).float()[:, None] for t in rotary(query, positions))
    width = cos.shape[-1]
    plain, rest = query[..., :width].float(), query[..., width:].float()
    return torch.cat((plain * cos + rotate_half(plain) * sin, rest), dim=-1)


def future_rotation(rotary: Rotary | None, newest: Tensor, size: int, steps: int, like: Tensor) -> Tensor:
    """Mean rotation matrix of the ``steps`` positions after ``newest`` (batch,): (batch, size, size) fp32.

    ``R @ q`` takes an unrotated query to the mean of its rotations at those (absolute) positions, the frame in which
    keys are cached. Identity for a model without rotary embedding. (Expected Attention, arXiv 2510.00636.)
    """
    eye = torch.eye(size, device=like.device, dtype=torch.float32)
    if rotary is None:
        return eye.expand(len(newest), size, size)
    positions = newest[:, None] + 1 + torch.arange(steps, device=like.device)
    cos, sin = (t.to(like.device).float().mean(1) for t in rotary(like, positions))
    width = cos.shape[-1]
    # Column vectors: half @ v = rotate_half(v).
    half = rotate_half(torch.eye(width, device=like.device, dtype=torch.float32)).transpose(0, 1)
    matrix = eye.repeat(len(newest), 1, 1)
    matrix[:, :width, :width] = torch.diag_embed(cos) + sin[:, :, None] * half
    return matrix
