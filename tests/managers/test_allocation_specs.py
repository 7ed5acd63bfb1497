"""How allocations are written, saved, searched and decided by populations, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from evomem import plugins
from evomem.errors import ConfigError
from evomem.evaluation import PopulationPolicy
from evomem.managers import allocations, build, build_allocation
from evomem.managers.allocation import (
    AcrossHeads,
    LayerAllocation,
    register_allocation,
)
from evomem.managers.vector import load_vector, to_vector
from evomem.search_space.space import SearchSpace, SpaceConfig
from tests.managers.test_allocation import full_views
from tests.managers.test_features import view_of
from tests.support.ragged_view import make_view

SPEC = "snapkv(window=8, budget=12, allocation=across_heads(layers=depth_shares(points=3), safeguard=0.5))"


def test_texts_mappings_and_numbers_mean_the_same():
    text = build("keydiff(allocation=pyramid(beta=5))").describe()
    assert build("keydiff", allocation={"name": "pyramid", "options": {"beta": 5}}).describe() == text
    assert build("keydiff", allocation="pyramid(beta=5)").describe() == text
    assert build(text).describe() == text
    assert json.loads(json.dumps(text)) == text
    assert "allocation" not in build("keydiff").describe()["options"]
    assert build("feature_scorer(allocation=4)").describe()["options"]["allocation"] == 4
    for spec in ("feature_scorer(allocation=4)", "feature_scorer(allocation=depth_shares(points=4))"):
        assert list(dict(build(spec).named_parameters())) == ["weights", "log_shares"]
    for number in (0, 4):  # what a command line has is a text
        assert build_allocation(f" {number}").describe() == build_allocation(number).describe()


@pytest.mark.parametrize("spec", ["pyramid(", "pyramid)", "(", "=", "pyramid(4)", "pyramid(beta=2, beta=3)", "a b"])
def test_a_text_that_is_no_allocation_is_called_one(spec):
    with pytest.raises(ConfigError, match=r"^allocation '.*, character [0-9]+: .*; write e\.g\. 'pyramid'"):
        build_allocation(spec)


def test_allocations_travel_with_plugins_vectors_and_search_spaces(tmp_path):
    manager = build(SPEC)
    load_vector(manager, np.array([1.0, 0.0, -1.0]))
    plugins.save(manager, tmp_path / "plug")
    again = plugins.load(tmp_path / "plug")
    assert again.describe() == manager.describe()
    assert to_vector(again).tolist() == [1.0, 0.0, -1.0]
    for layer in (0, 3):
        view = make_view(seed=layer, layer=layer)
        assert torch.equal(again.decide(view).keep, manager.decide(view).keep)
    config = {
        "name": "snapkv",
        "options": {"window": 8, "allocation": {"name": "depth_shares", "options": {"points": 3}}},
    }
    space = SearchSpace(SpaceConfig.model_validate({"manager": config, "weights": "all", "start": "zeros"}))
    assert space.dim == 3


@pytest.mark.parametrize("spec", [
    SPEC, "adakv(feature_scorer(features=[keydiff, age], allocation=3), budget=9)",
    "feature_scorer(features=[keydiff, age], budget=9, allocation=across_heads(layers=depth_shares(points=2)))",
    "kv_policy(features=[keydiff, age], budget=9, allocation=pyramid)",
    "feature_scorer(features=[keydiff, age], budget=9, allocation=threshold)",
])  # fmt: skip
def test_a_population_decides_as_each_alone(spec):
    rng, crowd = np.random.default_rng(0), [build(spec).requires_grad_(False) for _ in range(3)]
    for manager in crowd:
        load_vector(manager, rng.normal(size=len(to_vector(manager))))
    for layer in (0, 2):
        view = view_of(layer=layer)
        if any(name.startswith("window") for name in crowd[0].observes):
            view = make_view(layer=layer)
        rows = replace(
            view, keys=view.keys[:1].repeat(3, 1, 1, 1), values=view.values[:1].repeat(3, 1, 1, 1),
            slots=view.slots[:1].repeat(3, 1, 1), start=view.start[:1].repeat(3), memo={},
            recorded={k: v[:1].repeat(3, *[1] * (v.dim() - 1)) for k, v in view.recorded.items()},
        )  # fmt: skip
        together = PopulationPolicy(crowd).decide(rows).keep
        for place, manager in enumerate(crowd):
            assert torch.equal(together[place], manager.decide(rows).keep[place])


def test_an_allocation_of_ones_own():
    @register_allocation("all_to_the_first")
    class AllToTheFirst(LayerAllocation):
        """Gives the first layer everything."""

        def layer_limit(self, view, mean, ends, shares=None):
            return mean * view.layers if view.layer == 0 else torch.zeros_like(mean)

    try:
        manager = build("keydiff(budget=3, allocation=across_heads(layers=all_to_the_first))")
        kept = [int(manager.decide(view).keep.sum()) for view in full_views(3, 20, (0,), 2)]
        assert kept == [18, 0, 0]
        with pytest.raises(ConfigError, match="no subclass"):
            register_allocation("wrong")(dict)
    finally:
        del allocations._classes["all_to_the_first"]


def test_a_manager_that_says_it_as_before_is_told_how_now():
    for name in ("make_selection", "select", "own_allocation"):
        with pytest.raises(ConfigError, match=f"{name}.*built_in_allocation"):
            type("Old", (type(build("keydiff")),), {name: lambda self: None})


def test_across_heads_over_itself_is_exactly_what_adakv_says():
    assert isinstance(build("adakv(keydiff)").allocation, AcrossHeads)
    assert Fraction(1, 5) == Fraction(str(build("adakv(keydiff)").allocation.options.safeguard))


def test_what_changes_parameters_shapes_is_refused_and_spaces_choose_among_allocations():
    for spec, other in (
        ("keydiff(allocation=8,budget=7)", 4),
        ("keydiff(allocation=per_head_shares(points=4,heads=2),budget=7)", "per_head_shares(layers=3,heads=2)"),
    ):
        with pytest.raises(ConfigError, match="other parameters"):
            build(spec).with_options(allocation=other)
    with pytest.raises(ConfigError, match="budget: give a whole number"):
        build("keydiff", budget=True)
    with pytest.raises(ConfigError, match="give it to the scorer alone"):
        build("adakv(keydiff, allocation=per_head_shares(points=2,heads=2))", budget=7)
    choices = {"kind": "categorical", "choices": ["pyramid", "across_heads"]}
    config = {
        "manager": {"name": "snapkv", "options": {"budget": 8, "allocation": "pyramid"}},
        "options": {"allocation": choices},
        "weights": [],
    }
    space = SearchSpace(SpaceConfig.model_validate(config))
    assert {space.decode(np.eye(2)[i]).allocation.name for i in range(2)} == {"pyramid", "across_heads"}
