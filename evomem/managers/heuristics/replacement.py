"""Manager: the replacement policies of caches that are a ranking of what is stored: LRU, LFU, FIFO, and their sum."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from evomem.bounds import NEIGHBOURS, TOKENS, VALUE
from evomem.managers.base import MemoryManager, register
from evomem.managers.options import ManagerOptions
from evomem.managers.selection import Ends
from evomem.memory.view import LayerView


def ranks(view: LayerView, first: Tensor, second: Tensor) -> Tensor:
    """Return every slot's rank in its layer, by ``first`` and of equals by ``second``; equals in both have one rank.

    Heads of a layer are ranked together, so that an allocation can compare their slots.

    Parameters
    ----------
    first, second : (batch, kv_heads, slots) fp32, larger is better.

    Returns
    -------
    (batch, kv_heads, slots) fp32: 0 for the best of the layer, -1 for the next best, and so on; empty slots come last.
    """
    first, second = (torch.where(view.valid, part, -torch.inf).flatten(-2) for part in (first, second))
    by_second = torch.sort(second, dim=-1, descending=True).indices
    by_first = torch.sort(first.gather(-1, by_second), dim=-1, descending=True, stable=True).indices
    order = by_second.gather(-1, by_first)
    worse = [part[..., 1:] != part[..., :-1] for part in (first.gather(-1, order), second.gather(-1, order))]
    rank = pad((worse[0] | worse[1]).cumsum(-1), (1, 0)).float()
    return torch.zeros_like(first).scatter(-1, order, -rank).reshape(view.slots.shape)


def relevance(frequency: Tensor, recency: Tensor, context: Tensor, weights: tuple[float, float, float]) -> Tensor:
    """Return R(M_i) = α·frequency + β·recency + γ·context, by which slots are kept; all (…, slots).

    Source: the memory matrix of memory-augmented transformer networks.

    Parameters
    ----------
    frequency : reads received, or what grows with them. With weights (1, 0, 0) the slot with the smallest R is the
        least frequently used.
    recency : time since the last read, or what grows with it; it enters R with a minus, so that with (0, 1, 0) the
        smallest R is the least recently used.
    context : the match with what is read now.
    weights : α, β, γ.
    """
    alpha, beta, gamma = weights
    return alpha * frequency - beta * recency + gamma * context


class ReplacementOptions(ManagerOptions):
    """Options of the replacement policies."""

    recent: int = Field(default=1, ge=0, le=TOKENS, description="newest tokens that are always kept; a cache keeps 1")


class SlotRelevanceOptions(ReplacementOptions):
    """Options of `SlotRelevance`."""

    frequency: float = Field(default=1.0, ge=0, le=VALUE, description="weight of log(1 + reads received)")
    recency: float = Field(default=1.0, ge=0, le=VALUE, description="weight of -log(1 + tokens since the last read)")
    context: float = Field(default=0.0, ge=0, le=VALUE, description="weight of the match with what is read now")
    window: int = Field(default=8, ge=1, le=NEIGHBOURS, description="newest reads that what is read now is the mean of")


@register("slot_relevance")
class SlotRelevance(MemoryManager):
    """Keeps slots by R(M_i) = α·frequency + β·recency + γ·context; (1, 0, 0) is LFU and (0, 1, 0) is LRU, exactly.

    Frequency is log(1 + reads received), recency -log(1 + tokens since the last read), context the mean cosine of the
    slot's key with the newest reads. Where recency has no weight, many slots have the same R; the one that was read
    last comes first then, and scores are ranks within the layer.
    """

    Options = SlotRelevanceOptions
    options: SlotRelevanceOptions

    @property
    def observes(self) -> frozenset[str]:
        """What has a weight, and recency, which decides between equals."""
        options = self.options
        weighed = {"frequency": options.frequency, f"relevance:{options.window}": options.context}
        return frozenset({"recency"} | {name for name, weight in weighed.items() if weight})

    def make_ends(self) -> Ends:
        """The newest tokens."""
        return Ends(recent=self.options.recent)

    def score(self, view: LayerView) -> Tensor:
        """Return R, or ranks by it: (batch, kv_heads, slots) fp32."""
        options = self.options
        since = view.recorded["recency"].float()
        unseen = torch.zeros_like(since)  # what has no weight is not observed
        frequency = torch.log1p(view.recorded["frequency"].float()) if options.frequency else unseen
        context = view.recorded[f"relevance:{options.window}"].float() if options.context else unseen
        weights = (options.frequency, options.recency, options.context)
        score = relevance(frequency, torch.log1p(since), context, weights)
        return score if options.recency else ranks(view, score, -since)


class _Replacement(MemoryManager):
    """What LRU, LFU and FIFO share."""

    Options = ReplacementOptions
    options: ReplacementOptions
    needs: ClassVar[frozenset[str]] = frozenset()

    @property
    def observes(self) -> frozenset[str]:
        """What the policy looks at."""
        return self.needs

    def make_ends(self) -> Ends:
        """The newest tokens."""
        return Ends(recent=self.options.recent)


@register("lru")
class LRU(_Replacement):
    """Keeps the slots that were read, or written, the latest: evicts the least recently used."""

    needs: ClassVar[frozenset[str]] = frozenset({"recency"})

    def score(self, view: LayerView) -> Tensor:
        """Return the negative number of tokens since the last read or write: (batch, kv_heads, slots) fp32."""
        return -view.recorded["recency"].float()


@register("lfu")
class LFU(_Replacement):
    """Keeps the slots that were read the most since they were written; of equals the one that was read last."""

    needs: ClassVar[frozenset[str]] = frozenset({"recency", "frequency"})

    def score(self, view: LayerView) -> Tensor:
        """Return ranks by reads received: (batch, kv_heads, slots) fp32."""
        return ranks(view, view.recorded["frequency"].float(), -view.recorded["recency"].float())


@register("fifo")
class FIFO(_Replacement):
    """Keeps the slots that were written the latest: first in, first out."""

    def score(self, view: LayerView) -> Tensor:
        """Return the negative age in tokens: (batch, kv_heads, slots) fp32."""
        return -view.age.float()
