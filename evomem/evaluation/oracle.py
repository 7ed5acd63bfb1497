"""Evaluation: how good a ranking or a decision is when the future is known; pure tensor arithmetic, no model call.

All functions take what `evomem.evaluation.future.Future` holds of a layer, or a trace of it. `FutureOracle` decides
by it and is evaluated as any other manager is: what a policy that knew the future would reach.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from evomem.bounds import TOKENS
from evomem.errors import ConfigError
from evomem.evaluation.future import Future, sample_key
from evomem.evaluation.measurement import LOGLIK, Evaluation, Measurement
from evomem.managers.base import MemoryManager
from evomem.managers.options import ManagerOptions
from evomem.managers.selection import Ends
from evomem.memory.view import LayerView
from evomem.tasks.base import Sample, Task

if TYPE_CHECKING:
    from evomem.evaluation.evaluator import Evaluator


def rank_correlation(scores: Tensor, future: Tensor, valid: Tensor) -> Tensor:
    """Return Spearman's rank correlation of every head; slots of equal value share the mean of their ranks.

    Parameters
    ----------
    scores, future : (batch, kv_heads, slots), of any real type; values at empty slots do not matter.
    valid : (batch, kv_heads, slots) bool, which slots hold a token.

    Returns
    -------
    (batch, kv_heads) fp32 in [-1, 1]; NaN, as in SciPy, where all values of a side are equal.
    """
    valid = valid.expand(scores.shape)
    sides = [_centred_ranks(side, valid) for side in (scores, future)]
    product = (sides[0] * sides[1]).sum(-1)
    scale = (sides[0].square().sum(-1) * sides[1].square().sum(-1)).sqrt()
    return (product / scale).float()


def _centred_ranks(values: Tensor, valid: Tensor) -> Tensor:
    """Return average ranks among the valid slots less their mean, fp64; 0 at empty slots."""
    ordered, order = torch.sort(values, dim=-1)
    step = torch.ones_like(order)
    step[..., 0] = 0
    step[..., 1:] = (ordered[..., 1:] != ordered[..., :-1]).long()
    # Whole numbers in the values' order: infinite scores stay apart from empty slots, which come after all.
    rank = torch.zeros_like(order).scatter(-1, order, step.cumsum(-1))
    rank = torch.where(valid, rank, values.shape[-1]).contiguous()
    ordered_ranks = torch.sort(rank, dim=-1).values
    below, upto = (torch.searchsorted(ordered_ranks, rank, right=right) for right in (False, True))
    ranks = torch.where(valid, (below + upto + 1).double() / 2, 0.0)
    count = valid.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(valid, ranks - ranks.sum(-1, keepdim=True) / count, 0.0)


def good_decision_ratio(keep: Tensor, next_use: Tensor, valid: Tensor) -> Tensor:
    """Return the share of evictions that Belady's rule allows.

    With as many slots as ``keep`` has, Belady keeps those that are used soonest. The boundary is the soonest next use
    among the slots it evicts; an eviction is good if the slot is not used before that. It is always good to evict a
    slot that is never used again (its next use is the number of future tokens).

    Parameters
    ----------
    keep, valid : (batch, kv_heads, slots) bool, what is kept of the slots that hold a token.
    next_use : (batch, kv_heads, slots), the index of the first future token that uses the slot.

    Returns
    -------
    (batch, kv_heads) fp32; 1 where nothing is evicted.
    """
    evicted = valid & ~keep
    kept = (valid & keep).sum(-1, keepdim=True)
    soonest = torch.sort(torch.where(valid, next_use.double(), torch.inf), dim=-1).values
    boundary = soonest.gather(-1, kept.clamp(max=soonest.shape[-1] - 1))
    good = (evicted & (next_use.double() >= boundary)).sum(-1)
    count = evicted.sum(-1)
    return torch.where(count > 0, good / count.clamp(min=1), 1.0).float()


def oracle_scores(future: Future) -> tuple[Tensor, ...]:
    """Return per layer the scores (1, kv_heads, slots) by which a ranking costs least: the trace reward's own f."""
    return future.peak


class FutureOracleOptions(ManagerOptions):
    """Options of `FutureOracle`."""

    sinks: int = Field(default=0, ge=0, le=TOKENS, description="tokens kept at the beginning")


class FutureOracle(MemoryManager):
    """Keeps the slots of a sample that its question and answer will attend to most (`Future.peak`).

    It is not registered: it works on one sample's whole context and can be neither saved nor attached elsewhere.

    Parameters
    ----------
    scores : per layer (1, kv_heads, slots), see `oracle_scores`.
    options : budget and ``sinks``.
    """

    name = "future_oracle"
    Options = FutureOracleOptions
    options: FutureOracleOptions

    def __init__(self, scores: tuple[Tensor, ...], **options: object) -> None:
        super().__init__(**options)
        self.scores = scores

    def make_ends(self) -> Ends:
        """The sinks."""
        return Ends(sinks=self.options.sinks)

    def score(self, view: LayerView) -> Tensor:
        """Return the future attention of the layer's slots: (1, kv_heads, slots) fp32."""
        scores = self.scores[view.layer]
        if view.slots.shape[1:] != scores.shape[1:]:
            raise ConfigError(
                f"future_oracle: knows {scores.shape[-1]} slots of layer {view.layer} and is asked about "
                f"{view.slots.shape[-1]}; it decides once, about the whole context of its own sample"
            )
        return scores.to(view.slots.device)


@torch.no_grad()
def evaluate_oracle(
    evaluator: Evaluator,
    sample: Sample,
    task: Task,
    budget: int | float | None,
    measurement: Measurement = LOGLIK,
    *,
    sinks: int = 0,
) -> Evaluation:
    """Evaluate the decision that knows the future, on one sample, exactly as `Evaluator.evaluate` evaluates managers.

    Parameters
    ----------
    budget : slots per head, or a share of the tokens read; the ``budget`` slots with the most future attention stay.
    sinks : tokens protected at the beginning.
    measurement : as in `Evaluator.evaluate`.

    Returns
    -------
    An `Evaluation` whose ``tokens`` count also what the model had to read to know the future.

    Raises
    ------
    ConfigError : under the streaming protocol, where what is read depends on earlier decisions.
    """
    if evaluator.protocol.kind != "compress_once":
        raise ConfigError("the future-attention oracle needs the protocol compress_once: one decision about a context")
    tokens, misses = evaluator.tokens(sample), evaluator.store.misses
    key = sample_key(tokens)
    known = key in evaluator.future.known
    scores = oracle_scores(evaluator.future.of(evaluator, tokens, key, measurement.observes))
    extra = tokens.read.shape[1] if evaluator.store.misses > misses else 0
    extra += 0 if known else tokens.prompt.shape[1] + tokens.answer.shape[1] - 1
    manager = FutureOracle(scores, budget=budget, sinks=sinks)
    (evaluation,) = evaluator.evaluate([manager], sample, task, measurement)
    return replace(evaluation, tokens=evaluation.tokens + extra)
