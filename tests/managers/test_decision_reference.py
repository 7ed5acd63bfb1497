"""Every decision against a slow one that was written after the documentation, without a look at the code."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomem.managers import allocations, build_allocation
from evomem.managers.allocation import ModelAllocation
from evomem.managers.decision import Judgement, Rule
from evomem.managers.selection import Ends
from evomem.memory import LayerView
from tests.support.slow_decision import Head, Protected, decide

LOGS = st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=4).map(tuple)
OVER_LAYERS = st.one_of(
    st.just("uniform"),
    st.builds(
        lambda beta, window: {"name": "pyramid", "options": {"beta": beta, "window": window}},
        st.floats(1, 50), st.none() | st.integers(0, 9),
    ),
    st.builds(lambda logs: {"name": "depth_shares", "options": {"log_shares": logs}}, LOGS),
    st.builds(lambda points: {"name": "depth_shares", "options": {"points": points}}, st.integers(1, 4)),
)  # fmt: skip
ANY = {
    "over_layers": OVER_LAYERS,
    "across_heads": st.builds(
        lambda layers, safeguard: {"name": "across_heads", "options": {"layers": layers, "safeguard": safeguard}},
        OVER_LAYERS, st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.7, 1.0]) | st.floats(0, 1),
    ),
    "across_layers": st.builds(
        lambda safeguard: {"name": "across_layers", "options": {"safeguard": safeguard}},
        st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.7, 1.0]),
    ),
    "per_head_shares": st.just("per_head_shares"),
    "threshold": st.builds(
        lambda cap: {"name": "threshold", "options": {"cap": cap}}, st.none() | st.integers(1, 30) | st.floats(0.05, 1)
    ),
}  # fmt: skip
"""Some of every allocation that this file has a slow way for."""
SCORES = st.sampled_from([-math.inf, -2.5, -1.0, -1.0, -0.0, 0.0, 0.5, 0.5, 1.0, 3.0, math.inf, math.nan])
SHARE = st.floats(0.02, 1) | st.sampled_from([0.1, 0.2, 0.3, 0.6, 0.7, 1.0])


def test_every_registered_allocation_has_a_slow_way():
    """Here, or in another file of this folder, which names it."""
    here = {"uniform", "pyramid", "depth_shares", *ANY} - {"over_layers"}
    folder, known = Path(__file__).parent, (Path(__file__).name, "test_allocation.py")
    others = "\n".join(path.read_text() for path in folder.glob("test_*.py") if path.name not in known)
    assert not [name for name in allocations.names() if name not in here and not re.search(rf"\b{name}\b", others)]


@pytest.mark.parametrize("name", ANY)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_what_is_kept_is_what_the_documentation_says(name, data):
    layers, heads, read = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3)), data.draw(st.integers(2, 30))
    padding = (0, data.draw(st.integers(0, read - 1)))
    rows = [
        [[_head(data, read - pad, whole) for _ in range(heads)] for whole in _whole(data, layers)] for pad in padding
    ]
    spec = data.draw(ANY[name])
    if spec == "per_head_shares":
        spec = {"name": name, "options": {"layers": layers, "heads": heads}}
    allocation = build_allocation(spec)
    logs = None
    for parameter in allocation.parameters():
        drawn = data.draw(st.lists(st.floats(-4, 4, width=32), min_size=parameter.numel(), max_size=parameter.numel()))
        parameter.data.copy_(torch.tensor(drawn).reshape(parameter.shape))
        logs = parameter.reshape(layers, heads).tolist() if name == "per_head_shares" else drawn
    recent = data.draw(st.integers(0, 6) | st.floats(0, 1) | st.sampled_from([0.1, 0.3, 0.7]))
    ends = data.draw(st.integers(0, 4) | st.sampled_from([0.1, 0.3, 0.5, 1.0])), recent, data.draw(st.just(1.0) | SHARE)
    budget = data.draw(st.none() | st.integers(1, 40) | SHARE)
    if name == "threshold" and spec["options"]["cap"] is not None:
        budget = None
    views, judgements = _tensors(rows, padding, read, layers)
    real = [one.keep for one in Rule(budget, Ends(*ends), allocation).decide_all(judgements, views)]
    for b, pad in enumerate(padding):
        slow = decide(
            rows[b], read - pad, budget, Protected(*ends), json.loads(json.dumps(allocation.describe())), logs
        )
        for layer, view in enumerate(views):
            for h in range(heads):
                skipped = view.slots.shape[-1] - len(rows[b][layer][h].tokens)
                kept = {int(slot) - skipped for slot in real[layer][b, h].nonzero()[:, 0]}
                assert kept == slow[layer][h], (b, layer, h)
    if not isinstance(allocation, ModelAllocation):
        for view, judgement, keep in zip(views, judgements, real, strict=True):
            assert torch.equal(Rule(budget, Ends(*ends), allocation).decide(judgement, view).keep, keep)


def _whole(data, layers):
    """Whether a layer holds everything, or what earlier decisions left."""
    return data.draw(st.lists(st.booleans(), min_size=layers, max_size=layers))


def _head(data, read, everything):
    tokens = list(range(read))
    if not everything:
        tokens = sorted(data.draw(st.sets(st.integers(0, read - 1))) | {read - 1})
    count = len(tokens)
    scores = data.draw(st.lists(SCORES, min_size=count, max_size=count))
    return Head(
        tokens, scores, data.draw(st.lists(st.sampled_from([True, True, False]), min_size=count, max_size=count))
    )


def _tensors(rows, padding, read, layers):
    """The same rows as views and judgements: heads right-aligned, rows behind their padding."""
    views, judgements = [], []
    for layer in range(layers):
        heads = [[row[layer][h] for h in range(len(row[layer]))] for row in rows]
        width = max(len(head.tokens) for row in heads for head in row)
        shape = (len(rows), len(heads[0]), width)
        slots, scores, stored = torch.full(shape, -1), torch.full(shape, 9.0), torch.ones(shape, dtype=torch.bool)
        for b, row in enumerate(heads):
            for h, head in enumerate(row):
                begin = width - len(head.tokens)
                slots[b, h, begin:] = torch.tensor(head.tokens) + padding[b]
                scores[b, h, begin:] = torch.tensor(head.scores)
                stored[b, h, begin:] = torch.tensor(head.stored)
        nothing = torch.zeros(*shape, 2)
        views.append(LayerView(nothing, nothing, slots, torch.tensor(padding), read, read, layer, layers))
        judgements.append(Judgement(scores, stored))
    return views, judgements
