"""Run: what a search reads from outside its folder, by content: question files, trace folders, starts, packages.

The digests are part of the resolved configuration (``inputs``). So a run that is resumed, and a manager that is
measured again on the tasks of its search, find out that a file is no longer what it was.
"""

from __future__ import annotations

import hashlib
import stat
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomem import drivers
from evomem.errors import ConfigError, EvomemError, RunError
from evomem.evaluation.traces.store import MANIFEST
from evomem.files.reading import user_path
from evomem.managers.base import managers
from evomem.runs.config import ExperimentConfig
from evomem.runs.experiment_parts import TaskConfig
from evomem.search_space.start import Start
from evomem.tasks import parse, tasks

if TYPE_CHECKING:
    from evomem.runs.run import Run

START = "start"
"""How the names of inputs begin that a run keeps a copy of: it goes on with the copy, whatever becomes of them."""

_MISSING = "missing"
_FILES = ("path", "file", "essay")
"""What an option is called that names a file."""


def inputs_of(config: ExperimentConfig) -> dict[str, str]:
    """Return the digest of every input from outside, by what it is and where: ``task file PATH``, ``traces FOLDER``.

    Files that are not there are left out: who reads them says so. Packages (of other people's tasks, managers and
    drivers) have their version and the digest of the module.
    """
    digests = dict(_inputs(config))
    return {name: digests[name] for name in sorted(digests) if digests[name] != _MISSING}


def _inputs(config: ExperimentConfig) -> Iterator[tuple[str, str]]:
    for stage in config.plan():
        for task in stage.tasks:
            yield from task_inputs(task)
        yield from _package("driver", stage.driver.name, drivers.drivers)
    yield from _package("manager", config.space.manager.name, managers)
    for traces in config.traces:
        yield f"traces {traces}", _digest(user_path(traces) / MANIFEST)
    start = config.space.start
    if isinstance(start, Start) and start.plugin is not None:
        folder = Path(start.plugin)
        yield f"{START} plug-in {folder}", _digest(folder / "config.json", folder / "model.safetensors")
    if isinstance(start, Start) and isinstance(start.vector, str):
        yield f"{START} vector {start.vector}", _digest(Path(start.vector))


def task_inputs(task: TaskConfig) -> Iterator[tuple[str, str]]:
    """Yield the inputs of one task: files that its options name, and the package that it comes from."""
    try:
        name, given = parse(task.spec)
        kind: Any = tasks.get(name)
    except EvomemError:  # no task of the registry: the bench makes it, or says what is wrong
        return
    yield from _package("task", name, tasks)
    for option, value in {**task.options, **given}.items():
        if isinstance(value, str) and value and names_a_file(kind, option):
            yield f"task {name} {value}", _digest(user_path(value))


def names_a_file(kind: Any, option: str) -> bool:
    """Whether an option of a task's class is the path of a file."""
    return option == getattr(kind, "main_option", None) or any(word in option for word in _FILES)


def _package(what: str, name: str, registry: Any) -> Iterator[tuple[str, str]]:
    """Yield the package of a class that is registered by another distribution than ours."""
    try:
        kind = registry.get(name)
    except EvomemError:
        return
    module = kind.__module__
    root = module.partition(".")[0]
    if root in ("evomem", "__main__"):
        return
    for distribution in _distributions().get(root, ())[:1]:
        file = getattr(sys.modules.get(module), "__file__", None)
        code = _digest(Path(file)) if file else _MISSING
        yield f"{what} {name} of package {distribution}", f"{version(distribution)} {code}"


@cache
def _distributions() -> Mapping[str, list[str]]:
    return packages_distributions()


def _digest(*paths: Path) -> str:
    """Return the SHA-256 of regular files, one after the other; `_MISSING` if one is none or cannot be read."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                return _MISSING
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except (OSError, ValueError):  # ValueError: a name with NUL
            return _MISSING
    return digest.hexdigest()


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return a line per input that is no longer what it was; inputs that had no digest are not among them."""
    return [
        f"{name}: {digest} -> {now.get(name, 'is not there')}"
        for name, digest in sorted(before.items())
        if now.get(name) != digest
    ]


def pinned(config: ExperimentConfig) -> ExperimentConfig:
    """Return an experiment with the digests of its inputs.

    Raises
    ------
    ConfigError : it has some already (the resolved configuration of another run), and they are others.
    """
    now = inputs_of(config)
    lines = changes(config.inputs, now)
    if lines:
        raise ConfigError(
            "inputs: files are not what this configuration was made with (before -> now):\n  " + "\n  ".join(lines)
            + "\nPut them back, or leave inputs out to begin with what is there"
        )  # fmt: skip
    return config.model_copy(update={"inputs": now})


def check_unchanged(config: ExperimentConfig, *, start: bool) -> None:
    """Raise `RunError` if an input was exchanged after its digest was taken, while the search was reading.

    Call it when all has been read, and before anything of it is measured or kept.

    Parameters
    ----------
    start : whether the search has read its start too, and not the copy in its folder.
    """
    before, now = (
        {name: digest for name, digest in digests.items() if start or not name.startswith(START)}
        for digests in (config.inputs, inputs_of(config))
    )
    lines = changes(before, now) + [f"{name}: was not there -> {now[name]}" for name in sorted(now.keys() - before)]
    if lines:
        raise RunError(
            "inputs: files were exchanged while the search was beginning (before -> now):\n  "
            + "\n  ".join(lines)
            + "\nNothing was measured. Put them back and resume, or begin again in another folder"
        )


def changed_tasks(known: Mapping[str, Any]) -> list[str]:
    """Return a line per input of a search's tasks that is no longer what it was.

    Parameters
    ----------
    known : a resolved configuration, or the provenance of a plug-in: its ``inputs``, if it has any.
    """
    before = known.get("inputs")
    if not isinstance(before, Mapping):
        return []
    mine = {name: str(digest) for name, digest in before.items() if str(name).startswith("task ")}
    now: dict[str, str] = {}
    for name in mine:
        kind, _, place = name.removeprefix("task ").partition(" ")
        if place.startswith("of package "):
            now |= dict(_package("task", kind, tasks))
        else:
            now[name] = _digest(user_path(place))
    return changes(mine, {name: digest for name, digest in now.items() if digest != _MISSING})


def require_inputs(run: Run) -> None:
    """Raise `RunError` if the tasks of a run are not what they were when it was made."""
    lines = changed_tasks(run.config.resolved())
    if lines:
        raise RunError(
            f"{run.folder}: its tasks are not what they were in the search (run -> now):\n  "
            + "\n  ".join(lines)
            + "\nPut the files back, or name the tasks yourself (--task) to measure on them as they are now"
        )
