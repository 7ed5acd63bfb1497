"""Manager: eviction as a random ranking (Plackett-Luce), its likelihood, and the expected cost of a ranking.

Sources: R. L. Plackett, "The analysis of permutations" (1975), and R. D. Luce, "Individual choice behavior" (1959), for
the distribution; J. Yellott (1977) for drawing it by sorting scores plus Gumbel noise; KVP (arXiv 2602.10238) for the
cost. Slots are on the last axis everywhere, and axes before it are independent rankings (batch, heads, samples).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ELEMENTS = 1 << 22
"""Upper bound on the pairs of slots that are compared at once in `expected_cost` (16 MiB in fp32)."""


NEVER = -1e30
"""Score of a slot that is never picked while another is left."""


def log_probs(scores: Tensor, ranking: Tensor, n: Tensor | int | None = None) -> Tensor:
    """Return log P of every pick of a ranking, given those before it: (..., slots), differentiable in the scores.

    P(ranking) = Π_j exp(s_j) / Σ_{i picked at j or later} exp(s_i). The sum over the first n picks is the likelihood of
    an ordered selection: the order of later picks does not count.

    Parameters
    ----------
    scores : (..., slots); -inf at slots that cannot be picked.
    ranking : (..., slots) int64, the slots in the order in which they are picked.
    n : number of picks that count, or (...) int64; None: all. Those after the n-th, and those of slots that cannot be
        picked, are 0.
    """
    picked = scores.gather(-1, ranking)
    possible = torch.isfinite(picked)
    # As good as -inf, but with a gradient: exp(-inf - -inf) would be NaN.
    picked = torch.where(possible, picked, NEVER)
    # log Σ over what is left at each pick: from the last pick backwards.
    remaining = torch.logcumsumexp(picked.flip(-1), dim=-1).flip(-1)
    terms = torch.where(possible, picked - remaining, 0.0)
    if n is None:
        return terms
    limit = n[..., None] if isinstance(n, Tensor) else n
    picks = torch.arange(scores.shape[-1], device=scores.device)
    return torch.where(picks < limit, terms, 0.0)


def best_cost(future: Tensor) -> Tensor:
    """Return Z = Σ_j j f_sorted(j), what the best ranking costs: (...); ``future`` (..., slots) as in `trace_cost`."""
    ordered = torch.sort(future, dim=-1, descending=True).values
    return _weighted(ordered)


def trace_cost(future: Tensor, ranking: Tensor) -> Tensor:
    """Return Σ_j j f_ranking(j) / Z >= 1: (...), 1 for the best ranking. It is the loss over *all* budgets at once.

    Parameters
    ----------
    future : (..., slots) >= 0, the attention that each slot gets from the tokens after the decision.
    ranking : (..., slots) int64, see `log_probs`.
    """
    return _weighted(future.gather(-1, ranking)) / best_cost(future)


def expected_cost(scores: Tensor, future: Tensor) -> Tensor:
    """Return the exact mean of `trace_cost` over rankings drawn by the scores: (...), differentiable.

    The cost is linear in ranks, and P(j before i) = σ(s_j - s_i), so
    E[cost] = (1/Z) Σ_i f_i (1 + Σ_{j != i} σ(s_j - s_i)). No sampling; O(slots^2), in blocks of rows.
    """
    slots = scores.shape[-1]
    rows = max(1, BLOCK_ELEMENTS // max(1, slots * scores[..., 0].numel()))
    total = torch.zeros_like(scores[..., 0])
    for begin in range(0, slots, rows):
        block, weight = scores[..., begin : begin + rows], future[..., begin : begin + rows]
        # σ(0) = 1/2 for j = i, which the sum leaves out: with the rank's own 1 that makes 1/2.
        before = torch.sigmoid(scores[..., None, :] - block[..., :, None]).sum(-1)
        total = total + (weight * (before + 0.5)).sum(-1)
    return total / best_cost(future)


def bernoulli_log_prob(log_odds: Tensor, stored: Tensor) -> Tensor:
    """Return log P of what was stored: log σ(g) where ``stored`` (bool), log σ(-g) elsewhere; same shape."""
    return F.logsigmoid(torch.where(stored, log_odds, -log_odds))


def _weighted(values: Tensor) -> Tensor:
    ranks = torch.arange(1, values.shape[-1] + 1, device=values.device, dtype=values.dtype)
    return (values * ranks).sum(-1)
