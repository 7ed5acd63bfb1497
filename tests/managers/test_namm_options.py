"""NAMM: its vector, options, selections and statistics."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomem.errors import CacheError, ConfigError
from evomem.managers.allocation import Dense, Threshold
from evomem.managers.base import managers
from evomem.managers.learned.bam import BAMScorer
from evomem.managers.learned.namm import NAMM, SpectrumStatistics, collect_statistics
from evomem.managers.selection import Ends
from evomem.managers.vector import unflatten, vector_size
from evomem.memory import LayerView
from evomem.memory.observations.spectrum import BINS
from tests.managers.test_namm import REFERENCE, SCORERS, make_manager, make_view


def test_vector_is_the_published_layout() -> None:
    manager = NAMM()
    assert vector_size(manager) == 4172
    with np.load(REFERENCE) as loaded:
        theta = loaded["theta"]
    assert np.array_equal(manager.from_vector(theta).to_vector(), theta.astype(np.float64))
    scorer = manager.scorer
    assert isinstance(scorer, BAMScorer)
    assert scorer.qkv_weight[3, 70].item() == theta[3 * 96 + 70]
    assert scorer.out_weight[4, 30].item() == theta[25 * 96 + 96 + 4 * 50 + 30]
    assert scorer.score_bias.item() == theta[-1]


@settings(deadline=None, max_examples=20)
@given(options=st.sampled_from(SCORERS), seed=st.integers(0, 999))
def test_vector_round_trip(options: dict[str, Any], seed: int) -> None:
    manager = NAMM(**options)
    vector = np.random.default_rng(seed).normal(size=vector_size(manager)).astype(np.float32).astype(np.float64)
    assert np.array_equal(manager.from_vector(vector).to_vector(), vector)
    named = unflatten(manager, torch.from_numpy(vector).float())
    assert {name: value.tolist() for name, value in named.items()} == {
        name: value.tolist() for name, value in manager.named_parameters()
    }


def test_bad_vectors_are_refused() -> None:
    manager = NAMM(scorer="linear")
    with pytest.raises(ConfigError, match=r"25 numbers.*26 parameters"):
        manager.from_vector(np.zeros(25))
    with pytest.raises(ConfigError, match="one axis"):
        manager.from_vector(np.zeros((1, 26)))
    with pytest.raises(ConfigError, match="entry 3"):
        manager.from_vector(np.where(np.arange(26) == 3, np.nan, 0.0))


@pytest.mark.parametrize("options", SCORERS, ids=str)
def test_zeros_keep_everything(options: dict[str, Any]) -> None:
    manager = NAMM(**options)
    assert not manager.to_vector().any()
    for selection in ("threshold", "capped", "dense"):
        view = make_view([[12, 5], [1, 9]])
        assert torch.equal(manager.with_options(selection=selection).decide(view).keep, view.valid)


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.lists(st.integers(1, 12), min_size=2, max_size=2), min_size=1, max_size=3),
    cap=st.one_of(st.none(), st.integers(1, 14), st.floats(0.01, 1)),
    seed=st.integers(0, 99),
)
def test_selections_equal_plain_loops(lengths: list[list[int]], cap: int | float | None, seed: int) -> None:
    view = make_view(lengths, seed=seed)
    scores = torch.randn(view.slots.shape, generator=torch.Generator().manual_seed(seed))
    limit = view.seen if cap is None else cap if isinstance(cap, int) else max(1, math.ceil(view.seen * cap - 1e-6))
    capped = torch.zeros_like(view.valid)
    dense = torch.zeros_like(view.valid)
    ranked: dict[tuple[int, int], list[int]] = {}
    for row in range(len(lengths)):
        for head in range(2):
            held = [s for s in range(view.slots.shape[-1]) if view.slots[row, head, s] >= 0]
            newest, others = held[-1], held[:-1]
            order = [newest, *sorted(others, key=lambda s: -scores[row, head, s].item())]
            ranked[row, head] = order
            wanted = [s for s in order if s == newest or scores[row, head, s] >= 0]
            capped[row, head, wanted[:limit]] = True
    most = max(sum(s == order[0] or bool(scores[at][s] >= 0) for s in order) for at, order in ranked.items())
    for at, order in ranked.items():
        dense[at][order[:most]] = True
    for allocation, budget in ((Threshold(cap=cap), None), (Threshold(), cap)):
        assert torch.equal(allocation.keep(scores, view, view.valid, Ends(), budget), capped)
    assert torch.equal(Dense().keep(scores, view, view.valid, Ends(), None), dense)


def test_options() -> None:
    assert managers.get("namm") is NAMM
    assert NAMM().schedule.every == 512
    assert NAMM().observes == {"attention_spectrum"}
    manager = make_manager(scorer="mlp", hidden=[4])
    other = manager.with_options(budget=5)
    assert other.describe()["options"]["hidden"] == [4]
    assert torch.equal(other.spectrum_mean, manager.spectrum_mean)
    assert (other.decide(make_view([[12, 9]])).keep.sum(-1) <= 5).all()
    for wrong in (
        {"selection": "threshold", "budget": 4},
        {"selection": "dense", "budget": 4},
        {"scorer": "transformer"},
    ):
        with pytest.raises(ConfigError):
            NAMM(**wrong)
    with pytest.raises(ConfigError, match="hidden"):
        NAMM(scorer="mlp", hidden=(4, 0))
    view = make_view([[3]])
    with pytest.raises(CacheError, match="attention_spectrum"):
        manager.score(LayerView(view.keys, view.values, view.slots, view.start, view.seen, 1, 0, 1))


def test_two_managers_share_a_view_but_not_their_statistics() -> None:
    view = make_view([[6, 4]])
    first, second = make_manager(0), make_manager(1)
    alone = second.score(make_view([[6, 4]]))
    first.score(view)
    assert torch.equal(second.score(view), alone)


@settings(deadline=None, max_examples=20)
@given(cuts=st.lists(st.integers(0, 30), max_size=4), offset=st.floats(-1e4, 1e4), seed=st.integers(0, 99))
def test_statistics_do_not_depend_on_the_cut(cuts: list[int], offset: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    spectrum = torch.rand(2, 3, 31, BINS, generator=draw) + offset
    valid = torch.rand(2, 3, 31, generator=draw) < 0.7
    valid[0, 0, 0] = True
    bounds = [0, *sorted(cuts), 31]
    pieces = [(spectrum[:, :, a:b], valid[:, :, a:b]) for a, b in pairwise(bounds)]
    mean, var = collect_statistics(pieces)
    rows = spectrum[valid].double().numpy()
    np.testing.assert_allclose(mean.numpy(), rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(var.numpy(), rows.var(0), rtol=1e-4, atol=1e-12)
    merged = SpectrumStatistics()
    for piece in pieces:
        part = SpectrumStatistics()
        part.add(*piece)
        merged.merge(part)
    torch.testing.assert_close((merged.mean, merged.var), (mean, var))
    manager = NAMM()
    manager.set_statistics(mean, var)
    assert torch.equal(manager.state_dict()["spectrum_var"], var)


def test_bad_statistics_are_refused() -> None:
    with pytest.raises(ConfigError, match="no slot"):
        collect_statistics([])
    with pytest.raises(ConfigError, match="spectrum_mean"):
        NAMM().set_statistics(torch.full((BINS,), torch.nan), torch.ones(BINS))
    with pytest.raises(ConfigError, match="negative"):
        NAMM().set_statistics(torch.zeros(BINS), -torch.ones(BINS))
