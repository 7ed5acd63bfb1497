"""Memory: how the attention of the newest queries is spread over the slots, and how it changes from query to query."""

from __future__ import annotations

import torch
from torch import Tensor

from evomem.memory.observations.base import Window, register_observation
from evomem.memory.observations.windows import WindowObservation


@register_observation("window_entropy")
class WindowEntropy(WindowObservation):
    """The slot's part -a log a of the entropy of a query's attention a, in nats, a mean over the row's last W queries.

    Query heads are taken one by one and averaged over the group. Summed over all slots it is their mean entropy (CAKE,
    arXiv 2503.12491, "spatial" dispersion); over some slots, what those contribute.
    """

    def of(self, window: Window) -> Tensor:
        """Return (batch, kv_heads, slots)."""
        attention, count = _of_real(window)
        parts: Tensor = torch.special.entr(attention)
        return parts.sum(3).mean(2) / count


@register_observation("window_variance")
class WindowVariance(WindowObservation):
    """Unbiased variance of the attention that a query head pays over the row's last W queries; mean of the group.

    0 while one query was read. What CAKE (arXiv 2503.12491) calls the temporal shift of attention.
    """

    def of(self, window: Window) -> Tensor:
        """Return (batch, kv_heads, slots)."""
        attention, count = _of_real(window)
        mean = (attention.sum(3) / count[..., None])[:, :, :, None]
        apart = torch.where(window.real[:, None, None, :, None], attention - mean, 0.0)
        return apart.square().sum(3).mean(2) / (count - 1).clamp(min=1)


@register_observation("window_group_peak")
class WindowGroupPeak(WindowObservation):
    """Mean attention of the row's last W queries, of the query head of the group for which it is the largest.

    Slot by slot, as LAVa (arXiv 2509.09754) joins the query heads of a KV head. `WindowPeak` takes the largest of every
    query before it sums.
    """

    def of(self, window: Window) -> Tensor:
        """Return (batch, kv_heads, slots)."""
        attention, count = _of_real(window)
        return attention.sum(3).amax(2) / count


def _of_real(window: Window) -> tuple[Tensor, Tensor]:
    """Return the attention by query head with 0 for padded queries, and each row's number of queries, (batch, 1, 1).

    A query for which no slot is left, whose softmax is of nothing, counts as one that pays nothing.
    """
    attention = torch.where(window.real[:, None, None, :, None], window.by_head, 0.0).nan_to_num(nan=0.0)
    return attention, window.real.sum(1).clamp(min=1)[:, None, None]
