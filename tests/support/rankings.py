"""Rankings drawn from Plackett-Luce in the plain way, and their likelihood as one number."""

from __future__ import annotations

import torch
from torch import Tensor

from evomem.managers.plackett_luce import log_probs


def sample_ranking(scores: Tensor, generator: torch.Generator) -> Tensor:
    """Return a ranking (..., slots): sorted by scores (..., slots) plus Gumbel noise (Yellott 1977)."""
    uniform = torch.rand(scores.shape, generator=generator, dtype=torch.float64)
    gumbel = -torch.log(-torch.log(uniform.clamp(min=1e-300))).to(scores.dtype)
    return torch.argsort(scores + gumbel, dim=-1, descending=True)


def log_prob(scores: Tensor, ranking: Tensor, n: Tensor | int | None = None) -> Tensor:
    """Return log P of the first ``n`` picks of a ranking: (...)."""
    return log_probs(scores, ranking, n).sum(-1)
