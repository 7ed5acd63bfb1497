"""The manager `random`: numbers that are uniform, uncorrelated, and of seed, layer, head and token only."""

from __future__ import annotations

import math

import torch
from scipy import stats

from evomem.managers import build
from evomem.memory import LayerView


def random_scores(seed=0, layer=0, heads=4, length=4096, start=0):
    slots = torch.arange(start, start + length).expand(1, heads, length)
    empty = torch.zeros(1, heads, length, 1)
    view = LayerView(empty, empty, slots, torch.tensor([start]), start + length, length, layer, 8)
    return build("random", seed=seed).score(view)[0]


def test_random_is_uniform_and_uncorrelated():
    scores = {key: random_scores(*key) for key in [(0, 0), (0, 1), (1, 0), (1, 1), (-1, 0)]}
    rows = torch.cat(list(scores.values())).double()
    assert stats.kstest(rows.flatten().numpy(), "uniform").pvalue > 1e-3
    for row in rows:
        assert stats.kstest(row.numpy(), "uniform").pvalue > 1e-4
    # Between any two of (seed, layer, head), and between a row and itself shifted, |r| stays within 5 deviations.
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 5 / math.sqrt(rows.shape[1])
    for shift in (1, 2, 64, 128):
        pair = torch.corrcoef(torch.stack((rows[:, shift:].flatten(), rows[:, :-shift].flatten())))
        assert abs(pair[0, 1]) < 5 / math.sqrt(rows.numel())


def test_random_depends_on_nothing_else():
    base = random_scores(length=64)
    assert torch.equal(base, random_scores(length=64, start=9))
    assert torch.equal(base[:2, :32], random_scores(heads=2, length=32))
    assert not torch.equal(base, random_scores(seed=1, length=64))
