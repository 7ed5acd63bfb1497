"""Run: an experiment read from YAML, by the path of a file or by its name in `experiments/`, and written as YAML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from evomem.errors import ConfigError
from evomem.files.reading import is_file, user_path
from evomem.runs.config import ExperimentConfig
from evomem.search_space.space import load_space
from evomem.validation import apply_settings, read_yaml, validate


def load_experiment(name: str | Path, settings: Iterable[str] = (), *, device: str | None = None) -> ExperimentConfig:
    """Return the experiment of a file or of a name in `experiments/`, with ``key=value`` settings applied.

    ``space`` may be the name of a file of `search_spaces/`, or a mapping with ``name`` and what to change in it. The
    setting ``space=NAME`` takes another space as it is; ``space.name=NAME`` keeps what the experiment changes in it.
    What the processor's defaults are is filled in (`ExperimentConfig.placed`). ``device`` is where the models run, in
    place of what the experiment says.

    Raises
    ------
    ConfigError : names file, field, value and the nearest valid key; a device does not exist.
    """
    path = user_path(name)
    if not is_file(path):
        from evomem.files.resources import resource_path

        path = resource_path("experiments", str(name))
    return parse_experiment(read_yaml(path), settings, str(path), device=device)


def parse_experiment(
    data: Mapping[str, Any], settings: Iterable[str] = (), where: str = "experiment", *, device: str | None = None
) -> ExperimentConfig:
    """Return the `ExperimentConfig` of plain values; see `load_experiment`."""
    settings = list(settings)
    # What is changed in a space is changed in what its file says, so that file comes first.
    first = [setting for setting in settings if setting.partition("=")[0].strip() in ("space", "space.name")]
    others = [setting for setting in settings if setting not in first]
    values = apply_settings({**data, "space": _named(data.get("space"))}, first)
    values["space"] = _resolve_space(_named(values["space"]), where)
    config = validate(ExperimentConfig, apply_settings(values, others), where)
    return (config if device is None else config.on(device)).placed()


def _named(space: Any) -> Any:
    return {"name": space} if isinstance(space, str) else space


def _resolve_space(space: Any, where: str) -> Any:
    if isinstance(space, dict) and "name" in space:
        if not isinstance(space["name"], str):
            raise ConfigError(f"{where}: space.name: {space['name']!r} is not the name of a search space")
        changes = {key: value for key, value in space.items() if key != "name"}
        return load_space(space["name"], changes).model_dump(mode="json")
    if space is None:
        raise ConfigError(f"{where}: space: is required and missing; name a file of search_spaces/")
    return space


def as_stored(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain values as they come back from `to_yaml`: tuples as lists, some ends of lines as blanks."""
    return {_as_stored(key): _as_stored(value) for key, value in data.items()}


def _as_stored(value: Any) -> Any:
    if isinstance(value, Mapping):
        return as_stored(value)
    if isinstance(value, str):
        return value if value.isprintable() else yaml.safe_load(to_yaml({"text": value}))["text"]
    return [_as_stored(part) for part in value] if isinstance(value, list | tuple) else value


def to_yaml(data: Mapping[str, Any]) -> str:
    """Return plain values as YAML, in the order in which the models declare them."""
    text: str = yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True, width=120)
    return text
