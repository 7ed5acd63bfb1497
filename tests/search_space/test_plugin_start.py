"""A start from a plug-in: options that differ from the space's are said; numbers that mean something else refused."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from evomem import plugins
from evomem.errors import ConfigError
from evomem.managers import build
from evomem.search_space.plugin_start import differing_options
from evomem.search_space.space import SearchSpace, SpaceConfig
from evomem.validation import validate

FEATURES = ["age", "position", "key_norm"]


@pytest.fixture
def start(tmp_path, caplog):
    """Start a space from a plug-in: the space, and what was warned of."""

    def started(manager, options, ranges=None):
        plugins.save(manager, tmp_path / "plug")
        config = {
            "manager": {"name": manager.name, "options": options},
            "options": ranges or {},
            "start": {"plugin": str(tmp_path / "plug")},
        }
        caplog.clear()
        with caplog.at_level(logging.WARNING, "evomem"):
            space = SearchSpace(validate(SpaceConfig, config, "test"))
        return space, [record.getMessage() for record in caplog.records if record.name == "evomem"]

    return started


def scorer(kind="feature_scorer", **options):
    manager = build(kind, **{"features": FEATURES, "sinks": 4, "recent": 8, "budget": 16, **options})
    for parameter in manager.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    return manager


def test_options_that_differ_are_said_with_both_values(start):
    manager = scorer(allocation="across_heads(safeguard=0.3, layers=pyramid(beta=5))", every=64)
    options = {"features": FEATURES, "sinks": 0, "budget": 32, "allocation": "across_heads(layers=pyramid(beta=9))"}
    space, (text,) = start(manager, options)
    assert torch.equal(space.template.weights, manager.weights)
    assert space.template.options.sinks == 0
    for part in (
        "sinks: 4 -> 0",
        "every: 64 -> None",
        "allocation.safeguard: 0.3 -> 0.2",
        "allocation.layers.beta: 5.0 -> 9.0",
    ):
        assert part in text
    for part in ("recent", "features", "budget", "window"):
        assert f"{part}:" not in text


def test_the_same_options_other_budgets_and_what_is_searched_are_not(start):
    options = {"features": FEATURES, "sinks": 4, "recent": 8, "budget": 64}
    assert start(scorer(), options)[1] == []
    assert start(scorer(allocation="uniform"), options)[1] == []
    manager = scorer(sinks=3, allocation="pyramid(beta=7)")
    ranges = {
        "sinks": {"kind": "integer", "low": 0, "high": 6},
        "allocation.beta": {"kind": "log", "low": 1, "high": 50},
    }
    space, texts = start(manager, {**options, "sinks": 0, "allocation": "pyramid(beta=20)"}, ranges)
    assert texts == []
    assert space.template.options.sinks == 3
    assert space.template.allocation.options.beta == pytest.approx(7)
    assert np.allclose(space.start, space.encode(manager), atol=1e-6)


@pytest.mark.parametrize(("kind", "before", "after", "path"), [
    ("feature_scorer", {}, {"features": FEATURES[::-1]}, "features"),
    ("kv_policy", {}, {"features": ["age", "position", "value_norm"]}, "features"),
    ("kv_policy", {"actions": ["evict", "store"]}, {"actions": ["evict", "forget"]}, "actions"),
    ("feature_scorer", {"allocation": "slots(window=16)"}, {"allocation": "slots(window=32)"}, "allocation.window"),
    ("feature_scorer", {"allocation": "per_head_shares(layers=4, heads=2)"},
     {"allocation": "per_head_shares(points=4, heads=2)"}, "allocation.layers"),
])  # fmt: skip
def test_numbers_that_mean_something_else_are_refused(start, kind, before, after, path):
    options = {"features": FEATURES, "sinks": 4, "recent": 8, **before}
    start(scorer(kind, **before), options)
    with pytest.raises(ConfigError, match=rf"mean something else in this space: {path}: .* -> "):
        start(scorer(kind, **before), {**options, **after})


def test_another_allocation_without_numbers_is_said(start):
    _, (text,) = start(scorer(allocation="pyramid(beta=7)"), {"features": FEATURES, "allocation": "lava(window=16)"})
    assert "allocation: pyramid(beta=7.0" in text
    assert "-> lava(window=16" in text


def test_managers_inside_managers_are_compared_by_path():
    one, other = build("adakv(snapkv(window=4), safeguard=0.3)"), build("adakv(snapkv(window=8))")
    assert [str(found) for found in differing_options(one, other)] == ["inner.window: 4 -> 8", "safeguard: 0.3 -> 0.2"]
