"""Report: what is compared: runs, plug-ins and managers, each with what its search says of itself."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evomem.errors import ConfigError, RunError
from evomem.evaluation.compare import NamedManager
from evomem.evaluation.entrants import takes_budget
from evomem.evaluation.measurement import EvaluationProtocol
from evomem.evaluation.rows import Budget
from evomem.files.reading import is_folder, user_path
from evomem.managers import build
from evomem.managers.base import MemoryManager
from evomem.report.evolving import run_label
from evomem.runs import Run, open_run
from evomem.runs.experiment_parts import TaskConfig
from evomem.runs.inputs import changed_tasks, task_inputs
from evomem.validation import validate

logger = logging.getLogger("evomem")

Source = str | Path | Run | MemoryManager | NamedManager
"""What names a subject: a run's or a plug-in's folder, a hub repository, a manager's spec, or what these stand for."""


@dataclass(frozen=True)
class Subject:
    """A manager with what its search was about, as far as that is known.

    Attributes
    ----------
    name : in tables.
    source : what the user wrote.
    models : names of the models that it was found on.
    tasks : of the last stage.
    protocol : of the search.
    protocols : of its models that have one of their own, by name.
    budgets : of the last stage, or the manager's.
    samples : sealed samples per task.
    changed : what of the tasks is no longer as it was in the search, a line each.
    provenance : what the search says of itself, the digests of its inputs among it.
    unsearched : numbers that a search would give, and which have their first values: it was built from a text.
    """

    name: str
    source: str
    manager: MemoryManager
    models: tuple[str, ...] = ()
    tasks: tuple[TaskConfig, ...] = ()
    protocol: EvaluationProtocol | None = None
    budgets: tuple[Budget, ...] = ()
    samples: int | None = None
    changed: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    unsearched: int = 0
    protocols: Mapping[str, EvaluationProtocol] = field(default_factory=dict)

    def protocol_on(self, model: str) -> EvaluationProtocol | None:
        """Return the protocol of the search on a model, by its name; None if nothing is known of the search."""
        return self.protocols.get(model, self.protocol)

    def with_changes_now(self) -> Subject:
        """Return the subject with the changes of its tasks' files as they are now."""
        return replace(self, changed=tuple(changed_tasks(self.provenance)))


def resolve(source: Source) -> Subject:
    """Return the subject that a source names.

    Raises
    ------
    RunError : a folder is neither run nor plug-in, or its run is not finished.
    PluginError : a damaged plug-in.
    ConfigError : no manager has that name.
    """
    if isinstance(source, Run):
        return _of_run(str(source.folder), source)
    if isinstance(source, NamedManager):
        return Subject(source.name, source.name, source.manager, budgets=budget_of(source.manager))
    if isinstance(source, MemoryManager):
        options = source.extra_repr()
        written = f"{source.name}({options})" if options else source.name
        return Subject(source.name, written, source, budgets=budget_of(source))
    return _of_name(str(source))


def _of_name(source: str) -> Subject:
    from evomem import plugins
    from evomem.plugins.hub import REPOSITORY

    path = user_path(source)
    if is_folder(path):
        if (path / "config.yaml").is_file():
            return _of_run(source, open_run(path))
        if plugins.is_plugin(path):
            return _of_plugin(source, path)
        raise RunError(f"{path}: is neither a run (no config.yaml) nor a plug-in (no config.json with schema_version)")
    looks_like_path = os.sep in source and "(" not in source
    if looks_like_path and not (REPOSITORY.fullmatch(source) and not path.parent.is_dir()):
        raise RunError(f"{source}: no such folder; give a run, a plug-in, or a manager (evomem list managers)")
    if looks_like_path:
        return _of_plugin(source, source)
    manager = build(source)
    return Subject(source, source, manager, budgets=budget_of(manager), unsearched=unsearched(manager))


def unsearched(manager: MemoryManager) -> int:
    """Return how many numbers a manager built from a text has that a search would give."""
    return sum(number.numel() for number in manager.parameters())


def _of_run(source: str, run: Run) -> Subject:
    from evomem import plugins

    config, stage = run.config, run.config.plan()[-1]
    winner = run.winner
    if run.result is not None and not run.result.files and plugins.is_plugin(run.plugin):
        run.require_winner(plugins.read(run.plugin).manager)  # an earlier evomem kept no digest of its numbers
    return Subject(
        name=run_label(config.name),
        source=source,
        manager=winner,
        models=tuple(model.name for model in config.all_models),
        tasks=stage.tasks,
        protocol=config.protocol,
        budgets=stage.budgets or budget_of(winner),
        samples=config.sealed.contexts,
        changed=_changes(source, stage.tasks, config.resolved()),
        provenance=config.resolved(),
        protocols={model.name: config.protocol_on(model.name) for model in config.all_models},
    )


