"""Manager: the one place where a decision is composed: score, admit, limits, protect, best, decay.

Deployed and drawn decisions come from the same `Rule`. They differ in the `Judgement` that it gets: a stochastic
manager puts drawn scores, gates, rates and shares in the place of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomem.errors import ConfigError
from evomem.managers.allocation import (
    AcrossHeads,
    Allocation,
    EmergentAllocation,
    LayerAllocation,
    ModelAllocation,
)
from evomem.managers.selection import Ends, best, finite, slots_of_budget, tokens_read
from evomem.memory.view import Decision, LayerView


@dataclass(frozen=True)
class Judgement:
    """What a manager says about one layer's slots, before anything is decided.

    Attributes
    ----------
    scores : (batch, kv_heads, slots) fp32; larger is kept.
    stored : (batch, kv_heads, slots) bool, which of the tokens that came since the last decision may enter memory;
        None: all.
    decay : (batch, kv_heads, slots) <= 0, added to the slots' attention logits; None: nothing.
    shares : (batch or 1, points of depth) log-shares of the budget for the allocation; None: its own.
    """

    scores: Tensor
    stored: Tensor | None = None
    decay: Tensor | None = None
    shares: Tensor | None = None


def arrived(view: LayerView) -> Tensor:
    """Slots whose token came since the last decision, which is what storing is about: (batch, kv_heads, slots) bool."""
    return view.valid & (view.age < view.fresh)


@dataclass(frozen=True)
class Rule:
    """How judgements become decisions.

    A token that is refused is taken out before anything is protected or ranked, so its place goes to the next best.

    Attributes
    ----------
    budget : mean slots per head, see `slots_of_budget`.
    ends : tokens that come before all others.
    allocation : how the budget is shared out.
    """

    budget: int | float | None
    ends: Ends
    allocation: Allocation

    def decide(self, judgement: Judgement, view: LayerView) -> Decision:
        """Return the decision about one layer.

        Raises
        ------
        ConfigError : the allocation needs every layer's view, see `decide_all`.
        """
        candidates = self.candidates(view, judgement.stored)
        if isinstance(self.allocation, EmergentAllocation):
            kept = self.allocation.keep(judgement.scores, view, candidates, self.ends, self.budget)
            return Decision(kept, judgement.decay)
        evicted: Tensor | None = None
        if self.counts_evicted(judgement.shares):
            layers = self.layer_limits(view, judgement.shares)
            n, evicted = layers[view.layer], evicted_after(view, layers)
        else:
            n = self.layer_limit(view, judgement.shares)
        marked = self.ends.mark(judgement.scores, view, candidates, n)
        limits = self._by_layer().head_limits(marked, view, candidates, n)
        return Decision(_kept(marked, limits, candidates), judgement.decay, evicted)

    def decide_all(
        self,
        judgements: Sequence[Judgement],
        views: Sequence[LayerView],
        limits: Sequence[Tensor] | None = None,
    ) -> list[Decision]:
        """Return the decisions about all layers, the first first.

        limits : of `head_limits`, where a `ModelAllocation` has been asked before; None: it is asked here.
        """
        if not isinstance(self.allocation, ModelAllocation):
            return [self.decide(judgement, view) for judgement, view in zip(judgements, views, strict=True)]
        limits = self.head_limits(judgements, views) if limits is None else limits
        decisions = []
        layers = zip(judgements, views, limits, self.ends_within(limits, views), strict=True)
        for judgement, view, n, ends_within in layers:
            candidates = self.candidates(view, judgement.stored)
            marked = self.ends.mark(judgement.scores, view, candidates, ends_within)
            decisions.append(Decision(_kept(marked, n, candidates), judgement.decay))
        return decisions

    def head_limits(self, judgements: Sequence[Judgement], views: Sequence[LayerView]) -> list[Tensor]:
        """Return the slots of every head by a `ModelAllocation`: one (batch, kv_heads or 1, 1) int64 a layer."""
        means = [slots_of_budget(self.budget, view) for view in views]
        # Without a budget there is nothing to share out, and no total that an input could have more or less than.
        if self.budget is None:
            return means
        # A score of -inf is one like others here: it must not read as a slot that may not stay.
        scores = [
            torch.where(self.candidates(view, judgement.stored), finite(judgement.scores), -torch.inf)
            for judgement, view in zip(judgements, views, strict=True)
        ]
        return self._by_model().limits(views, means, scores, self.ends, judgements[0].shares)

    def ends_within(self, limits: Sequence[Tensor], views: Sequence[LayerView]) -> list[Tensor]:
        """Return the slots by which a `ModelAllocation` measures protected ends, shaped as ``limits``, one a layer."""
        means = (slots_of_budget(self.budget, view) for view in views)
        return [self._by_model().ends_within(n, mean) for n, mean in zip(limits, means, strict=True)]

    def candidates(self, view: LayerView, stored: Tensor | None) -> Tensor:
        """Slots that may stay, those with a token that was not refused: (batch, kv_heads, slots) bool."""
        return view.valid if stored is None else view.valid & (stored | ~arrived(view))

    def layer_limit(self, view: LayerView, shares: Tensor | None = None) -> Tensor:
        """Return the slots that a head of the layer has on average: (batch, 1, 1) int64.

        Ends are measured by it, except under a `ModelAllocation`, where each head's ends are measured by its own slots.
        Without a layer-wise allocation it is the budget; without a budget there is nothing to share out.
        """
        mean = slots_of_budget(self.budget, view)
        if self.budget is None or not isinstance(self.allocation, LayerAllocation):
            return mean
        return self.allocation.layer_limit(view, mean, self.ends, shares)

    def counts_evicted(self, shares: Tensor | None = None) -> bool:
        """Whether every layer's limit depends on what decisions took from all layers (`LayerView.evicted`).

        So it is where layers get different parts that may grow from decision to decision: parts of a share of a growing
        text, or by ``shares`` that are drawn. Other parts of a fixed number of slots grow only where a layer holds all.
        """
        allocation = self.allocation
        grows = isinstance(self.budget, float) or (self.budget is not None and shares is not None)
        return grows and isinstance(allocation, LayerAllocation) and allocation.by_depth

    def layer_limits(self, view: LayerView, shares: Tensor | None = None) -> Tensor:
        """Return `layer_limit` of every layer: (layers, batch, 1, 1) int64, of an allocation that is by depth."""
        return self._by_layer().layer_limits(view, slots_of_budget(self.budget, view), self.ends, shares)

    def protected(self, view: LayerView, ends_within: Tensor) -> Tensor:
        """Slots that are kept whatever their score is: (batch, kv_heads, slots) bool.

        ends_within : (batch, kv_heads or 1, 1) int64, of `ends_within` under a `ModelAllocation`, else of
            `layer_limit`.
        """
        if isinstance(self.allocation, EmergentAllocation):
            return torch.zeros_like(view.valid)
        return self.ends.safe(view, ends_within) & view.valid

    def open(
        self, scores: Tensor, view: LayerView, stored: Tensor | None, shares: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the scores with -inf at slots that a ranking does not decide about, and how many picks it makes.

        Returns
        -------
        scores (batch, kv_heads, slots), picks (batch, kv_heads) int64.

        Raises
        ------
        ConfigError : there is a budget, and the heads' numbers of slots depend on the scores, or on all layers.
        """
        self.require_rankings()
        candidates = self.candidates(view, stored)
        n = self.layer_limit(view, shares)
        safe = candidates & self.ends.safe(view, n)
        picks = (n - safe.sum(-1, keepdim=True)).clamp(min=0)[..., 0]
        return torch.where(candidates & ~safe, scores, -torch.inf), picks

    def require_rankings(self) -> None:
        """Raise `ConfigError` unless rankings can be drawn, see `open`."""
        emerges = isinstance(self.allocation, EmergentAllocation)
        depends = not isinstance(self.allocation, LayerAllocation) or isinstance(self.allocation, AcrossHeads)
        by_input = isinstance(self.allocation, LayerAllocation) and self.allocation.by_input
        if by_input and self.budget is not None:
            raise ConfigError(
                f"allocation {self.allocation.name!r}: nothing is drawn of how many slots an input gets, so a policy "
                "gradient would leave its numbers as they are; search them by evolution"
            )
        if emerges or (depends and self.budget is not None):
            raise ConfigError(
                f"allocation {self.allocation.name!r}: a ranking that is drawn head by head needs to know how many "
                "slots a head has, and here that depends on all scores; train with uniform, pyramid or depth_shares, "
                "or search by evolution, which draws nothing"
            )

    def _by_layer(self) -> LayerAllocation:
        if not isinstance(self.allocation, LayerAllocation):
            raise ConfigError(
                f"allocation {self.allocation.name!r} needs the views of all layers at once; ask decide_all(views), "
                "or read through a cache of slots, which does"
            )
        return self.allocation

    def _by_model(self) -> ModelAllocation:
        if not isinstance(self.allocation, ModelAllocation):
            raise ConfigError(
                f"allocation {self.allocation.name!r} decides layer by layer; ask layer_limit for a layer's slots"
            )
        return self.allocation


def evicted_after(view: LayerView, limits: Tensor) -> Tensor:
    """Return what decisions have taken from every layer after one by these limits (layers, batch, 1, 1).

    (batch, layers) int64. Tokens that are refused are not known of other layers, and count as held.
    """
    gone = (tokens_read(view) - limits).clamp(min=0)[..., 0, 0].transpose(0, 1)
    return gone if view.evicted is None else torch.maximum(gone, view.evicted)


def _kept(marked: Tensor, limits: Tensor, candidates: Tensor) -> Tensor:
    """Keep the first of every head: marked, candidates (batch, kv_heads, slots), limits (batch, kv_heads or 1, 1)."""
    if limits.shape[0] > marked.shape[0]:
        marked = marked.expand(limits.shape[0], *marked.shape[1:])
    return best(marked, limits) & candidates
