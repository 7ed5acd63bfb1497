"""Model: the layers of a transformer with memory matrices (`evomem.models.architectures.memory_matrix`)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evomem.memory.explicit.matrix import Exchange, MatrixLayer
from evomem.memory.explicit.matrix_rows import MatrixRows
from evomem.memory.explicit.matrix_rules import Write, precise

if TYPE_CHECKING:
    from evomem.models.architectures.memory_matrix import MemoryMatrixConfig


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Return x (..., heads * size) as (..., heads, size)."""
    return x.view(*x.shape[:-1], heads, x.shape[-1] // heads)  # no tokens have a size, too


class RowMemory(nn.Module):
    """The memory of one layer: what tokens write into M and read from it."""

    def __init__(self, config: MemoryMatrixConfig) -> None:
        super().__init__()
        self.rule, self.reach = config.rule, config.reach
        heads, slots, width = config.matrix_heads, config.matrix_slots, config.matrix_width
        inputs = config.hidden_size * (1 + config.reach)
        self.heads = heads
        self.initial = nn.Parameter(torch.zeros(heads, slots, width))
        self.write_key = nn.Linear(inputs, heads * width)
        self.write_value = nn.Linear(inputs, heads * width)
        self.read_key = nn.Linear(inputs, heads * width)
        self.store = nn.Linear(inputs, heads)
        if config.rule == "erase_add":
            self.erase = nn.Linear(inputs, heads * width)
        if config.rule == "gated":
            self.input_bias = nn.Linear(inputs, heads)
            self.forget_key = nn.Linear(inputs, heads * width)
            self.forget_bias = nn.Linear(inputs, heads)
        self.decay = config.decay
        if config.decay_per_slot:
            self.decay_logit = nn.Parameter(torch.full((heads, slots), math.log(config.decay / (1 - config.decay))))

    def decays(self) -> Tensor | None:
        """λ, () or (matrix_heads, slots) fp32; None: 1."""
        if hasattr(self, "decay_logit"):
            return torch.sigmoid(precise(self.decay_logit))
        return None if self.decay == 1 else precise(self.initial).new_full((), self.decay)

    def _split(self, part: Tensor) -> Tensor:
        """(batch, tokens, heads * width) as (batch, heads, tokens, width), in fp32."""
        return precise(split_heads(part, self.heads).transpose(1, 2))

    def writes(self, inputs: Tensor) -> Write:
        """Return what tokens write, of their inputs (batch, tokens, hidden * (1 + reach)), the newest first."""

        def gate(layer: nn.Linear) -> Tensor:
            values: Tensor = layer(inputs)
            return precise(values.transpose(1, 2))

        write = {"key": self._split(self.write_key(inputs)), "value": self._split(self.write_value(inputs))}
        write["store"] = torch.sigmoid(gate(self.store))
        if self.rule == "erase_add":
            write["erase"] = torch.sigmoid(self._split(self.erase(inputs)))
        if self.rule == "gated":
            write["input_bias"], write["forget_bias"] = gate(self.input_bias), gate(self.forget_bias)
            write["forget_key"] = self._split(self.forget_key(inputs))
        return Write(**write)

    def forward(self, hidden: Tensor, real: Tensor | None, layer: MatrixLayer | MatrixRows) -> Exchange:
        """Let a chunk (batch, tokens, hidden) read and write, and note it in ``layer``.

        real : (batch, tokens) bool, no padding; None: there is none.
        """
        batch, tokens, width = hidden.shape
        hidden = hidden if real is None else hidden * real[..., None]
        tail = hidden.new_zeros(batch, self.reach, width) if layer.tail is None else layer.tail
        line = torch.cat((tail, hidden), 1)
        inputs = torch.cat(
            [line[:, self.reach - back : self.reach - back + tokens] for back in range(1 + self.reach)], -1
        )
        layer.tail = line[:, tokens:]
        keys = self._split(self.read_key(inputs))
        return layer.exchange(self.writes(inputs), keys, self.rule, self.decays(), precise(self.initial), real)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Return x (batch, heads, tokens, head_dim) rotated to positions (batch or 1, tokens), as Su et al. 2021 do."""
    half = x.shape[-1] // 2
    rates = 10_000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angles = positions[:, None, :, None] * rates
    first, second = x[..., :half], x[..., half:]
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)


class WindowAttention(nn.Module):
    """Attention over the window's tokens and the rows of M."""

    def __init__(self, config: MemoryMatrixConfig, index: int) -> None:
        super().__init__()
        self.heads, self.window = config.num_attention_heads, config.window
        self.size = config.hidden_size // config.num_attention_heads
        width = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.memory = RowMemory(config) if index in config.memory_layers else None
        if self.memory is not None:
            shape = (config.matrix_heads, self.heads // config.matrix_heads, config.matrix_width, self.size)
            self.context_query, self.row_key, self.row_value = (nn.Parameter(torch.zeros(shape)) for _ in range(3))

    def forward(
        self, hidden: Tensor, positions: Tensor, real: Tensor | None, layer: MatrixLayer | MatrixRows
    ) -> Tensor:
        """Return (batch, tokens, hidden), and note the chunk in ``layer``."""
        tokens = hidden.shape[1]

        def split(part: Tensor) -> Tensor:
            return split_heads(part, self.heads).transpose(1, 2)

        query, key, value = (split(project(hidden)) for project in (self.q_proj, self.k_proj, self.v_proj))
        scores: list[Tensor] = []
        seen: Exchange | None = None
        if self.memory is not None:
            seen = self.memory(hidden, real, layer)
            groups = precise(query.view(len(query), seen.rows.shape[1], -1, *query.shape[2:]))
            # (batch, matrix heads, heads of each, tokens, head_dim)
            groups = groups + torch.einsum("bgte,ghed->bghtd", seen.context, precise(self.context_query))
            query = groups.flatten(1, 2).to(query.dtype)
            # q · (M W_K) is (q W_Kᵀ) · M: the rows' keys and values are never written out for every token.
            turned = torch.einsum("bghtd,ghed->bghte", groups, precise(self.row_key))
            logits = torch.einsum("bghte,bgtne->bghtn", turned, seen.rows) / math.sqrt(self.size)
            logits = logits if seen.bias is None else logits + seen.bias[:, :, None]
            scores.append(logits.flatten(1, 2))
        key = rotate(key, positions)
        real = hidden.new_ones(hidden.shape[:2], dtype=torch.bool) if real is None else real
        if layer.window_keys is not None and layer.window_values is not None and layer.window_real is not None:
            key, value = torch.cat((layer.window_keys, key), 2), torch.cat((layer.window_values, value), 2)
            real = torch.cat((layer.window_real, real), 1)
        past = key.shape[2] - tokens
        behind = torch.arange(past, past + tokens, device=hidden.device)[:, None] - torch.arange(
            past + tokens, device=hidden.device
        )
        near = (behind >= 0) & (behind < self.window)
        visible = near & (
            real[:, None, None] | (behind == 0)
        )  # padding sees itself, so that nothing is divided by zero
        window = precise(rotate(query, positions)) @ precise(key).transpose(-1, -2) / math.sqrt(self.size)
        scores.append(window.masked_fill(~visible, -torch.inf))
        weights = torch.softmax(torch.cat(scores, -1), -1)
        output = weights[..., weights.shape[-1] - key.shape[2] :] @ precise(value)
        if seen is not None:
            shares = weights[..., : seen.rows.shape[3]].view(len(query), seen.rows.shape[1], -1, *scores[0].shape[2:])
            mixed = torch.einsum("bghtn,bgtne->bghte", shares, seen.rows)
            output = output + torch.einsum("bghte,ghed->bghtd", mixed, precise(self.row_value)).flatten(1, 2)
        kept = min(self.window - 1, key.shape[2])
        layer.window_keys, layer.window_values, layer.window_real = (
            part.narrow(axis, part.shape[axis] - kept, kept) for part, axis in ((key, 2), (value, 2), (real, 1))
        )
        layer.finish(tokens)
        projected: Tensor = self.o_proj(output.to(hidden.dtype).transpose(1, 2).flatten(-2))
        return projected


class MatrixBlock(nn.Module):
    """A layer: attention over window and matrix, then a feed-forward part, each beside a residual path."""

    def __init__(self, config: MemoryMatrixConfig, index: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(config.hidden_size), nn.RMSNorm(config.hidden_size)
        self.attention = WindowAttention(config, index)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(
        self, hidden: Tensor, positions: Tensor, real: Tensor | None, layer: MatrixLayer | MatrixRows
    ) -> Tensor:
        """Return (batch, tokens, hidden)."""
        hidden = hidden + self.attention(self.attention_norm(hidden), positions, real, layer)
        added: Tensor = self.down(F.gelu(self.up(self.mlp_norm(hidden))))
        return hidden + added
