"""Memory: how the weights of a neural memory learn while a text is read; pure functions.

A neural memory M is a small network, and what it remembers lies in its weights. A token of key k and value v surprises
it by the gradient of ℓ(M; k, v) = ½‖M(k) - v‖²; with gates α, η, θ of the token,

    S_t = η_t S_{t-1} - θ_t ∇ℓ(M'; k_t, v_t)        past and momentary surprise
    M_t = (1 - α_t) M_{t-1} + S_t                   forgetting

where M' are the weights that the token's segment began with (a segment of one token: M_{t-1}). Source: Behrouz et al.
2024, Titans (arXiv 2501.00663), eq. 9-14; its loss has no ½, which is a factor of 2 in θ.

S_t and M_t are linear in what a chunk begins with and in its gradients, with coefficients that are scalars, and a
gradient has rank 1. So no token's weights are written out: `coefficients` has the scalars, by an associative scan, and
`read` uses them as attention does.

Weights are one tensor of numbers (batch, heads, numbers), matrix after matrix; ``widths`` are the sizes of the
network's input, hidden layers and output. Callers give fp32 (or finer) tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

DEPTHS = range(1, 5)
"""Matrices that a neural memory may have."""


def widths_of(size: int, depth: int, expansion: int = 1) -> tuple[int, ...]:
    """Return the widths of a network of ``depth`` matrices, whose hidden layers are ``expansion`` times as wide."""
    return (size, *(size * expansion,) * (depth - 1), size)


def count(widths: Sequence[int]) -> int:
    """Return how many numbers a network's weights are."""
    return sum(a * b for a, b in pairwise(widths))


