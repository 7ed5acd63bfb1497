"""Search space: options inside options, named by a path: ``allocation.beta``, ``allocation.layers.beta``.

A manager's option may itself be described by a name and options (``{"name": "pyramid", "options": {"beta": 20}}``): an
allocation, or the manager inside another (``inner.window``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomem.errors import ConfigError
from evomem.managers.base import MemoryManager


def flattened(ranges: Mapping[str, Any]) -> dict[str, Any]:
    """Return ranges by path, of ranges that may be nested: ``{"allocation": {"beta": RANGE}}``, as settings make it.

    What is said of one range in both ways is merged, the later over the earlier.
    """
    flat: dict[str, Any] = {}
    for name, value in ranges.items():
        parts: Mapping[str, Any] = {str(name): value}
        if isinstance(value, Mapping) and _holds_ranges(value):
            parts = {f"{name}.{inner}": part for inner, part in flattened(value).items()}
        for path, part in parts.items():
            before = flat.get(path)
            flat[path] = {**before, **part} if isinstance(before, Mapping) and isinstance(part, Mapping) else part
    return flat


def _holds_ranges(value: Mapping[str, Any]) -> bool:
    return bool(value) and "kind" not in value and all(isinstance(part, Mapping) for part in value.values())


def option_value(manager: MemoryManager, path: str) -> Any:
    """Return the value of a manager's option.

    Raises
    ------
    ConfigError : the manager has no such option, or an option on the way is not described by a name and options.
    """
    name, *rest = path.split(".")
    _require(manager, path, name, type(manager.options).model_fields, f"manager {manager.name!r}")
    value = getattr(manager.options, name)
    at = name
    for inner in rest:
        if not is_described(value):
            raise ConfigError(
                f"search space: options.{path}: {at} of manager {manager.name!r} is {value!r}, which has no options of "
                f"its own; give the manager one that has, for example {at}: {{name: pyramid}}"
            )
        _require(manager, path, inner, value["options"], f"{at} {value['name']!r}")
        value, at = value["options"][inner], f"{at}.{inner}"
    return value


def changed_options(manager: MemoryManager, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `MemoryManager.with_options` takes, from values by path.

    Raises
    ------
    ConfigError : see `option_value`.
    """
    changes: dict[str, Any] = {}
    for path, value in values.items():
        option_value(manager, path)
        name, *rest = path.split(".")
        changes[name] = _with(changes.get(name, getattr(manager.options, name)), rest, value)
    return changes


def require_disjoint(paths: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if a path names an option and another one a part of it, which the first may take away."""
    for path in paths:
        for other in paths:
            if other.startswith(f"{path}."):
                raise ConfigError(
                    f"search space: options.{path} and options.{other}: {path} is replaced as a whole, and {other} is "
                    "a part of it; let one of them vary"
                )


def _with(described: Any, path: list[str], value: Any) -> Any:
    """Return a description with the value at a path within it replaced."""
    if not path:
        return value
    options = described["options"]
    return {**described, "options": {**options, path[0]: _with(options[path[0]], path[1:], value)}}


def is_described(value: Any) -> bool:
    """Whether an option's value is a name and options of its own."""
    return isinstance(value, Mapping) and set(value) == {"name", "options"} and isinstance(value["options"], Mapping)


def _require(manager: MemoryManager, path: str, name: str, known: Mapping[str, Any], what: str) -> None:
    if name not in known:
        raise ConfigError(
            f"search space: options.{path}: {what} has no such option; it has: {', '.join(sorted(known)) or 'none'}"
        )
