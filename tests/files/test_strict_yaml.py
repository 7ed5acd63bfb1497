"""YAML of users: bombs, dates, tags, long numbers: plain values come out, or an error that says where."""

from __future__ import annotations

import contextlib
import json
import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from evomem.errors import ConfigError
from evomem.files import strict_yaml
from evomem.files.strict_yaml import YamlError, parse
from evomem.validation import apply_settings, read_yaml

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LAUGHS, "stands for more than"),
        ("a: &a [*a]", "refers to what it is part of"),
        ("a: &a {b: {c: *a}}", "refers to what it is part of"),
        ("[" * 5000, "nested more than"),
        ("a: " + "9" * 5000, "5,000 characters"),
        ("a: 0x" + "f" * 5000, "5,002 characters"),
        ("a: !!int x", "no number"),
        ("a: !!int [1]", "int"),
        ("a: !!float x", "no number"),
        ("a: !!bool x", "neither true nor false"),
        ("a: !!timestamp x", "timestamp"),
        ("a: !!timestamp 2024-05-01", "timestamp"),
        ("a: !!binary aGk=", "binary"),
        ("a: !!set {x}", "set"),
        ("a: !!map [1]", "map"),
        ("a: !!seq {b: 1}", "seq"),
        ("a: !!python/object/apply:os.system [x]", "python"),
        ("? [a]\n: 1", "a key is"),
        ("a: 1\na: 2", "given twice"),
        ("1: a\n1.0: b", "given twice"),
        ('a: "\\ud800"', "half a character"),
        ('a: "\\0"', "NUL"),
        ("a: \x01", "special characters"),
        ("a: 1\n---\nb: 2", "single document"),
        ("*nothing", "undefined alias"),
    ],
)
def test_what_no_configuration_says_is_refused(text, said):
    with pytest.raises(YamlError, match=said):
        parse(text)


def test_a_long_list_is_not_even_read_to_its_end(monkeypatch):
    monkeypatch.setattr(strict_yaml, "NODES", 100)
    assert len(parse("- 1\n" * 99)) == 99
    with pytest.raises(YamlError, match="more than 100 values"):
        parse("- 1\n" * 100 + "- [")


def test_what_people_write_is_read():
    text = """
    date: 2024-05-01
    when: 2001-12-14 21:59:43
    rate: 1e-3
    shared: &s [1, 2]
    again: *s
    none: null
    yes_: true
    text: 'no'
    """
    assert parse(text) == {
        "date": "2024-05-01", "when": "2001-12-14 21:59:43", "rate": 0.001, "shared": [1, 2], "again": [1, 2],
        "none": None, "yes_": True, "text": "no",
    }  # fmt: skip
    assert parse("") is None


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**300), 10**300) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cc", "Nd"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abcé -:#", min_size=1), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=100)
@given(PLAIN)
def test_plain_values_come_back_as_they_were(value):
    assert parse(yaml.safe_dump(value, allow_unicode=True)) == value


WORDS = st.sampled_from(
    ["a", "&a", "*a", "!!int", "!!set", "!x", "- ", "? ", ": ", "{", "}", "[", "]", ",", "|", ">", "'", '"', "\n", "  ",
     "\t", "#", "%", "@", "`", "---", "...", "1e9", "9" * 400, ".nan", "0x", "1:2", "<<", "2024-01-01", "\\", "\0", "²"]
)  # fmt: skip


@settings(max_examples=300)
@given(st.lists(WORDS, max_size=25).map("".join) | st.text(max_size=60))
def test_any_text_is_plain_values_or_an_error(text):
    with contextlib.suppress(YamlError):
        json.dumps(parse(text))


def test_files_that_are_none(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    (tmp_path / "list.yaml").write_text("- 1")
    (tmp_path / "number.yaml").write_text("1: 2")
    (tmp_path / "large.yaml").write_text("#" * (2 << 20))
    for name in ("folder", "latin", "list", "number", "large", "absent", "nul\0", "x" * 300):
        with pytest.raises(ConfigError):
            read_yaml(tmp_path / f"{name}.yaml")
    with pytest.raises(ConfigError, match="device"):
        read_yaml(type(tmp_path)("/dev/zero"))


@pytest.mark.parametrize(
    "setting",
    ["a.²=1", "l.²=1", "l.99999999999999999999=1", f"{'a.' * 100}b=1", "=1", "a", "a={", f"a={'9' * 5000}", "l.x=1"],
)
def test_settings_that_are_none(setting):
    if setting == "a.²=1":
        assert apply_settings({}, [setting]) == {"a": {"²": 1}}
        return
    with pytest.raises(ConfigError, match="setting"):
        apply_settings({"l": [1, 2]}, [setting])


def test_a_number_beyond_all_floats_is_infinite_and_no_setting_takes_it():
    assert math.isinf(parse("1e400"))
