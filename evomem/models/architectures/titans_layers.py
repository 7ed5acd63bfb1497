"""Model: the layers of Titans (`evomem.models.architectures.titans`)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evomem.memory.explicit.matrix_rules import precise
from evomem.memory.explicit.neural import NeuralLayer
from evomem.memory.explicit.neural_rules import Gates, count, widths_of
from evomem.memory.explicit.neural_slots import NeuralSlots
from evomem.models.architectures.memory_matrix_layers import rotate, split_heads

if TYPE_CHECKING:
    from evomem.models.architectures.titans import TitansConfig


class Norm(nn.Module):
    """x / rms(x), times a learned vector; computed in fp32 or finer, because a memory's answers may be large."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x (..., width), in the type of the weights."""
        x, weight = precise(x), self.weight
        return F.rms_norm(x, x.shape[-1:], precise(weight), 1e-6).to(weight.dtype)


class Projection(nn.Module):
    """A linear map, SiLU, and a causal depthwise convolution over ``conv`` tokens; 1: no convolution."""

    def __init__(self, width: int, conv: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        self.taps = nn.Parameter(torch.ones(width, conv))

    def forward(self, x: Tensor, real: Tensor | None, tail: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return (batch, tokens, width) of x of that shape, and the tail that the next tokens need.

        real : (batch, tokens) bool, no padding; None: there is none.
        tail : (batch, conv - 1, width), of the tokens before; None: there were none.
        """
        (batch, tokens, width), conv = x.shape, self.taps.shape[1]
        x = F.silu(self.linear(x))
        x = x if real is None else x * real[..., None]
        line = torch.cat((x.new_zeros(batch, conv - 1, width) if tail is None else tail, x), 1)
        mixed = sum((line[:, tap : tap + tokens] * self.taps[:, tap] for tap in range(conv)), torch.zeros_like(x))
        return mixed, line[:, tokens:].clone()  # a view would hold the whole line


class NeuralMemory(nn.Module):
    """The neural memory of one layer: keys, values, queries and gates of its tokens, and the weights it begins with."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        self.heads, self.limit, self.largest_rate = config.memory_heads, config.gradient_limit, config.rate
        self.has_momentum, self.forgets = config.momentum, config.forgetting
        self.widths = widths_of(config.hidden_size // self.heads, config.depth, config.expansion)
        self.key, self.value, self.query = (Projection(config.hidden_size, config.conv) for _ in range(3))
        if config.variant == "mac":
            self.retrieve = Projection(config.hidden_size, config.conv)
        self.gates = nn.Linear(config.hidden_size, 3 * self.heads)
        self.initial = nn.Parameter(torch.zeros(self.heads, count(self.widths)))

    def _split(self, x: Tensor) -> Tensor:
        """Return x (batch, tokens, hidden) as (batch, heads, tokens, size) in fp32."""
        return precise(split_heads(x, self.heads).transpose(1, 2))

    @staticmethod
    def _joined(x: Tensor) -> Tensor:
        """Return x (batch, heads, tokens, size) as (batch, tokens, hidden)."""
        return x.transpose(1, 2).flatten(-2)

    def gates_of(self, x: Tensor, real: Tensor | None) -> Gates:
        """Return the gates of tokens x (batch, tokens, hidden): α = σ(·), η = σ(·), θ = `rate` σ(·)."""
        logits = precise(self.gates(x)).transpose(1, 2)
        forget, momentum, rate = torch.sigmoid(logits).chunk(3, 1)
        forget = forget if self.forgets else torch.zeros_like(forget)
        momentum = momentum if self.has_momentum else torch.zeros_like(momentum)
        by_gate = logits.view(len(x), 3, self.heads, x.shape[1]).permute(0, 2, 3, 1)
        return Gates(forget, momentum, self.largest_rate * rate, by_gate).where(real)

    def recall(self, x: Tensor, real: Tensor | None, layer: NeuralLayer | NeuralSlots) -> Tensor:
        """Return what tokens read of the memory as their segment began, (batch, tokens, hidden) in fp32."""
        queries, layer.tail_recall = self.retrieve(x, real, layer.tail_recall)
        return self._joined(layer.recall(F.normalize(self._split(queries), dim=-1), self.widths))

    def forward(self, x: Tensor, real: Tensor | None, layer: NeuralLayer | NeuralSlots) -> Tensor:
        """Let the tokens of a segment write, and return what each reads after it, (batch, tokens, hidden) in fp32."""
        keys, layer.tail_key = self.key(x, real, layer.tail_key)
        values, layer.tail_value = self.value(x, real, layer.tail_value)
        queries, layer.tail_query = self.query(x, real, layer.tail_query)
        keys, queries = (F.normalize(self._split(part), dim=-1) for part in (keys, queries))
        reads, _ = layer.exchange(keys, self._split(values), queries, self.gates_of(x, real), self.widths, self.limit)
        return self._joined(reads)


class PrefixAttention(nn.Module):
    """Attention to persistent tokens and to the last tokens: those of a window, or those of the segment (MAC)."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        self.heads, self.size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.kept = (config.segment if config.variant == "mac" else config.window) - 1
        width = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.persistent = nn.Parameter(torch.zeros(config.persistent, width))

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        real: Tensor | None,
        layer: NeuralLayer | NeuralSlots,
        recalled: Tensor | None = None,
        reach: Tensor | None = None,
    ) -> Tensor:
        """Return (batch, tokens, hidden) of tokens x of that shape, and note them in ``layer``.

        positions : (batch or 1, tokens) int64; keys are turned by them, persistent ones are not.
        recalled : (batch, tokens, hidden), what each token has recalled: keys and values at the token's position.
        reach : (batch, tokens) int64, how many tokens back each sees; None: the window.
        """
        batch, tokens, _ = x.shape

        def split(part: Tensor) -> Tensor:
            return split_heads(part, self.heads).transpose(1, 2)

        def window(part: Tensor, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
            """Return keys and values (batch, heads, tokens of the window and these, size), and keep the last ones."""
            lines = []
            new = rotate(split(self.k_proj(part)), positions), split(self.v_proj(part))
            for name, line in zip(names, new, strict=True):
                old: Tensor | None = getattr(layer, name)
                line = line if old is None else torch.cat((old, line), 2)
                kept = min(self.kept, line.shape[2])
                setattr(layer, name, line.narrow(2, line.shape[2] - kept, kept).clone())
                lines.append(line)
            return lines[0], lines[1]

        shown = x.new_ones((batch, tokens), dtype=torch.bool) if real is None else real
        shown = shown if layer.window_real is None else torch.cat((layer.window_real, shown), 1)
        past = shown.shape[1] - tokens
        behind = torch.arange(past, past + tokens, device=x.device)[:, None] - torch.arange(
            past + tokens, device=x.device
        )
        farthest = self.kept if reach is None else reach[:, None, :, None]
        visible = (behind >= 0) & (behind <= farthest) & shown[:, None, None]
        visible = visible | (behind == 0)  # padding sees itself, so that nothing is divided by zero
        lines = [window(x, ("window_keys", "window_values"))]
        if recalled is not None:
            lines.insert(0, window(recalled, ("recalled_keys", "recalled_values")))
        layer.window_real = shown[:, shown.shape[1] - min(self.kept, shown.shape[1]) :].clone()
        prefix = self.persistent.expand(batch, -1, -1)
        everything = visible.new_ones(batch, 1, tokens, prefix.shape[1])
        mask = torch.cat((everything, *[visible.expand(batch, 1, -1, -1)] * len(lines)), -1)
        keys = torch.cat((split(self.k_proj(prefix)), *(line[0] for line in lines)), 2)
        values = torch.cat((split(self.v_proj(prefix)), *(line[1] for line in lines)), 2)
        query = split(self.q_proj(x))
        # Persistent keys stand nowhere: a query that is turned would see them from every side in its turn.
        level = precise(query) @ precise(keys[:, :, : prefix.shape[1]]).mT
        turned = precise(rotate(query, positions)) @ precise(keys[:, :, prefix.shape[1] :]).mT
        scores = torch.cat((level, turned), -1) / math.sqrt(self.size)
        weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1)
        output: Tensor = self.o_proj((weights @ precise(values)).to(x.dtype).transpose(1, 2).flatten(-2))
        return output


class TitansBlock(nn.Module):
    """A layer: a neural memory, with attention or without, and a feed-forward part, each beside a residual path.

    ======  ===========================================================================================
    `lmm`   M(x)
    `mac`   y = attention(persistent, what is recalled, segment); y ⊗ M(y), M having learnt y
    `mag`   y = attention(persistent, window); y ⊗ M(x)
    `mal`   y = x + M(x); attention(persistent, window of y)
    ======  ===========================================================================================

    y ⊗ m is Norm(y) · SiLU(Norm(m)).
    """

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.variant, self.segment = config.variant, config.segment
        self.memory = NeuralMemory(config)
        self.memory_norm, self.read_norm, self.mlp_norm = (Norm(width) for _ in range(3))
        self.out = nn.Linear(width, width, bias=False)
        if config.variant != "lmm":
            self.attention = PrefixAttention(config)
            self.attention_norm = Norm(width)
        if config.variant == "mac":
            self.recall_norm = Norm(width)
        self.up = nn.Linear(width, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, width)

    def mix(self, x: Tensor, positions: Tensor, real: Tensor | None, layer: NeuralLayer | NeuralSlots) -> Tensor:
        """Return what memory and attention add to tokens x (batch, tokens, hidden); see the class."""
        tokens = x.shape[1]
        normed: Tensor = self.memory_norm(x)
        normed = normed if real is None else normed * real[..., None]
        if self.variant == "lmm":
            mixed = self.read_norm(self.memory(normed, real, layer))
        elif self.variant == "mal":
            stored = self.out(self.read_norm(self.memory(normed, real, layer)))
            attended: Tensor = self.attention(self.attention_norm(x + stored), positions, real, layer)
            summed: Tensor = stored + attended
            return summed
        elif self.variant == "mag":
            attended = self.attention(normed, positions, real, layer)
            gate = F.silu(self.read_norm(self.memory(normed, real, layer)))
            mixed = self.attention_norm(attended) * gate
        else:
            steps = torch.arange(layer.seen, layer.seen + tokens, device=x.device)
            start = layer.start if layer.start is not None else steps.new_zeros(len(x))
            recalled = self.recall_norm(self.memory.recall(normed, real, layer))
            reach = (steps - start[:, None]) % self.segment
            y = self.attention_norm(self.attention(normed, positions, real, layer, recalled, reach))
            y = y if real is None else y * real[..., None]
            mixed = y * F.silu(self.read_norm(self.memory(y, real, layer)))
        output: Tensor = self.out(mixed)
        return output

    def forward(self, x: Tensor, positions: Tensor, real: Tensor | None, layer: NeuralLayer | NeuralSlots) -> Tensor:
        """Return (batch, tokens, hidden), and note the tokens, all of one segment in every row, in ``layer``."""
        layer.begin(precise(self.memory.initial), len(x))
        x = x + self.mix(x, positions, real, layer)
        layer.finish(x.shape[1])
        added: Tensor = self.down(F.gelu(self.up(self.mlp_norm(x))))
        return x + added
