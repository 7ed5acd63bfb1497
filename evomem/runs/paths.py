"""Run: paths of an experiment, made absolute when a run is made, so that it does not matter where it is resumed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from evomem.errors import EvomemError
from evomem.runs.config import ExperimentConfig
from evomem.runs.experiment_parts import TaskConfig
from evomem.runs.inputs import names_a_file
from evomem.search_space.start import Start
from evomem.spec import format_call, format_settings, is_call
from evomem.tasks import parse, tasks
from evomem.validation import read_yaml


def resolve_paths(config: ExperimentConfig, base: str | None = None) -> ExperimentConfig:
    """Return an experiment whose relative paths begin at a folder, by default the one that the process works in.

    Paths of question files and essays, of trace folders, and of what a search starts from. What may be the name of a
    repository or of a model instead is left as it is, unless there is such a folder. The folder is noted (``base``) if
    there is such a path.
    """
    folder = base or config.base or os.getcwd()
    stages = config.stages and [
        stage.model_copy(update={"tasks": stage.tasks and [_task(task, folder) for task in stage.tasks]})
        for stage in config.stages
    ]
    start: Any = config.space.start
    if isinstance(start, Start):
        plugin = None if start.plugin is None else str(start.plugin)
        vector = _absolute(start.vector, folder) if isinstance(start.vector, str) else start.vector
        if plugin is not None and Path(_absolute(plugin, folder)).exists():
            plugin = _absolute(plugin, folder)
        start = start.model_copy(update={"plugin": plugin, "vector": vector})
    changed = config.model_copy(
        update={
            "tasks": [_task(task, folder) for task in config.tasks],
            "stages": stages,
            "traces": [_absolute(traces, folder) for traces in config.traces],
            "space": config.space.model_copy(update={"start": start}),
        }
    )
    return changed.model_copy(update={"base": folder}) if changed != config else config


def base_of(folder: Path) -> str | None:
    """Return the folder that the relative paths of a run began at when it was made; None if it is not known."""
    try:
        base = read_yaml(folder / "config.yaml").get("base")
    except EvomemError:  # nothing there yet, or it is damaged, which is said elsewhere
        return None
    return base if isinstance(base, str) else None


def _task(task: TaskConfig, folder: str) -> TaskConfig:
    try:
        name, given = parse(task.spec)
        kind: Any = tasks.get(name)
    except EvomemError:  # no task of the registry: the bench makes it, or says what is wrong
        return task
    mine, theirs = (
        {key: _option(kind, key, value, folder) for key, value in part.items()} for part in (given, task.options)
    )
    changed: dict[str, Any] = {}
    if mine != given:
        changed["spec"] = (
            format_call(name, mine)
            if is_call(task.spec)
            else format_settings(name, mine, getattr(kind, "main_option", None))
        )
    if theirs != task.options:
        changed["options"] = theirs
    return task.model_copy(update=changed) if changed else task


def _option(kind: Any, option: str, value: Any, folder: str) -> Any:
    return _absolute(value, folder) if isinstance(value, str) and value and names_a_file(kind, option) else value


def _absolute(path: str, folder: str) -> str:
    """Return a path as it is meant in a folder; links are left, which may be meant to lead elsewhere later."""
    return os.path.normpath(os.path.join(folder, os.path.expanduser(path)))
