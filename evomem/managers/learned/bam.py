"""Manager: the small networks that score slots for NAMM: BAM (backward attention memory), MLP and linear.

Source: "An Evolved Universal Transformer Memory" (arXiv 2410.13166), section 3.

Weights are stored input x output, and registered in the order of the published vector, so that the generic
`evomem.managers.vector.to_vector` is that layout. All networks start at zero: every score 0, everything is kept.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evomem.managers.vector import zeros


class LinearScorer(nn.Module):
    """``s = w . x + b``. Vector: w (features), b (1)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.score_weight = zeros(features)
        self.score_bias = zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores: x (batch, kv_heads, slots, features) -> (batch, kv_heads, slots)."""
        return x @ self.score_weight.float() + self.score_bias.float()


class MLPScorer(nn.Module):
    """Every slot by itself: ``h <- tanh(h W + b)`` through the hidden layers, then ``s = w . h + b``.

    Vector: W_1 (features x hidden_1), b_1, W_2, b_2, ..., w (last hidden), b (1).
    """

    def __init__(self, features: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.hidden = len(hidden)
        sizes = (features, *hidden)
        for layer, (inputs, outputs) in enumerate(pairwise(sizes), start=1):
            self.register_parameter(f"weight_{layer}", zeros(inputs, outputs))
            self.register_parameter(f"bias_{layer}", zeros(outputs))
        self.score_weight = zeros(sizes[-1])
        self.score_bias = zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores: x (batch, kv_heads, slots, features) -> (batch, kv_heads, slots)."""
        for layer in range(1, self.hidden + 1):
            x = torch.tanh(x @ getattr(self, f"weight_{layer}").float() + getattr(self, f"bias_{layer}").float())
        return x @ self.score_weight.float() + self.score_bias.float()


class BAMScorer(nn.Module):
    """Slots compare themselves with the later ones: self-attention in which slot i attends the slots j >= i.

    ``[q k v] = x W_qkv + b_qkv``; ``[r m] = softmax(q k' / sqrt(width), j >= i) v W_o + b_o``;
    ``x' = x (1 + m) + r``; ``s = w . x' + b``. One head.

    Vector: W_qkv (features x 3 width, q|k|v), b_qkv, W_o (width x 2 features, r|m), b_o, w (features), b (1);
    4,172 numbers for 25 features and width 32.
    """

    def __init__(self, features: int, width: int = 32) -> None:
        super().__init__()
        self.qkv_weight = zeros(features, 3 * width)
        self.qkv_bias = zeros(3 * width)
        self.out_weight = zeros(width, 2 * features)
        self.out_bias = zeros(2 * features)
        self.score_weight = zeros(features)
        self.score_bias = zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores: x (batch, kv_heads, slots, features) -> (batch, kv_heads, slots).

        Empty slots come first, where no slot that holds a token attends: they need no mask of their own.
        """
        # Seen from the newest slot backwards, "attends the later ones" is ordinary causal attention. A bias becomes the
        # weight of a constant input: in a population, adding it would cost as much as the product.
        x = F.pad(x.flip(-2), (0, 1), value=1.0)
        qkv = x @ torch.cat([self.qkv_weight, self.qkv_bias[None]]).float()
        attended = causal_attention(*qkv.chunk(3, dim=-1))
        # s = w.(x (1 + m) + r) + b with r = attended W_r + b_r and m = attended W_m + b_m, with w multiplied into the
        # weights first: s = (attended W + c).[x 1] with W = [W_m w | W_r w'], c = [(1 + b_m) w | b_r w' + b].
        r_weight, m_weight = self.out_weight.float().chunk(2, dim=-1)
        r_bias, m_bias = self.out_bias.float().chunk(2)
        w = self.score_weight.float()
        weight = torch.cat([m_weight * w, (r_weight @ w)[:, None]], dim=-1)
        bias = torch.cat([(1 + m_bias) * w, (r_bias @ w)[None] + self.score_bias.float()])
        return ((attended @ weight + bias) * x).sum(-1).flip(-1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention, scale 1/sqrt(width); q, k, v and result (batch, heads, slots, width).

    Equal to ``F.scaled_dot_product_attention(q, k, v, is_causal=True)``. `torch.func.vmap` has no batching rule for
    the fused processor kernel and calls it once a candidate; here it becomes one call, forward and backward.
    """
    result: Tensor = _CausalAttention.apply(q, k, v)  # type: ignore[no-untyped-call]
    return result


def _fold(info: Any, in_dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Move the axis that vmap added into the batch: (batch, ...) each -> (population * batch, ...)."""
    folded = []
    for tensor, dim in zip(tensors, in_dims, strict=True):
        moved = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        folded.append(moved.flatten(0, 1))
    return folded


def _unfold(info: Any, tensor: Tensor) -> Tensor:
    """Undo `_fold`: (population * batch, ...) -> (population, batch, ...)."""
    return tensor.reshape(info.batch_size, tensor.shape[0] // info.batch_size, *tensor.shape[1:])


def _gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Gradients by q, k and v, from q, k, v and the gradient of the result."""
    gradients: tuple[Tensor, ...] = _CausalAttentionGradient.apply(*tensors)  # type: ignore[no-untyped-call]
    return gradients


class _CausalAttention(torch.autograd.Function):
    """`causal_attention` with the rule that vmap lacks."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return _gradients(*ctx.saved_tensors, gradient)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[Tensor, int]:
        return _unfold(info, causal_attention(*_fold(info, in_dims, tensors))), 0


class _CausalAttentionGradient(torch.autograd.Function):
    """Gradients of `_CausalAttention` by q, k and v; an operation of its own, so that vmap of a gradient folds too."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            q, k, v = (tensor.detach().requires_grad_() for tensor in (q, k, v))
            result = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.autograd.grad(result, (q, k, v), gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        raise NotImplementedError("second derivatives of the BAM's attention are not defined")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[Any, Any]:
        results = _gradients(*_fold(info, in_dims, tensors))
        return tuple(_unfold(info, result) for result in results), (0, 0, 0)
