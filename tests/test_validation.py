"""Errors about a field of several types name the field once, as its user wrote it, with what each type wants."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from pydantic import Field

from evomem.errors import ConfigError
from evomem.validation import Settings, validate


class Several(Settings):
    """Fields of several types."""

    allocation: Annotated[int, Field(ge=0)] | dict[str, Any] | None = None
    budget: int | float | None = None
    names: list[int | str] = Field(default=[])
    options: dict[str, int | float] = Field(default={})


@pytest.mark.parametrize(
    ("given", "lines"),
    [
        (
            {"allocation": -3},
            ["allocation: Input should be greater than or equal to 0, or a valid dictionary (got -3)"],
        ),
        ({"budget": float("nan")}, ["budget: Input should be a finite number (got nan)"]),
        ({"names": [1, [2]]}, ["names.1: Input should be a valid integer, or a valid string (got [2])"]),
        ({"allocation": -3, "names": [None]}, ["allocation: Input should be", "names.0: Input should be"]),
        ({"options": {"int": "a", "b": "a"}}, ["options.int: Input should be", "options.b: Input should be"]),
    ],
)
def test_a_field_of_several_types_is_one_line(given, lines):
    """No name of pydantic's for an alternative (``constrained-int``) is in a line, and no line comes twice."""
    with pytest.raises(ConfigError) as caught:
        validate(Several, given, "a.yaml")
    found = str(caught.value).split("\n")
    assert len(found) == len(lines)
    for line, begins in zip(found, lines, strict=True):
        assert line.startswith(f"a.yaml: {begins}")
        assert "constrained" not in line
        assert "dict[" not in line


def test_a_value_of_either_type_is_taken():
    """Alternatives still count one by one, also under names that look like types."""
    assert validate(Several, {"allocation": 3, "options": {"int": 3}}, "a.yaml").options == {"int": 3}
