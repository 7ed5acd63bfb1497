"""Memory: how a memory matrix M (batch, heads, slots, width) is addressed, read and written; pure functions.

Source: the memory matrix of memory-augmented transformer networks; `erase_add` is that of Neural Turing Machines
(Graves et al. 2014, arXiv 1410.5401), `gated` that of LM2 (Kang et al. 2025, arXiv 2502.06049), with one gate a slot.
Callers give fp32 (or finer) tensors, see `precise`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from evomem.errors import ConfigError


def precise(x: Tensor) -> Tensor:
    """Return ``x`` in fp32, or as it is if its type is finer: a memory that grows by small steps needs that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class Write:
    """What one token, or every token of a chunk, writes.

    The shapes are those of one token; a chunk has an axis of tokens after ``heads``.

    Attributes
    ----------
    key : (batch, heads, width), the write key k_w.
    value : (batch, heads, width), v of `leaky`, `ema` and `gated`, a of `erase_add`.
    store : (batch, heads) in [0, 1], how much of the write is done; None: all.
    erase : (batch, heads, width) in [0, 1], e of `erase_add`.
    input_bias : (batch, heads), what is added to M k_w for the input gate of `gated`.
    forget_key, forget_bias : (batch, heads, width) and (batch, heads); M k_f + b_f is the forget gate of `gated`.
    """

    key: Tensor
    value: Tensor
    store: Tensor | None = None
    erase: Tensor | None = None
    input_bias: Tensor | None = None
    forget_key: Tensor | None = None
    forget_bias: Tensor | None = None

    def token(self, index: int) -> Write:
        """Return what token ``index`` of a chunk writes."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return Write(**{name: part[:, :, index] for name, part in parts.items() if part is not None})


def logits(matrix: Tensor, key: Tensor) -> Tensor:
    """Return M k, (…, slots), of M (…, slots, width) and k (…, width)."""
    return (matrix @ key.unsqueeze(-1)).squeeze(-1)


def read(matrix: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Return what is read, c = Σ_i softmax(M k_r)_i M_i (…, width), and the weights (…, slots), which sum to one."""
    weights = torch.softmax(logits(matrix, key), -1)
    return (weights.unsqueeze(-2) @ matrix).squeeze(-2), weights


def write_weights(matrix: Tensor, write: Write, rule: str) -> Tensor:
    """Return how strongly every slot is written, (batch, heads, slots).

    softmax(M k_w), and with `gated` the input gates σ(M k_w + b); both times ``store``.
    """
    scores = logits(matrix, write.key)
    if rule == "gated":
        weights = torch.sigmoid(scores if write.input_bias is None else scores + write.input_bias.unsqueeze(-1))
    else:
        weights = torch.softmax(scores, -1)
    return weights if write.store is None else weights * write.store.unsqueeze(-1)


def _faded(matrix: Tensor, decay: Tensor | None) -> Tensor:
    return matrix if decay is None else decay.unsqueeze(-1) * matrix


def _leaky(matrix: Tensor, weights: Tensor, write: Write, decay: Tensor | None) -> Tensor:
    return _faded(matrix, decay) + weights.unsqueeze(-1) * write.value.unsqueeze(-2)


def _ema(matrix: Tensor, weights: Tensor, write: Write, decay: Tensor | None) -> Tensor:
    if decay is None:
        return matrix
    kept = decay.unsqueeze(-1)
    return kept * matrix + (1 - kept) * weights.unsqueeze(-1) * write.value.unsqueeze(-2)


def _erase_add(matrix: Tensor, weights: Tensor, write: Write, decay: Tensor | None) -> Tensor:
    erase = write.value.new_ones(()) if write.erase is None else write.erase.unsqueeze(-2)
    share = weights.unsqueeze(-1)
    return _faded(matrix, decay) * (1 - share * erase) + share * write.value.unsqueeze(-2)


