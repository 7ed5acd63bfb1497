"""Memory: how a neural memory learns, and how a decision moves the gates of its tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from evomem.memory.explicit.neural_rules import Gates

LARGEST = (0.5, 0.99, 1.5)
"""Values to which a decision may raise a token's gates; where the model's own are larger, they are the limit."""
SMALLEST_RATE = 1e-3
"""Rate to which a decision may lower a token's; where the model's own is smaller, it is the limit."""


@dataclass(frozen=True)
class NeuralRule:
    """How a model's neural memories learn, which a decision does not change.

    Attributes
    ----------
    segment : tokens of a segment.
    widths : of M; see `evomem.memory.explicit.neural_rules`.
    limit : longest gradient of a matrix of M at one token.
    rate : the largest θ of the model.
    momentum, forgetting : whether there are η and α.
    """

    segment: int
    widths: tuple[int, ...]
    limit: float
    rate: float
    momentum: bool = True
    forgetting: bool = True

    def gates(self, logits: Tensor, offsets: Tensor, strength: Tensor | None = None) -> Gates:
        """Return the gates of tokens whose log-odds are moved.

        Parameters
        ----------
        logits : (batch, heads, tokens, 3), of α, η and θ / `rate`.
        offsets : (batch, heads, tokens, 3), added to the log-odds of α and η and to log θ. Within `LARGEST` and
            `SMALLEST_RATE`; 0 leaves a gate as it is, to the bit.
        strength : (batch, heads, tokens), added to log θ without a limit; None: nothing.
        """
        own, offsets = torch.sigmoid(logits), offsets.to(logits.dtype).clamp(-50, 50)
        moved = torch.sigmoid(logits[..., :2] + offsets[..., :2])
        forget, momentum = (
            torch.minimum(moved[..., index], own[..., index].clamp(min=LARGEST[index])) for index in range(2)
        )
        undecided = self.rate * own[..., 2]
        rate = undecided * offsets[..., 2].exp()
        rate = torch.minimum(rate, undecided.clamp(min=LARGEST[2]))
        rate = torch.maximum(rate, undecided.clamp(max=SMALLEST_RATE))
        rate = rate if strength is None else rate * strength.to(rate.dtype).exp()
        return Gates(forget * self.forgetting, momentum * self.momentum, rate)
