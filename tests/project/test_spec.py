"""The language of specs: what is written is read back, mistakes are named by their place, nothing is unbounded."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomem.errors import ConfigError
from evomem.managers import build as build_manager
from evomem.spec import DEPTH, LENGTH, format_call, format_settings, is_call, name_of, parse_call, parse_settings, split
from evomem.tasks import build as build_task
from evomem.tasks import parse as parse_task
from evomem.testing.models import tiny_tokenizer

NAMES = st.from_regex(r"[a-z_][a-z0-9_:.-]{0,8}", fullmatch=True)
PLAIN = (
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(max_size=9)
    | st.sampled_from(["None", "inf", "007", "1e5", "a b", "it's", '"', "''\"", "\\", "C:\\new", "", "٣", "[", "a,b"])
)  # fmt: skip
VALUES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.fixed_dictionaries({"name": NAMES, "options": st.dictionaries(NAMES, inner, max_size=3)})
    ),
    max_leaves=6,
)


@settings(max_examples=80, deadline=None)
@given(NAMES, st.dictionaries(NAMES, VALUES, max_size=4))
def test_what_is_written_is_read_back(name, options):
    found = parse_call(format_call(name, options), "manager", "x")
    assert (found.name, found.options) == (name, options)
    assert json.dumps(found.options, sort_keys=True) == json.dumps(options, sort_keys=True)  # 1 is not True, nor 1.0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=2)), max_size=4))
def test_lists_of_specs_are_split_between_them(pairs):
    specs = [format_call(name, options) for name, options in pairs]
    assert split(", ".join(specs)) == specs


@pytest.mark.parametrize("text", ["a(b='x,y'),c", 'a(b="(,"),c', "a(b=[1, 'it''s, so']), c"])
def test_commas_in_quotation_marks_split_nothing(text):
    assert len(split(text)) == 2


def test_calls_inside_calls_are_mappings():
    spec = "snapkv(allocation=pyramid(beta=20), window=8)"
    assert parse_call(spec, "manager", "x").options == {
        "allocation": {"name": "pyramid", "options": {"beta": 20}},
        "window": 8,
    }
    assert parse_call("a(b(c(1)), d=[e(), f])", "manager", "x").options == {
        "inner": {"name": "b", "options": {"inner": {"name": "c", "options": {"inner": 1}}}},
        "d": [{"name": "e", "options": {}}, "f"],
    }


@settings(max_examples=60, deadline=None)
@given(
    NAMES.filter(lambda name: ":" not in name),
    st.dictionaries(NAMES, st.from_regex(r"[^,\s=]{1,9}", fullmatch=True), max_size=3),
)
def test_settings_are_read_back_as_texts(name, options):
    found = parse_settings(format_settings(name, options), "task")
    assert (found.name, found.options) == (name, options)


@pytest.mark.parametrize(
    ("settings_", "call"),
    [
        ("passkey:length=150,haystack=noise", 'passkey(length=150, haystack="noise")'),
        ("passkey", "passkey()"),
        ("mqar:length=64,pairs=3", "mqar(pairs=3, length=64)"),
    ],
)
def test_tasks_have_two_spellings(settings_, call):
    mine, theirs = (build_task(spec, tiny_tokenizer()).describe() for spec in (settings_, call))
    assert mine == theirs


def test_a_main_option_needs_no_name():
    assert parse_task('file("a=b, c(1).jsonl", length=50)') == ("file", {"path": "a=b, c(1).jsonl", "length": 50})
    assert parse_task("file:a(1),b.jsonl,length=50") == ("file", {"path": "a(1),b.jsonl", "length": "50"})
    with pytest.raises(
        ConfigError, match=r"character 9: a value without the name of its option; write e\.g\. 'passkey:"
    ):
        parse_task("passkey(100)")


@pytest.mark.parametrize("text", ["passkey:a(b", "file:x(1)", " passkey : a"])
def test_the_first_mark_says_which_spelling_it_is(text):
    assert not is_call(text)
    assert name_of(text) in ("passkey", "file")


def test_what_has_no_end_is_refused():
    for opening, closing in (("a(", ")"), ("[", "]")):
        deep = "x(y=" + opening * DEPTH + "1" + closing * DEPTH + ")"
        with pytest.raises(ConfigError, match=f"more than {DEPTH} brackets"):
            parse_call(deep, "manager", "x")
    assert parse_call("a(" * DEPTH + "1" + ")" * DEPTH, "manager", "x").name == "a"
    for read in (build_manager, parse_task):
        with pytest.raises(ConfigError, match=rf"at most {LENGTH:,}") as caught:
            read("passkey" + "(" * 10**6)
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize("value", [{"a": 1}, {"name": "x"}, {"name": "a b", "options": {}}, object(), {1}])
def test_what_cannot_be_written_is_refused(value):
    with pytest.raises(ConfigError):
        format_call("x", {"y": value})


def test_numbers_that_are_none_are_still_numbers():
    assert math.isnan(parse_call("x(y=nan)", "manager", "x").options["y"])
    assert parse_call(format_call("x", {"y": -math.inf}), "manager", "x").options == {"y": -math.inf}
