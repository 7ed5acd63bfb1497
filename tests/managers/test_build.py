"""Specs of managers: texts and mappings say the same, and what is wrong with one is said."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomem import managers
from evomem.errors import ConfigError, UnknownNameError
from evomem.managers import build
from tests.managers.test_heuristics import SPECS, WRAPPED


def test_every_manager_has_a_summary_and_rebuilds():
    assert {s.partition("(")[0] for s in SPECS} | {"full", "adakv"} <= set(managers.names())
    for spec in SPECS + WRAPPED + ("full",):
        manager = build(spec, budget=0.25, every=7)
        assert managers.summary(manager.name)
        described = json.loads(json.dumps(manager.describe()))
        assert build(described).describe() == manager.describe()
        assert manager.with_options(budget=12).describe() == build(described, budget=12).describe()


@settings(deadline=None)
@given(
    window=st.integers(1, 500),
    safeguard=st.floats(0, 1),
    budget=st.one_of(st.none(), st.integers(1, 9999), st.floats(0.001, 1)),
    spaces=st.sampled_from(["", " ", "  "]),
)
def test_text_and_mapping_say_the_same(window, safeguard, budget, spaces):
    value = "none" if budget is None else repr(budget)
    text = f"adakv({spaces}snapkv(window={spaces}{window}),{spaces}safeguard={safeguard!r}, budget{spaces}={value})"
    manager = build(text)
    inner = {"name": "snapkv", "options": {"window": window}}
    assert manager.describe() == build("adakv", inner=inner, safeguard=safeguard, budget=budget).describe()
    assert manager.describe()["options"]["inner"]["options"]["window"] == window
    assert manager.options.budget == budget
    assert type(manager.options.budget) is type(budget)


def test_values_in_texts():
    text = "x(a=1, b=-2.5e-3, c=true, d=none, e='two words', f=[p, 3, q(r=1)], g=window_attention:32)"
    assert managers.parse(text) == {
        "name": "x",
        "options": {
            "a": 1,
            "b": -2.5e-3,
            "c": True,
            "d": None,
            "e": "two words",
            "f": ["p", 3, {"name": "q", "options": {"r": 1}}],
            "g": "window_attention:32",
        },
    }


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("snapkv(", "character 8"),
        ("snapkv(window=)", "character 15: expected a value"),
        ("snapkv(window=1", "expected ','"),
        ("snapkv(window=1, window=2)", "given twice"),
        ("snapkv)", "something follows"),
        ("snapkv('x)", "no partner"),
        ("", "name of a manager"),
        ("snapkv(window=0)", "window"),
        ("snapkv(kernel=4)", "odd"),
        ("snapkv(64)", "inner"),
        ("snapkv(width=3)", "width"),
        ("snapkv(budget=0)", "budget"),
        ("adakv(full)", "'full' does not rank"),
        ("adakv(adakv(knorm))", "'adakv' does not rank"),
        ("adakv(snapkv(budget=3))", "budget belongs to adakv"),
        ("adakv(inner=3)", "inner"),
        ({"name": "knorm", "option": {}}, "not of the form"),
        ({"options": {}}, "not of the form"),
        (3, "neither a text"),
    ],
)
def test_mistakes_are_explained(spec, says):
    with pytest.raises(ConfigError, match=says.replace("(", r"\(")):
        build(spec)


def test_unknown_names_are_corrected():
    for spec in ("snapvk", "adakv(snapvk)"):
        with pytest.raises(ConfigError, match="Did you mean 'snapkv'"):
            build(spec)
    with pytest.raises(UnknownNameError):
        build("nothing_like_it")
