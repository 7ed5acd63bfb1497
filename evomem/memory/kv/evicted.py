"""Memory: how many slots left every layer, counted where they left by other ways than decisions.

Decisions count what they take from every layer (`LayerView.evicted`). A crop that takes back what decisions had seen,
masks that a program gives, and files of before leave no such count; between two forward passes all layers hold slots of
the same tokens, so it can be made from what they hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evomem.devices import stacked

if TYPE_CHECKING:
    from evomem.memory.kv.layer import SlotLayer


def count_evicted(layers: Sequence[SlotLayer], rows: Tensor | None = None) -> None:
    """Count what every layer lost, by what a head of it holds on average (rounded down), and tell all layers.

    rows : (batch,) bool, rows to count; None: all.
    """
    if not layers[0].seen:
        for layer in layers:
            layer.evicted = None
        return
    counts = [(layer.slots >= 0).sum(-1) for layer in layers]
    gone = stacked(
        [(layer.seen - layer.start) - h.sum(-1) // h.shape[-1] for layer, h in zip(layers, counts, strict=True)]
    )
    gone = gone.clamp(min=0).transpose(0, 1).contiguous()
    for layer in layers:
        here = gone.to(layer.start.device)
        if rows is not None:
            before = layer.evicted if layer.evicted is not None else torch.zeros_like(here)
            here = torch.where(rows.to(here.device)[:, None], here, before)
        layer.evicted = here


def rows_cropped(layers: Sequence[SlotLayer], length: int) -> Tensor:
    """Return the rows of which tokens from index ``length`` on left some head before: (batch,) bool.

    When such tokens are cropped, heads lose different numbers of slots.
    """
    missing = []
    for layer in layers:
        tokens = layer.seen - layer.start.clamp(min=length)
        missing.append(((layer.slots >= length).sum(-1) != tokens[:, None]).any(-1))
    return stacked(missing).any(0)
