"""Memory: what differs between versions of transformers: the name of a cache; and the versions that were tested.

A cache is called `past_key_values`, and `cache` from version 5.24 on; the older name is gone from `forward` in 5.40,
and from `generate` in 6. Models of other people may know one or the other, whatever the version.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from functools import cache as remembered
from typing import Any

OLD, NEW = "past_key_values", "cache"
RENAMED = (5, 24)
OLDEST, NEWEST = (5, 17), (5, 24)
"""Versions that `make test-transformers` was run with, and whatever lies between them."""


def passed(cache: Any, model: Any = None) -> dict[str, Any]:
    """Return a cache as the keyword argument of a model's `forward`, or of `generate` without a model."""
    return {_default() if model is None else _of_forward(type(model).forward): cache}


def argument() -> str:
    """Return what a user of the installed transformers writes to pass a cache: ``cache=cache``, say."""
    return f"{_default()}=cache"


def given(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among the keyword arguments of a call, under either name; None if there is none."""
    return next((arguments[name] for name in (NEW, OLD) if arguments.get(name) is not None), None)


def returned(output: Any) -> Any:
    """Return the cache that a model's output holds; None if it holds none."""
    return getattr(output, NEW if hasattr(output, NEW) else OLD, None)


def as_output(cache: Any, kind: type) -> dict[str, Any]:
    """Return a cache as the keyword argument of an output class of transformers."""
    return {NEW if NEW in inspect.signature(kind).parameters else OLD: cache}


@remembered
def warn_untested() -> None:
    """Warn, once, of a transformers that is newer than any that evomem was tested with."""
    if (there := _installed()) > NEWEST:
        warnings.warn(
            f"transformers {there[0]}.{there[1]} is newer than {NEWEST[0]}.{NEWEST[1]}, the newest that evomem was "
            "tested with: run evomem.testing.conformance on your model, or install an older one",
            stacklevel=2,
        )


@remembered
def _of_forward(forward: Callable[..., Any]) -> str:
    """Return the name that a class of models takes; a wrapper that passes everything on takes transformers' own."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in (NEW, OLD) if name in parameters), _default())


def _default() -> str:
    """Return the name that the installed transformers uses."""
    return NEW if _installed() >= RENAMED else OLD


@remembered
def _installed() -> tuple[int, ...]:
    import transformers

    return tuple(int(part) for part in transformers.__version__.split(".")[:2])
