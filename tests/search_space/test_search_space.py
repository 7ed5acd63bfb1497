"""Search space: every vector is a manager, and back."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from evomem.errors import ConfigError
from evomem.files.resources import list_resources
from evomem.plugins import load, save
from evomem.search_space.option_ranges import Bounded, Categorical, Integer, Log, LogInteger
from evomem.search_space.space import SearchSpace, SpaceConfig, load_space
from evomem.validation import apply_settings, difference, parse_yaml, read_yaml, validate
from tests.support.synthetic_search import DIM

MIXED = {
    "manager": {"name": "toy", "options": {"budget": 5, "sinks": 3}},
    "weights": [{"match": "sec*", "scale": 0.25}, {"match": "first", "scale": 3.0}],
    "options": {
        "rate": {"kind": "bounded", "low": -1.0, "high": 2.0, "scale": 0.5},
        "sinks": {"kind": "integer", "low": 0, "high": 6},
        "mode": {"kind": "categorical", "choices": ["hard", "soft", "none"]},
    },
}


def space(**changes) -> SearchSpace:
    return SearchSpace(validate(SpaceConfig, {**MIXED, **changes}, "test"))


def weights(manager) -> np.ndarray:
    return torch.cat([p.detach().reshape(-1) for p in manager.parameters()]).numpy()


vectors = arrays(np.float64, DIM + 5, elements=st.floats(-1e6, 1e6))


@given(vectors)
@settings(max_examples=60)
def test_every_vector_decodes_and_comes_back_as_the_same_manager(vector):
    mixed = space()
    assert mixed.dim == len(vector)
    manager = mixed.decode(vector)
    assert -1.0 <= manager.options.rate <= 2.0
    assert 0 <= manager.options.sinks <= 6
    again = mixed.decode(mixed.encode(manager))
    assert np.array_equal(weights(again), weights(manager))
    assert again.options.sinks == manager.options.sinks
    assert again.options.mode == manager.options.mode
    assert again.options.rate == pytest.approx(manager.options.rate, abs=1e-6)
    expected = vector[:DIM] * np.array([3.0] * 4 + [0.25] * 2)
    assert np.array_equal(weights(manager), expected.astype(np.float32))


@given(arrays(np.float64, DIM, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_weights_of_scale_one_are_the_vector(vector):
    plain = space(weights="all", options={})
    assert np.array_equal(plain.encode(plain.decode(vector)), vector)


@given(st.floats(-50, 50), st.floats(1e-6, 0.1), st.floats(0.1, 4))
def test_a_bounded_option_is_never_steeper_than_half_pi(x, step, scale):
    option = Bounded(kind="bounded", low=-2, high=6, scale=scale)
    here, there = option.decode(np.array([x])), option.decode(np.array([x + step]))
    assert abs(there - here) <= 8 * scale * step * math.pi / 2 + 1e-9


@given(st.floats(0, 1))
def test_numbers_round_trip(share):
    bounded, log = Bounded(kind="bounded", low=-2, high=6), Log(kind="log", low=1e-5, high=10)
    for option, value in ((bounded, -2 + 8 * share), (log, 1e-5 * 1e6**share)):
        value = min(option.high, value)
        back = option.decode(option.encode(value))
        assert back == pytest.approx(value, rel=1e-6, abs=1e-6)
        assert option.low <= back <= option.high


def test_both_ends_are_reached_and_integers_get_equal_parts():
    bounded = Bounded(kind="bounded", low=-2, high=6)
    assert [bounded.decode(np.array([x])) for x in (0.0, 1.0, 2.0)] == [-2, 6, -2]
    integer = Integer(kind="integer", low=-1, high=3)
    values = [integer.value(share) for share in np.linspace(0, 1, 1001)]
    counts = [values.count(value) for value in range(-1, 4)]
    assert sum(counts) == 1001
    assert max(counts) - min(counts) <= 1
    assert [integer.decode(integer.encode(v)) for v in range(-1, 4)] == list(range(-1, 4))
    choice = Categorical(kind="categorical", choices=["a", None, 3])
    assert [choice.decode(choice.encode(v)) for v in ("a", None, 3)] == ["a", None, 3]


@given(st.integers(1, 60), st.integers(1, 900), st.floats(0.3, 3))
def test_whole_numbers_on_a_logarithmic_scale(low, more, scale):
    option = LogInteger(kind="log_integer", low=low, high=low + more, scale=scale)
    numbers = range(low, low + more + 1)
    assert [option.decode(option.encode(n)) for n in numbers] == list(numbers)
    assert [option.decode(np.array([x / scale])) for x in (0.0, 1.0)] == [low, low + more]
    # Between the numbers' codes lie no others, and the share of n is log((n + 1) / n).
    shares = np.linspace(0, 1, 2001)
    found = np.array([option.value(share) for share in shares])
    assert (np.diff(found) >= 0).all()
    middle = (low + low + more) // 2
    assert np.mean(found <= middle) == pytest.approx(
        math.log((middle + 1) / low) / math.log((low + more + 1) / low), abs=2e-3
    )


def test_what_does_not_vary_stays():
    part = space(weights=[{"match": "second"}], options={})
    with torch.no_grad():
        part.template.mean.fill_(7.0)
    manager = part.decode(np.ones(part.dim))
    assert part.dim == 2
    assert torch.equal(manager.first, part.template.first)
    assert torch.equal(manager.mean, torch.full((2,), 7.0))
    assert manager.options == part.template.options
    assert part.template.second.eq(0).all()


def test_random_initial_weights_are_always_the_same_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    assert np.array_equal(space().start, space().start)
    assert torch.equal(before, torch.get_rng_state())


def test_starts(tmp_path):
    assert np.array_equal(space(start="zeros").start[:DIM], np.zeros(DIM))
    by_name = space(start={"parameters": {"sec*": 2.0}})
    assert np.array_equal(weights(by_name.decode(by_name.start)), [0, 0, 0, 0, 2, 2])
    imitated = space(start={"heuristic": "ones"})
    assert np.array_equal(weights(imitated.decode(imitated.start))[:4], np.ones(4))
    save(imitated.decode(np.linspace(0, 1, DIM + 5)), tmp_path / "plugin", {})
    continued = space(start={"plugin": str(tmp_path / "plugin")})
    assert np.allclose(continued.start, imitated.encode(load(tmp_path / "plugin")), atol=1e-12)
    vector = np.linspace(-1, 1, DIM + 5)
    np.save(tmp_path / "v.npy", vector)
    for source in (vector.tolist(), str(tmp_path / "v.npy")):
        assert np.array_equal(space(start={"vector": source}).start, vector)
    shaken, again = (space(start={"parameters": {"sec*": 2.0}, "noise": 0.1}) for _ in range(2))
    moved = weights(shaken.decode(shaken.start)) - weights(by_name.decode(by_name.start))
    assert np.array_equal(shaken.start, again.start)
    assert 0.01 < np.abs(moved).mean() < 0.3
    assert len(set(moved)) == len(moved)
    # Options start at the manager's own values, or where the space says.
    own = space()
    decoded = own.decode(own.start).options
    assert (decoded.sinks, decoded.mode, decoded.budget) == (3, "soft", 5)
    assert decoded.rate == pytest.approx(0.5, abs=1e-12)
    options = {"sinks": {"kind": "integer", "low": 0, "high": 6, "start": 5}}
    told = space(options=options)
    assert told.decode(told.start).options.sinks == 5


def test_a_resumed_space_is_the_same():
    first = space(start={"parameters": {"*": 0.5}})
    again = SearchSpace(first.config, first.template.state_dict())
    vector = np.linspace(0, 1, first.dim)
    assert np.array_equal(weights(first.decode(vector)), weights(again.decode(vector)))
    assert np.array_equal(first.start, again.start)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": [{"match": "nothing*"}]}, "no parameter of 'toy' matches 'nothing"),
        ({"weights": "none", "options": {}}, "nothing that varies"),
        (
            {"options": {"rte": {"kind": "bounded", "low": 0, "high": 1}}},
            "options.rte: manager 'toy' has no such option",
        ),
        ({"options": {"rate": {"kind": "bounded", "low": 1, "high": 0}}}, "low 1.0 must be below high"),
        ({"options": {"rate": {"kind": "log", "low": 0, "high": 1}}}, "must be above 0"),
        ({"options": {"sinks": {"kind": "integer", "low": 0.5, "high": 3}}}, "whole number"),
        ({"options": {"sinks": {"kind": "log_integer", "low": 0, "high": 3}}}, "at least 1"),
        ({"options": {"sinks": {"kind": "log_integer", "low": 1, "high": 3.5}}}, "whole number"),
        ({"options": {"rate": {"kind": "bounded", "low": 1, "high": 2}}}, "options.rate: 0.5 is outside"),
        ({"start": {"vector": [1.0]}}, "vector of 11 numbers is expected"),
        ({"start": {"vector": "nowhere.npy"}}, "nowhere.npy"),
        ({"start": {"vector": [1.0], "heuristic": "x"}}, "exactly one"),
        ({"manager": {"name": "keydiff"}, "weights": "all", "options": {}}, "nothing that varies"),
        ({"manager": {"name": "toi"}}, "Did you mean 'toy'"),
        ({"manger": {}}, "did you mean 'manager'"),
    ],
)
def test_errors_say_where(changes, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        space(**changes)


def test_vectors_and_managers_of_another_kind_are_refused():
    mixed = space()
    for bad in (np.zeros(3), np.full(mixed.dim, np.nan)):
        with pytest.raises(ConfigError, match="vector"):
            mixed.decode(bad)
    from evomem.managers import build

    with pytest.raises(ConfigError, match="is of Toy"):
        mixed.encode(build("keydiff"))
    with pytest.raises(ConfigError, match="cannot start from a heuristic"):
        SearchSpace(load_space("namm_linear", {"start": {"heuristic": "keydiff"}}))


def test_every_space_that_comes_along_can_be_searched():
    for name in list_resources("search_spaces"):
        found = SearchSpace(load_space(name))
        manager = found.decode(found.start)
        assert np.allclose(found.encode(manager), found.start, atol=1e-6)
        found.decode(found.start + np.random.default_rng(0).standard_normal(found.dim))


def test_yaml_keys_twice_numbers_and_settings(tmp_path):
    with pytest.raises(ConfigError, match="'a' is given twice"):
        parse_yaml("a: 1\na: 2", "here")
    assert parse_yaml("{a: 1e-3, b: '1e-3', c: e}", "here") == {"a": 1e-3, "b": "1e-3", "c": "e"}
    data = {"a": {"b": [1, {"c": 2}]}}
    changed = apply_settings(data, ["a.b.1.c=[1, x]", "a.d.e=1e3"])
    assert changed == {"a": {"b": [1, {"c": [1, "x"]}], "d": {"e": 1000.0}}}
    assert data == {"a": {"b": [1, {"c": 2}]}}
    assert difference(data, changed) == ["a.b.1.c: 2 -> (absent)", "a.b.1.c.0: (absent) -> 1",
                                         "a.b.1.c.1: (absent) -> 'x'", "a.d.e: (absent) -> 1000.0"]  # fmt: skip
    for setting in ("a", "a.b.7=1", "a.b.x=1", "a.b.0.c=1", "a=: :"):
        with pytest.raises(ConfigError, match="setting"):
            apply_settings(data, [setting])
    with pytest.raises(ConfigError, match="no parts; set it itself, model=VALUE"):
        apply_settings({"model": "zoo-qwen3"}, ["model.name=zoo-gpt2"])
    for text in (b"[1, 2]", b"a: [", b"\xff"):
        (tmp_path / "f.yaml").write_bytes(text)
        with pytest.raises(ConfigError, match=r"f\.yaml"):
            read_yaml(tmp_path / "f.yaml")