def matrices(numbers: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Return the matrices (..., out, in) that ``numbers`` (..., count) are; views."""
    parts = torch.split(numbers, [a * b for a, b in pairwise(widths)], -1)
    return [part.view(*part.shape[:-1], b, a) for part, (a, b) in zip(parts, pairwise(widths), strict=True)]


def answer(numbers: Tensor, x: Tensor, widths: Sequence[int]) -> Tensor:
    """Return M(x), (..., tokens, out), of x (..., tokens, in): SiLU between matrices, none behind the last."""
    for index, matrix in enumerate(matrices(numbers, widths)):
        x = (F.silu(x) if index else x) @ matrix.mT
    return x


@dataclass(frozen=True)
class Gates:
    """What every token of a chunk lets the memory do; each (batch, heads, tokens).

    Attributes
    ----------
    forget : α in [0, 1], the share of the weights that fades.
    momentum : η in [0, 1], the share of past surprise that goes on.
    rate : θ >= 0, how much of the momentary surprise is learnt.
    logits : (batch, heads, tokens, 3), log-odds of α, η and θ / the largest rate; None: unknown.
    real : (batch, tokens) bool, which tokens are no padding; None: all.
    """

    forget: Tensor
    momentum: Tensor
    rate: Tensor
    logits: Tensor | None = None
    real: Tensor | None = None

    def where(self, real: Tensor | None) -> Gates:
        """Return gates by which tokens that are not ``real`` (batch, tokens) bool do nothing to a memory at rest."""
        if real is None:
            return self
        shown = real[:, None]
        return Gates(self.forget * shown, self.momentum * shown, self.rate * shown, self.logits, real)


@dataclass(frozen=True)
class Surprise:
    """Gradients of a chunk's tokens, as factors: that of matrix l is errors[l] ⊗ inputs[l].

    Attributes
    ----------
    inputs : a matrix each, (batch, heads, tokens, in).
    errors : a matrix each, (batch, heads, tokens, out).
    residual : (batch, heads, tokens, out), M'(k) - v.
    """

    inputs: list[Tensor]
    errors: list[Tensor]
    residual: Tensor


def surprise(
    numbers: Tensor, keys: Tensor, values: Tensor, widths: Sequence[int], limit: float | None = None
) -> Surprise:
    """Return how much every token of a chunk surprises the weights ``numbers``.

    Parameters
    ----------
    numbers : (batch, heads, numbers), M'.
    keys, values : (batch, heads, tokens, size).
    limit : longest gradient of a matrix; a longer one is shortened, and with it those of the matrices before, to
        which it goes back. None: none is. Without it a token that comes many times in a segment, each time with the
        same gradient, may be learnt far too much, and weights grow without end.
    """
    layers = matrices(numbers, widths)
    inputs, before, x = [], [], keys
    for index, matrix in enumerate(layers):
        x = F.silu(x) if index else x
        inputs.append(x)
        x = x @ matrix.mT
        before.append(x)
    residual = error = x - values
    errors: list[Tensor] = []
    for index in range(len(layers) - 1, -1, -1):
        if limit is not None:
            length, largest = inputs[index].norm(dim=-1, keepdim=True), torch.finfo(error.dtype).max
            length = length.clamp(max=largest)
            error = error * (limit / (error.norm(dim=-1, keepdim=True) * length).clamp(min=limit))
            inputs[index] = inputs[index] / length.clamp(min=torch.finfo(error.dtype).tiny)
            errors.insert(0, error * length)  # so that neither factor is large where the product is not
        else:
            errors.insert(0, error)
        if index:
            z = before[index - 1]
            share = torch.sigmoid(z)
            error = (error @ layers[index]) * (share * (1 + z * (1 - share)))  # SiLU'
    return Surprise(inputs, errors, residual)


def linear_scan(keep: Tensor, inputs: Tensor) -> Tensor:
    """Return h (..., tokens, n) of h_t = keep_t h_{t-1} + inputs_t, h_{-1} = 0, in log2(tokens) steps.

    An associative scan (Blelloch 1990): (a, x) then (b, y) is (b a, b x + y). Nothing is divided and no logarithm
    taken, so gates of 0 and 1 are exact.

    Parameters
    ----------
    keep : (..., tokens).
    inputs : (..., tokens, n).
    """
    tokens, step = keep.shape[-1], 1
    while step < tokens:
        inputs = inputs + keep[..., None] * F.pad(inputs, (0, 0, step, 0))[..., :tokens, :]
        keep = keep * F.pad(keep, (step, 0), value=1.0)[..., :tokens]
        step *= 2
    return inputs


@dataclass(frozen=True)
class Coefficients:
    """Of what S_t and M_t of every token of a chunk are made: of M and S before it, and of its tokens' gradients.

    Attributes
    ----------
    memory : (batch, heads, tokens, 2 + tokens): what M_t has of M, of S, and of every token's -∇ℓ.
    momentum : (batch, heads, tokens, 1 + tokens): what S_t has of S, and of every token's -∇ℓ.
    """

    memory: Tensor
    momentum: Tensor


def coefficients(gates: Gates, stored: Tensor | None = None) -> Coefficients:
    """Return the coefficients of a chunk.

    stored : (batch, heads, tokens) bool, tokens that the memory takes in; it passes over the others as if they had not
        come: neither is anything learnt of them, nor does anything fade. None: all.
    """
    tokens = gates.rate.shape[-1]
    moved: Tensor | float = 1.0
    if stored is not None:
        gates = Gates(gates.forget * stored, torch.where(stored, gates.momentum, 1.0), gates.rate * stored)
        moved = stored[..., None]

    def begins(keep: Tensor) -> Tensor:
        """What the first token lets through of what was there, (batch, heads, tokens, 1)."""
        return F.pad(keep[..., :1], (0, tokens - 1))[..., None]

    kept = 1 - gates.forget
    momentum = linear_scan(gates.momentum, torch.cat((begins(gates.momentum), torch.diag_embed(gates.rate)), -1))
    memory = linear_scan(kept, torch.cat((begins(kept), momentum * moved), -1))
    return Coefficients(memory, momentum)


def read(
    numbers: Tensor, momentum: Tensor, learnt: Surprise, parts: Coefficients, queries: Tensor, widths: Sequence[int]
) -> Tensor:
    """Return M_t(q_t), (batch, heads, tokens, out): what every token of a chunk reads after its own write.

    Parameters
    ----------
    numbers, momentum : (batch, heads, numbers), M and S before the chunk.
    learnt, parts : of `surprise` and `coefficients`.
    queries : (batch, heads, tokens, in).
    """
    x = queries
    pairs = zip(matrices(numbers, widths), matrices(momentum, widths), strict=True)
    for index, (matrix, moved) in enumerate(pairs):
        x = F.silu(x) if index else x
        kept = parts.memory[..., :1] * (x @ matrix.mT) + parts.memory[..., 1:2] * (x @ moved.mT)
        x = kept - (x @ learnt.inputs[index].mT * parts.memory[..., 2:]) @ learnt.errors[index]
    return x


def after(numbers: Tensor, momentum: Tensor, learnt: Surprise, parts: Coefficients) -> tuple[Tensor, Tensor]:
    """Return M and S after the last token of a chunk, (batch, heads, numbers) each; see `read`."""
    last, moved = parts.memory[..., -1, :], parts.momentum[..., -1, :]

    def sum_of(shares: Tensor) -> Tensor:
        """Return Σ share_i (-∇ℓ_i) of shares (batch, heads, tokens)."""
        sums = [
            -((error * shares[..., None]).mT @ put) for error, put in zip(learnt.errors, learnt.inputs, strict=True)
        ]
        return torch.cat([one.flatten(-2) for one in sums], -1)

    memory = last[..., :1] * numbers + last[..., 1:2] * momentum + sum_of(last[..., 2:])
    return memory, moved[..., :1] * momentum + sum_of(moved[..., 1:])


def take_in(
    anchor: Tensor, numbers: Tensor, momentum: Tensor, keys: Tensor, values: Tensor, queries: Tensor, gates: Gates,
    widths: Sequence[int], limit: float | None,
) -> tuple[Tensor, Surprise, Tensor, Tensor]:  # fmt: skip
    """Let the tokens of a chunk, all of one segment, write, and each read after its own write.

    Parameters
    ----------
    anchor : (batch, heads, numbers), M', the weights that the segment began with.
    numbers, momentum : M and S before the chunk.

    Returns
    -------
    What is read (batch, heads, tokens, out), how much each token was a surprise, and M and S after the chunk.
    """
    learnt, parts = surprise(anchor, keys, values, widths, limit), coefficients(gates)
    reads = read(numbers, momentum, learnt, parts, queries, widths)
    return reads, learnt, *after(numbers, momentum, learnt, parts)
