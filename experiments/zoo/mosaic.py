"""Model: how the zoo's Memory Mosaic begins."""

from __future__ import annotations

import math

import torch

from evomem.models.architectures.mosaic import MemoryMosaic
from evomem.models.architectures.mosaic_units import RATE

BETA = 30.0
"""Inverse temperature at which the contextual units of the first layer read at first."""
DECAYS = (0.4, 0.6)
"""Smallest and largest λ of their heads at first: a key knows its token, and a little of what came before it."""
COPIED = 3.0
"""Length of what the first layer says comes next, beside a token vector of length 1."""
SAID = 1.5
"""Length of the vectors that the output compares it with."""


def begin_as_copies(model: MemoryMosaic) -> None:
    """Let the contextual units of the first layer begin as copies of what followed the last time.

    A unit's value knows the token after its key's, so one layer of a mosaic can do what takes a transformer two (an
    induction head, Olsson et al. 2022): look up the token that it stands on, and say what came then. Tokens lie in one
    half of the width. Keys look at it from one side a head, values at the next token; what is read is turned into
    the other half, which the output compares with all tokens. The second layer, and the persistent units, begin at
    random and say little. Everything is trained; needles of several digits and the filler's words are still to be
    learnt.
    """
    width = model.config.hidden_size
    tokens, copies = torch.nn.init.orthogonal_(torch.empty(width, width)).split((width // 2, width // 2))
    words = model.get_input_embeddings().weight
    words.copy_(torch.randn(len(words), width // 2) / (width // 2) ** 0.5 @ tokens)
    model.get_output_embeddings().weight.copy_(SAID * words @ tokens.T @ copies)
    for layer in model.layers:
        layer.persistent_out.weight.mul_(0.1)
        layer.contextual_out.weight.mul_(0.1)
    unit, out = model.layers[0].contextual[0], model.layers[0].contextual_out
    heads = unit.keys.heads
    size = width // heads
    seen, said = (
        torch.cat([torch.nn.init.orthogonal_(torch.empty(size, width // 2)) for _ in range(heads)]) for _ in range(2)
    )
    unit.keys.projection.weight.copy_(seen @ tokens)
    unit.keys.decay.copy_(-torch.linspace(*DECAYS, heads).log() / RATE)
    unit.bandwidth.scale.fill_(math.log(BETA) / 2 / RATE)
    unit.values.projection.weight.copy_(said @ tokens)
    unit.values.share.zero_()
    unit.values.scale.zero_()
    # Heads see a token from `heads` sides, each of length 1: added up, they are about its vector times this.
    out.weight.copy_(COPIED / heads * (size / (width // 2)) ** -0.5 * (copies.T @ said.T))
