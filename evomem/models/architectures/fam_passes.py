"""Model: what the layers of a frozen decoder are given where feedback memory stands around it (`fam_around`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from evomem.errors import CacheError
from evomem.memory.explicit.feedback import FeedbackLayer
from evomem.memory.explicit.feedback_slots import FeedbackSlots
from evomem.models.architectures.fam_layers import Turn

if TYPE_CHECKING:
    from evomem.models.architectures.fam_around import FamAroundConfig


class AlonePass:
    """A pass of the embeddings alone, which all see each other."""

    def __init__(self, embedded: Tensor) -> None:
        self.inputs: list[Tensor] = []
        self._mask = embedded.new_zeros(1, 1, embedded.shape[1], embedded.shape[1])

    def enter(self, index: int, hidden: Tensor) -> Tensor:
        """Note what the layer is given."""
        self.inputs.append(hidden)
        return hidden

    def mask(self, index: int) -> Tensor:
        """Return zeros."""
        return self._mask

    def keys(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return them as they are."""
        return key, value

    def attended(self, index: int, output: Tensor) -> Tensor:
        """Return it as it is."""
        return output

    def leave(self, index: int, output: Tensor) -> None:
        """Do nothing."""


class ReadingPass:
    """A pass of a turn: feedback as keys, the turn's tokens, and, where a block ends, feedback as queries.

    Attributes
    ----------
    embedded : (batch, positions, hidden_size), what the first layer would be given; feedback takes its places.
    positions : (batch, positions) int64, counted from the row's first real token.
    tokens : where the turn's tokens are.
    """

    def __init__(
        self,
        embedded: Tensor,
        turn: Turn,
        layers: Sequence[FeedbackLayer | FeedbackSlots],
        inputs: Sequence[list[Tensor]] | None,
        config: FamAroundConfig,
    ) -> None:
        self._turn, self._layers, self._inputs = turn, layers, inputs
        self._kept = (config.segments + 1) * config.block - 1
        device, first = embedded.device, layers[0]
        feedback = first.feedback
        self._slots = 0 if feedback is None else feedback.shape[1]
        self._queries = self._slots if turn.due is not None else 0
        count = turn.end - turn.begin
        self.tokens = slice(self._slots, self._slots + count)
        start = cast(Tensor, first.start)[:, None]
        at = torch.arange(turn.begin, turn.end, device=device)[None] - start  # (batch, tokens)
        block_begin = turn.block_begin[:, None] - start
        if self._slots:
            _require_all_slots(layers, config.feedback)
        before = block_begin - self._slots + torch.arange(self._slots, device=device)
        self.positions = torch.cat((before, at, before + config.block) if self._queries else (before, at), 1)
        blank = embedded.new_zeros(len(embedded), self._slots, embedded.shape[2])
        self.embedded = torch.cat((blank, embedded, blank) if self._queries else (blank, embedded), 1)
        self._mask = self._visible(embedded, at, block_begin, start, config)

    def _visible(
        self, embedded: Tensor, at: Tensor, block_begin: Tensor, start: Tensor, config: FamAroundConfig
    ) -> Tensor:
        """Return what is added to logits, (batch, 1, positions, keys): keys are the window's, then the positions'."""
        turn, window_real = self._turn, self._layers[0].window_real
        real = turn.real if window_real is None else torch.cat((window_real, turn.real), 1)
        width, batch = real.shape[1] - at.shape[1], len(at)
        self._window = width
        index = torch.arange(turn.end - real.shape[1], turn.end, device=at.device)[None] - start  # (batch, keys)
        back = -torch.div(index - block_begin, config.block, rounding_mode="floor")
        behind = at[:, :, None] - index[:, None]
        seen = (behind >= 0) & (real & (back <= config.segments))[:, None]
        seen = seen | (behind == 0)  # padding sees itself, so that nothing is divided by zero

        def row(by_token: Tensor, feedback: bool) -> Tensor:
            """Put columns of feedback between window and tokens, and those of its queries behind; nobody sees these."""
            rows = by_token.shape[1]
            shown = by_token.new_full((batch, rows, self._slots), feedback)
            hidden = by_token.new_zeros(batch, rows, self._queries)
            return torch.cat((by_token[..., :width], shown, by_token[..., width:], hidden), 2)

        parts = [row(seen.new_zeros(batch, self._slots, real.shape[1]), True), row(seen, True)]
        if self._queries:
            parts.append(row((real & (back == 0))[:, None].expand(-1, self._slots, -1), True))
        visible = torch.cat(parts, 1)[:, None]
        least = torch.finfo(embedded.dtype).min
        return torch.zeros_like(visible, dtype=embedded.dtype).masked_fill(~visible, least)

    def enter(self, index: int, hidden: Tensor) -> Tensor:
        """Return the layer's feedback, the tokens' vectors, and the feedback again."""
        tokens = hidden[:, self.tokens]
        if self._inputs is not None:
            self._inputs[index].append(tokens)
        feedback = self._layers[index].feedback
        if feedback is None:
            return hidden
        feedback = feedback.to(hidden.dtype)
        return torch.cat((feedback, tokens, feedback) if self._queries else (feedback, tokens), 1)

    def mask(self, index: int) -> Tensor:
        """Return the pass's mask, with the layer's log-decays where it has some."""
        bias = self._layers[index].bias
        if bias is None:
            return self._mask
        least = torch.finfo(self._mask.dtype).min
        mask, columns = self._mask.clone(), slice(self._window, self._window + self._slots)
        added = bias.to(mask.dtype).clamp(min=least)[:, None, None]
        mask[..., columns] = (mask[..., columns] + added).clamp(min=least)
        return mask

    def keys(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the window before the pass's keys, and keep the new window."""
        layer, real = self._layers[index], self._turn.real
        keys, values = key[:, :, self.tokens], value[:, :, self.tokens]
        if layer.window_keys is not None and layer.window_values is not None and layer.window_real is not None:
            key, value = torch.cat((layer.window_keys, key), 2), torch.cat((layer.window_values, value), 2)
            keys, values = torch.cat((layer.window_keys, keys), 2), torch.cat((layer.window_values, values), 2)
            real = torch.cat((layer.window_real, real), 1)
        kept = min(self._kept, keys.shape[2])
        layer.window_keys, layer.window_values, layer.window_real = (
            part.narrow(axis, part.shape[axis] - kept, kept) for part, axis in ((keys, 2), (values, 2), (real, 1))
        )
        return key, value

    def attended(self, index: int, output: Tensor) -> Tensor:
        """Take the residual of what the model began with out of the first block's feedback."""
        feedback = self._layers[index].feedback
        if not self._queries or feedback is None:
            return output
        residual = torch.where(self._turn.first[:, None, None], feedback, 0.0).to(output.dtype)
        rest = output.shape[1] - self._queries
        return torch.cat((output[:, :rest], output[:, rest:] - residual), 1)

    def leave(self, index: int, output: Tensor) -> None:
        """Let the layer note the turn, and its new feedback."""
        layer = self._layers[index]
        layer.finish(self._turn.end - self._turn.begin)
        if self._turn.due is not None and self._queries:
            layer.compress(output[:, -self._queries :], self._turn.due)


def _require_all_slots(layers: Sequence[FeedbackLayer | FeedbackSlots], count: int) -> None:
    """Raise `CacheError` where a manager has evicted a slot: positions are given to all layers alike."""
    for layer in layers:
        if isinstance(layer, FeedbackSlots) and (layer.slots.shape[-1] != count or bool((layer.slots < 0).any())):
            raise CacheError(
                "the manager evicted slots of a feedback memory around a frozen decoder, whose layers then would need "
                "different positions; take one that writes or forgets and keeps all (write_gate)"
            )