def _of_plugin(source: str, folder: str | Path) -> Subject:
    from evomem import plugins

    plugin = plugins.read(folder)
    provenance, where = plugin.provenance, f"{folder}/provenance.json"
    models = provenance.get("models") or [provenance.get("model")]
    protocol = provenance.get("protocol")
    tasks = tuple(validate(TaskConfig, task, where) for task in provenance.get("tasks") or ())
    return Subject(
        name=run_label(str(provenance.get("experiment") or Path(source).name)),
        source=source,
        manager=plugin.manager,
        models=tuple(str(model["name"] if isinstance(model, dict) else model) for model in models if model),
        tasks=tasks,
        protocol=validate(EvaluationProtocol, protocol, where) if protocol else None,
        budgets=tuple(provenance.get("budgets") or ()) or budget_of(plugin.manager),
        changed=_changes(source, tasks, provenance),
        provenance=provenance,
        protocols={
            str(model["name"]): validate(EvaluationProtocol, model["protocol"], where)
            for model in models
            if isinstance(model, dict) and model.get("protocol")
        },
    )


def _changes(source: str, tasks: Sequence[TaskConfig], provenance: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what of a search's tasks has changed; say so if it was made before that was known."""
    if not provenance.get("inputs") and any(True for task in tasks for _ in task_inputs(task)):
        logger.warning("%s: has no digests of its tasks' files; whether they have changed is not known", source)
    return tuple(changed_tasks(provenance))


def budget_of(manager: MemoryManager) -> tuple[Budget, ...]:
    """Return a manager's budget, if it has one."""
    return () if manager.options.budget is None else (manager.options.budget,)


def own_budgets(
    subjects: Sequence[Subject], variants: Sequence[NamedManager], field: Sequence[NamedManager]
) -> dict[str, tuple[Budget, ...]]:
    """Return by name at which budgets each is measured where memory has a price: its own.

    Those that take a budget and have none are measured at all of the subjects', or else of the field's.

    Parameters
    ----------
    variants : of the first subject (`evomem.report.variants`), which are measured at its budgets.

    Raises
    ------
    ConfigError : nobody has a budget.
    """
    others = [*field, *variants]
    managers = {one.name: one.manager for one in others} | {one.name: one.manager for one in subjects}
    by_name = {one.name: budget_of(one.manager) for one in others} | {one.name: one.budgets for one in subjects}
    by_name |= dict.fromkeys([one.name for one in variants], subjects[0].budgets)
    known = [budget for subject in subjects for budget in subject.budgets] or [
        b for some in by_name.values() for b in some
    ]
    budgets: tuple[Budget, ...] = tuple(dict.fromkeys(known))
    without = next((name for name, some in by_name.items() if not some and takes_budget(managers[name])), None)
    if without is not None and not budgets:
        raise ConfigError(
            f"--budgets: neither {without} nor a subject has a budget of its own; give slots per head, for example "
            "--budgets 64,128 (from Python: budgets=[64, 128])"
        )
    return {name: some or budgets or (None,) for name, some in by_name.items()}


def resolve_all(sources: Source | Sequence[Source]) -> list[Subject]:
    """Return the subjects that sources name; those of the same name (seeds) are called what the user wrote.

    Raises
    ------
    ConfigError : there are none, or two cannot be told apart.
    RunError, PluginError : see `resolve`.
    """
    listed = list(sources) if isinstance(sources, Sequence) and not isinstance(sources, str) else [sources]
    if not listed:
        raise ConfigError("subjects: there are none; give at least one run, plug-in or manager")
    subjects = [resolve(source) for source in listed]
    names = [subject.name for subject in subjects]
    subjects = [replace(s, name=s.source) if names.count(s.name) > 1 else s for s in subjects]
    require_distinct([subject.name for subject in subjects])
    return subjects


def require_distinct(names: Sequence[str]) -> None:
    """Raise `ConfigError` if two managers of a comparison have the same name."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"two managers of a comparison are called {twice!r}; leave one out, or name them: "
            "evomem.evaluation.compare.NamedManager(name, manager)"
        )


def searched_tasks(subjects: Sequence[Subject]) -> tuple[TaskConfig, ...]:
    """Return the tasks of the first subject whose search had any.

    Raises
    ------
    RunError : they are not what they were in its search.
    """
    for subject in subjects:
        if not subject.tasks:
            continue
        if subject.changed:
            raise RunError(
                f"{subject.source}: its tasks are not what they were in the search (then -> now):\n  "
                + "\n  ".join(subject.changed)
                + "\nPut the files back, or name the tasks yourself (--task) to measure on them as they are now"
            )
        return subject.tasks
    return ()
