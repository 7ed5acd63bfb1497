"""Base: how YAML becomes a validated configuration, with errors that name file, field, value and what was meant."""

from __future__ import annotations

import copy
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from evomem.errors import ConfigError
from evomem.files import strict_yaml
from evomem.files.reading import TEXT, read_text
from evomem.files.strict_json import shown

M = TypeVar("M", bound=BaseModel)


class Settings(BaseModel):
    """Base of every configuration model: immutable, and a key that nothing reads is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML, see `evomem.files.strict_yaml`; raise `ConfigError` naming ``where`` with line and column."""
    try:
        return strict_yaml.parse(text)
    except strict_yaml.YamlError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; raise `ConfigError` otherwise."""
    data = parse_yaml(read_text(path, TEXT, ConfigError), str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a mapping of settings is expected, this is {type(data).__name__}")
    for key in data:
        if not isinstance(key, str):
            raise ConfigError(f"{path}: {key!r}: names of settings are texts")
    return data


def apply_settings(data: Mapping[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """Return a copy of ``data`` with ``key=value`` settings applied; keys are dotted, values are YAML.

    A number in a key picks an element of a list (``tasks.0.length=1000``). Missing mappings on the way are made.
    """
    result = copy.deepcopy(dict(data))
    for setting in settings:
        if len(setting) > TEXT:
            raise ConfigError(f"setting {shown(setting)!r}: has {len(setting):,} characters; write it into a file")
        key, mark, text = setting.partition("=")
        if not mark or not key.strip():
            raise ConfigError(f"setting {shown(setting)!r}: write it as key=value, for example driver.population=32")
        path = key.strip().split(".")
        if len(path) > strict_yaml.DEPTH:
            raise ConfigError(f"setting {shown(setting)!r}: at most {strict_yaml.DEPTH} names with dots between them")
        _assign(result, path, parse_yaml(text, f"setting {shown(setting)!r}"), shown(setting))
    return result


def _assign(data: dict[str, Any], path: list[str], value: Any, setting: str) -> None:
    node: Any = data
    for place, key in enumerate(path):
        last = place == len(path) - 1
        if isinstance(node, list):
            if not (key.isascii() and key.isdigit() and len(key) < 10) or int(key) >= len(node):
                raise ConfigError(
                    f"setting {setting!r}: {'.'.join(path[:place])} is a list of {len(node)}; {key!r} is none of them"
                )
            if last:
                node[int(key)] = value
            else:
                node = node[int(key)]
        elif isinstance(node, dict):
            if last:
                node[key] = value
            else:
                if node.get(key) is None:
                    if path[place + 1].isdecimal():
                        whole = ".".join(path[: place + 1])
                        raise ConfigError(
                            f"setting {setting!r}: there is no list {whole} whose element {path[place + 1]} could be "
                            f"set; give it whole, for example {whole}=[{{...}}]"
                        )
                    node[key] = {}
                node = node[key]
        else:
            whole = ".".join(path[:place])
            raise ConfigError(
                f"setting {setting!r}: {whole} is {node!r}, which has no parts; set it itself, {whole}=VALUE"
            )


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``changes`` laid over it, mappings merged key by key, everything else replaced."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def validate(model: type[M], data: Any, where: str) -> M:
    """Return the validated model; raise `ConfigError` with a line per fault: file, field, value, nearest valid key."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {fault}" for fault in faults(error, model))) from None


def faults(error: ValidationError, model: type[BaseModel], whole: str = "settings") -> list[str]:
    """Return one line per fault of a validated model: field, what is wrong, value, nearest valid key.

    Every error of pydantic that a user reads is worded here. Names and values may be a stranger's: they are shortened,
    and control characters are escaped.

    Parameters
    ----------
    whole : what a fault is of that is of no field.
    """
    alternatives: dict[tuple[str, str], list[Any]] = {}
    for number, fault in enumerate(error.errors()):
        location = tuple(str(part) for part in fault["loc"])
        if location and _BRANCH.fullmatch(location[-1]):  # one value, no alternative of which it is
            alternatives.setdefault((".".join(location[:-1]), repr(fault["input"])), []).append(fault)
        else:
            alternatives[(".".join(location), str(number))] = [fault]
    return list(dict.fromkeys(_explain(_joined(same), model, whole) for same in alternatives.values()))


_BRANCH = re.compile(r"(constrained-)?(int|float|str|bool|none)|(dict|list|tuple|set)\[.*\]")
"""How pydantic names an alternative of a field (``int | dict | None``) in a location; no name that a user gave."""


def _joined(same: list[Any]) -> Any:
    """Return the faults of a field's alternatives as one, whose message has all of theirs."""
    if len(same) == 1 and not (same[0]["loc"] and _BRANCH.fullmatch(str(same[0]["loc"][-1]))):
        return same[0]
    first, *others = dict.fromkeys(fault["msg"].removeprefix("Value error, ") for fault in same)
    more = "".join(f", or {message.removeprefix('Input should be ')}" for message in others)
    return {**same[0], "loc": same[0]["loc"][:-1], "msg": first + more}


def _explain(fault: Any, model: type[BaseModel], whole: str) -> str:
    location = [str(part) for part in fault["loc"]]
    field = shown(".".join(location), 200)
    if fault["type"] == "extra_forbidden":
        known = sorted(_keys_at(model, location[:-1]))
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"{field}: unknown key; {hint}Known here: {', '.join(known)}"
    if fault["type"] == "missing":
        return f"{field}: is required and missing"
    message = fault["msg"].removeprefix("Value error, ")
    value = repr(fault["input"])
    return f"{field or whole}: {message} (got {value if len(value) <= 100 else value[:97] + '...'})"


def _keys_at(model: type[BaseModel], location: list[str]) -> set[str]:
    """Return the keys that are valid at a location of a (nested) model."""
    models: list[type[BaseModel]] = [model]
    for part in location:
        inner: list[type[BaseModel]] = []
        for candidate in models:
            if part in candidate.model_fields:
                inner += _models_in(candidate.model_fields[part].annotation)
        # list indices and the tags of unions are parts of a location too, and change nothing here
        models = inner or models
    return {key for candidate in models for key in candidate.model_fields}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for part in typing.get_args(annotation) for model in _models_in(part)]


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings and lists as one mapping from dotted keys to plain values."""
    if isinstance(data, Mapping) and data:
        parts = [(str(key), value) for key, value in data.items()]
    elif isinstance(data, list) and data:
        parts = [(str(place), value) for place, value in enumerate(data)]
    else:
        return {prefix: data}
    flat: dict[str, Any] = {}
    for key, value in parts:
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else key))
    return flat


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one line per dotted key whose value differs: ``key: old -> new``."""
    before, after = flatten(old), flatten(new)
    lines = []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key, ...) != after.get(key, ...):
            lines.append(f"{key}: {_shown(before, key)} -> {_shown(after, key)}")
    return lines


def _shown(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "(absent)"
