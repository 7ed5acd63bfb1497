"""Every number of every configuration has two bounds: all pydantic models of the package are walked."""

from __future__ import annotations

import importlib
import pkgutil
import types
import typing
from collections.abc import Iterator

import annotated_types
import pytest
from pydantic import BaseModel, ValidationError

import evomem
from evomem.errors import ConfigError
from evomem.managers.base import check_budget
from evomem.search_space.option_ranges import Integer

OTHERS = {"evomem.plugins.lm_eval", "evomem.plugins.kvpress"}
"""Modules that need another project's package, which is not installed here."""
CHECKED = {"budget", "budgets"}
"""Fields whose numbers a function of ours checks (`check_budget`), because the two kinds have other bounds."""


def models() -> list[type[BaseModel]]:
    for module in pkgutil.walk_packages(evomem.__path__, "evomem."):
        if module.name not in OTHERS and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found, waiting = [], [BaseModel]
    while waiting:
        for kind in waiting.pop().__subclasses__():
            waiting.append(kind)
            if kind.__module__.startswith("evomem."):
                found.append(kind)
    return list(dict.fromkeys(found))


def numbers(annotation: object, metadata: list[object]) -> Iterator[tuple[type, list[object]]]:
    """Yield every int or float that an annotation allows, with what constrains it."""
    origin = typing.get_origin(annotation)
    if annotation in (int, float):
        yield annotation, metadata  # type: ignore[misc]
    elif origin is typing.Annotated:
        inner, *more = typing.get_args(annotation)
        yield from numbers(inner, [*metadata, *more])
    elif origin in (typing.Union, types.UnionType):
        for part in typing.get_args(annotation):
            yield from numbers(part, metadata)
    elif origin is not None and origin is not typing.Literal:
        for part in typing.get_args(annotation):
            yield from numbers(part, [])


def bounds(metadata: list[object]) -> tuple[object, object]:
    parts = [part for one in metadata for part in (getattr(one, "metadata", None) or [one])]
    lower = [part for part in parts if isinstance(part, annotated_types.Ge | annotated_types.Gt)]
    upper = [part for part in parts if isinstance(part, annotated_types.Le | annotated_types.Lt)]
    return lower, upper


def test_every_number_of_every_configuration_has_both_bounds_and_is_finite():
    kinds, count, open_ended = models(), 0, []
    for kind in kinds:
        for name, field in kind.model_fields.items():
            for number, metadata in numbers(field.annotation, list(field.metadata)):
                count += 1
                lower, upper = bounds(metadata)
                if name not in CHECKED and not (lower and upper):
                    open_ended.append(f"{kind.__module__}.{kind.__name__}.{name}")
                if number is float and kind.model_config.get("allow_inf_nan") is not False:
                    open_ended.append(f"{kind.__module__}.{kind.__name__}.{name} takes NaN")
    assert not open_ended
    assert count > 150
    assert len(kinds) > 40


@pytest.mark.parametrize("budget", [0, -1, 10**12, 10**400, 0.0, 1.5, 1e300, float("nan"), float("inf"), True])
def test_budgets_have_bounds_of_their_own(budget):
    with pytest.raises(ConfigError, match="budget"):
        check_budget(budget)


def test_a_whole_option_does_not_list_all_numbers():
    with pytest.raises(ValidationError, match="more than"):
        Integer(kind="integer", low=0, high=10**9)
