"""Views of one layer whose heads hold different tokens, with everything recorded that heuristics observe."""

from __future__ import annotations

from dataclasses import replace

import torch

from evomem.memory import LayerView

HEADS, GROUP, DIM, SEEN = 3, 2, 8, 40
START = (0, 7)
HELD = ((40, 33, 25), (33, 20, 3))
"""Tokens that each head of each row holds; the empty slots come first."""


def make_view(seed: int = 0, layer: int = 1, layers: int = 4, held=HELD, equal: bool = False) -> LayerView:
    """A layer of ragged heads and two rows with different starts; ``equal`` gives every head the same tokens."""
    g = torch.Generator().manual_seed(seed)
    batch, slots_held = len(START), max(max(row) for row in held)
    slots = torch.full((batch, HEADS, slots_held), -1)
    for b, row in enumerate(held):
        for h, count in enumerate(row):
            order = torch.randperm(SEEN - START[b], generator=g)[:count]
            if equal and h:
                slots[b, h] = slots[b, 0]
            else:
                slots[b, h, slots_held - count :] = order.sort().values + START[b]
    shape = slots.shape
    recorded = {
        name: torch.rand(shape, generator=g) ** 3
        for name in ("attention_sum", "window_attention:8", "window_attention:1", "window_attention:32")
    }
    for name in ("window_variance:8", "window_group_peak:8"):
        recorded[name] = torch.rand(shape, generator=torch.Generator().manual_seed(seed + len(name))) ** 3 / 100
    other = torch.Generator().manual_seed(seed + 1000)
    recorded["frequency"] = torch.randint(0, 4, shape, generator=other).float()
    recorded["recency"] = torch.randint(0, SEEN, shape, generator=other)
    recorded["relevance:8"] = 2 * torch.rand(shape, generator=other) - 1
    recorded["repeated_attention"] = torch.rand(shape, generator=other)
    root = torch.randn(batch, HEADS * GROUP, DIM, DIM, generator=g)
    recorded["query_mean"] = torch.randn(batch, HEADS * GROUP, DIM, generator=g)
    recorded["query_covariance"] = root @ root.mT / DIM
    recorded["future_rotation"] = torch.linalg.qr(torch.randn(batch, DIM, DIM, generator=g)).Q
    return LayerView(
        keys=torch.randn(*shape, DIM, generator=g),
        values=torch.randn(*shape, DIM, generator=g),
        slots=slots,
        start=torch.tensor(START),
        seen=SEEN,
        fresh=SEEN,
        layer=layer,
        layers=layers,
        recorded=recorded,
    )


def alone(view: LayerView, row: int) -> LayerView:
    """The row by itself: without its left padding and without slots that only other rows fill."""
    shift = int(view.start[row])
    first = view.slots.shape[2] - int((view.slots[row] >= 0).sum(-1).max())

    def cut(x):
        return x[row : row + 1, :, first:].clone()

    slotwise = {n: cut(x) for n, x in view.recorded.items() if not n.startswith(("query_", "future_"))}
    rowwise = {n: x[row : row + 1] for n, x in view.recorded.items() if n not in slotwise}
    slots = cut(view.slots)
    return replace(
        view,
        keys=cut(view.keys),
        values=cut(view.values),
        slots=torch.where(slots >= 0, slots - shift, -1),
        start=torch.zeros(1, dtype=torch.int64),
        seen=view.seen - shift,
        recorded={**slotwise, **rowwise},
        memo={},
    )