def _gated(matrix: Tensor, weights: Tensor, write: Write, decay: Tensor | None) -> Tensor:
    kept = _faded(matrix, decay)
    if write.forget_key is not None:
        scores = logits(matrix, write.forget_key)
        gates = torch.sigmoid(scores if write.forget_bias is None else scores + write.forget_bias.unsqueeze(-1))
        kept = gates.unsqueeze(-1) * kept
    return kept + weights.unsqueeze(-1) * torch.tanh(write.value).unsqueeze(-2)


RULES: dict[str, Callable[[Tensor, Tensor, Write, Tensor | None], Tensor]] = {
    "leaky": _leaky,
    "ema": _ema,
    "erase_add": _erase_add,
    "gated": _gated,
}
"""How a write changes M, by name, with weights w and decay λ:

* ``leaky``: M_i ← λ_i M_i + w_i v
* ``ema``: M_i ← λ_i M_i + (1 - λ_i) w_i v
* ``erase_add``: M_i ← λ_i M_i (1 - w_i e) + w_i a
* ``gated``: M_i ← λ_i sigmoid(f_i) M_i + w_i tanh(v), with w_i = sigmoid((M k_w)_i + b) and f = M k_f + b_f
"""


def check_rule(rule: str) -> str:
    """Return ``rule``; raises `ConfigError` where there is none of that name."""
    if rule not in RULES:
        raise ConfigError(f"memory matrix: there is no rule {rule!r}; give one of {', '.join(RULES)}")
    return rule


def written(matrix: Tensor, weights: Tensor, write: Write, rule: str, decay: Tensor | None) -> Tensor:
    """Return the matrix after one write.

    Parameters
    ----------
    matrix : (batch, heads, slots, width).
    weights : (batch, heads, slots): of `write_weights`, or decided, one-hot.
    write : of one token.
    rule : a name of `RULES`.
    decay : λ in [0, 1], broadcast to (batch, heads, slots): one number, or one a slot. None: 1, nothing fades by
        itself.
    """
    return RULES[rule](matrix, weights, write, decay)


def scan(
    matrix: Tensor, writes: Write, rule: str, decay: Tensor | None, real: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Let the tokens of a chunk write one after another.

    Parameters
    ----------
    matrix : (batch, heads, slots, width) before the chunk.
    writes : of every token.
    real : (batch, tokens) bool; a token that is none (padding) changes nothing, not even by decay. None: all are.

    Returns
    -------
    before : (batch, heads, tokens, slots, width), the matrix that each token reads: before its own write.
    weights : (batch, heads, tokens, slots), how strongly each token wrote; 0 for padding.
    after : (batch, heads, slots, width), after the last.
    """
    before, shares = [], []
    for index in range(writes.key.shape[2]):
        before.append(matrix)
        write = writes.token(index)
        weights = write_weights(matrix, write, rule)
        changed = written(matrix, weights, write, rule, decay)
        if real is None:
            matrix = changed
        else:
            weights = weights * real[:, index, None, None]
            matrix = torch.where(real[:, index, None, None, None], changed, matrix)
        shares.append(weights)
    return torch.stack(before, 2), torch.stack(shares, 2), matrix


def latest(index: Tensor, weights: Tensor, first: int) -> Tensor:
    """Return when each slot was last touched, softly: ``index ← index + w (t - index)`` for token after token.

    With weights of 0 and 1 it is the index of the newest token whose weight was 1.

    Parameters
    ----------
    index : (batch, heads, slots) fp32, before the chunk.
    weights : (batch, heads, tokens, slots) in [0, 1].
    first : index of the chunk's first token.
    """
    left = (1 - weights).flip(2).cumprod(2).flip(2)  # what remains of a token's share, its own step included
    after = torch.cat((left[:, :, 1:], torch.ones_like(left[:, :, :1])), 2)
    tokens = torch.arange(first, first + weights.shape[2], device=index.device, dtype=index.dtype)
    return left[:, :, 0] * index + (after * weights * tokens[:, None]).sum(2)
