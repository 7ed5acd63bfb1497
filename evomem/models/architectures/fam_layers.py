"""Model: the layers of a transformer with feedback memory (`evomem.models.architectures.fam`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evomem.memory.explicit.feedback import FeedbackLayer
from evomem.memory.explicit.feedback_slots import FeedbackSlots
from evomem.memory.explicit.matrix_rules import precise
from evomem.models.architectures.memory_matrix_layers import rotate, split_heads

if TYPE_CHECKING:
    from evomem.models.architectures.fam import FamConfig


@dataclass(frozen=True)
class Turn:
    """Tokens that are read together: of every row, tokens of one block.

    Attributes
    ----------
    begin, end : index of the first token, and one past the last.
    real : (batch, tokens) bool, no padding.
    block_begin : (batch,) int64, index at which the row's block begins; the last block before it ended there.
    due : (batch,) bool, rows whose block ends with the turn; None: no row's.
    first : (batch,) bool, rows whose block is their first.
    """

    begin: int
    end: int
    real: Tensor
    block_begin: Tensor
    due: Tensor | None
    first: Tensor


class BlockAttention(nn.Module):
    """Attention of a block's tokens, and of the feedback that summarises the block."""

    def __init__(self, config: FamConfig) -> None:
        super().__init__()
        self.heads, self.block, self.segments = config.num_attention_heads, config.block, config.segments
        self.slots = config.feedback
        width = config.hidden_size
        self.size = width // self.heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def _split(self, part: Tensor) -> Tensor:
        return split_heads(part, self.heads).transpose(1, 2)

    def _scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Return logits (batch, heads, queries, keys) in fp32."""
        return precise(query) @ precise(key).transpose(-1, -2) / math.sqrt(self.size)

    def _mixed(self, scores: list[Tensor], values: list[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
        """Return what queries read, (batch, queries, hidden), and the weights, (batch, heads, queries, keys) fp32."""
        weights = torch.softmax(torch.cat(scores, -1), -1)
        output = weights @ precise(torch.cat(values, 2))
        projected: Tensor = self.o_proj(output.to(like.dtype).transpose(1, 2).flatten(-2))
        return projected, weights

    def alone(self, feedback: Tensor) -> Tensor:
        """Return what feedback (batch, slots, hidden) reads of itself where no block is there yet."""
        at = torch.arange(feedback.shape[1], device=feedback.device)[None]
        query, key = (rotate(self._split(project(feedback)), at) for project in (self.q_proj, self.k_proj))
        return self._mixed([self._scores(query, key)], [self._split(self.v_proj(feedback))], feedback)[0]

    def forward(
        self,
        hidden: Tensor,
        feedback: Tensor | None,
        bias: Tensor | None,
        turn: Turn,
        layer: FeedbackLayer | FeedbackSlots,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what tokens (batch, tokens, hidden) read, and what the feedback reads of the block; None if not due.

        Parameters
        ----------
        feedback : (batch, slots, hidden), normed as tokens are; None: there is none.
        bias : (batch, slots), added to logits of the feedback; None: nothing.
        """
        at = torch.arange(turn.begin, turn.end, device=hidden.device)[None]
        query, key = (rotate(self._split(project(hidden)), at) for project in (self.q_proj, self.k_proj))
        value, real = self._split(self.v_proj(hidden)), turn.real
        if layer.window_keys is not None and layer.window_values is not None and layer.window_real is not None:
            key, value = torch.cat((layer.window_keys, key), 2), torch.cat((layer.window_values, value), 2)
            real = torch.cat((layer.window_real, real), 1)
        index = torch.arange(turn.end - key.shape[2], turn.end, device=hidden.device)
        # (batch, keys): blocks from the one that is read back to a key's own
        back = -((index - turn.block_begin[:, None]) // self.block)
        behind = at[0][:, None] - index  # (tokens, keys)
        visible = (behind >= 0) & (real & (back <= self.segments))[:, None]
        visible = visible | (behind == 0)  # padding sees itself, so that nothing is divided by zero
        scores = [self._scores(query, key).masked_fill(~visible[:, None], -torch.inf)]
        summary, values = None, [value]
        if feedback is not None:
            # The last positions of the block that was compressed; a block later once this one is.
            numbers = torch.arange(self.slots, device=hidden.device) if layer.numbers is None else layer.numbers
            before = turn.block_begin[:, None] - self.slots + numbers
            row_key = rotate(self._split(self.k_proj(feedback)), before)
            row_value = self._split(self.v_proj(feedback))
            added = 0.0 if bias is None else bias[:, None, None]
            scores, values = [self._scores(query, row_key) + added, *scores], [row_value, *values]
            if turn.due is not None:
                row_query = rotate(self._split(self.q_proj(feedback)), before + self.block)
                block = (real & (back == 0))[:, None, None]
                logits = self._scores(row_query, key).masked_fill(~block, -torch.inf)
                summary, _ = self._mixed([self._scores(row_query, row_key) + added, logits], values, hidden)
        kept = min((self.segments + 1) * self.block - 1, key.shape[2])
        layer.window_keys, layer.window_values, layer.window_real = (
            part.narrow(axis, part.shape[axis] - kept, kept) for part, axis in ((key, 2), (value, 2), (real, 1))
        )
        read, weights = self._mixed(scores, values, hidden)
        if feedback is not None:
            layer.read_by(hidden, weights[..., : feedback.shape[1]])
        return read, summary


class FamBlock(nn.Module):
    """A layer: attention, then a feed-forward part, each beside a residual path; feedback goes through both."""

    def __init__(self, config: FamConfig) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(config.hidden_size), nn.RMSNorm(config.hidden_size)
        self.attention = BlockAttention(config)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def _fed(self, hidden: Tensor) -> Tensor:
        added: Tensor = self.down(F.gelu(self.up(self.mlp_norm(hidden))))
        return hidden + added

    def carry(self, feedback: Tensor) -> Tensor:
        """Return what the next layer begins with, of what this one does: (batch, slots, hidden)."""
        return self._fed(feedback + self.attention.alone(self.attention_norm(feedback)))

    def forward(self, hidden: Tensor, turn: Turn, layer: FeedbackLayer | FeedbackSlots) -> Tensor:
        """Return (batch, tokens, hidden), and note the turn in ``layer``."""
        feedback = normed = None
        if layer.feedback is not None:
            feedback = layer.feedback.to(hidden.dtype)
            normed = self.attention_norm(feedback)
        read, summary = self.attention(self.attention_norm(hidden), normed, layer.bias, turn, layer)
        layer.finish(turn.end - turn.begin)
        if turn.due is not None and feedback is not None and summary is not None:
            # The first block's feedback is made without a residual of what the model began with.
            residual = torch.where(turn.first[:, None, None], torch.zeros_like(feedback), feedback)
            layer.compress(self._fed(residual + summary), turn.due)
        return self._fed(hidden + read)
