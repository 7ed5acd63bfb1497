"""CLI: the command ``export``: a run's winner, a plug-in, or a manager by its name, written as a plug-in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.text import Text

from evomem import plugins
from evomem.cli.commands.compare import parse_budgets
from evomem.cli.commands.evolve import snippet
from evomem.cli.commands.front import member_plugin
from evomem.cli.commands.overwriting import check_free
from evomem.errors import ConfigError, EvomemError
from evomem.evaluation.entrants import takes_budget
from evomem.files.reading import is_there, user_path
from evomem.managers.allocation.probed import keep_probes, observes_heads
from evomem.managers.base import MemoryManager
from evomem.managers.reallocation import reallocate
from evomem.plugins.reallocation import reallocated_provenance
from evomem.report.packages import require_for
from evomem.report.subjects import resolve
from evomem.runs import open_run
from evomem.runs.inputs import changed_tasks
from evomem.terminal import wide_console


def export(
    source: str,
    folder: Path,
    place: int | None = None,
    size: float | None = None,
    *,
    allocation: str | None = None,
    budget: str | None = None,
    model: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a run's winner, a member of its front, another plug-in, or a named manager, as a plug-in into ``folder``.

    Parameters
    ----------
    place, size : of the member of a front (`evomem.runs.front.member_of`); the winner if neither is given.
    allocation : under which the manager's scorer is written, in place of its own (`evomem.managers.reallocate`).
    budget : slots per head or a share, of a manager by its name.
    model : whose memory the manager must be able to decide about; an allocation that looks at what heads do keeps what
        this model's do.
    overwrite : replace a plug-in that is there.

    Raises
    ------
    ConfigError : the manager has that allocation already, can have none, cannot decide about the model's memory, has
        no budget, or has numbers that only a search gives;
        a budget for a plug-in.
    """
    check_free(folder, overwrite=overwrite)
    path = user_path(source)
    if not is_there(path):
        if place is not None or size is not None:
            raise ConfigError(f"{source}: is a manager; --place and --bytes are for a run that has a front")
        manager, provenance, remarks = *_named(source), list[str]()
    else:
        manager, provenance, remarks = _saved(source, path, place, size)
    if allocation is not None:
        change = reallocate(manager, allocation)
        if change.same:
            raise ConfigError(f"--allocation: {source} has the allocation {change.after} already; leave the option out")
        manager, provenance = change.manager, reallocated_provenance(provenance, change)
        remarks += [text for text in (change.loss(source), change.doubt(str(folder))) if text]
    if budget is not None:
        if is_there(path):
            raise ConfigError(
                f"--budget: {source} is a run or a plug-in, which was measured at its own; another one is an option of "
                "whoever uses it, evomem.load(FOLDER).with_options(budget=64)"
            )
        manager = _at_budget(manager, budget)
    elif not is_there(path) and takes_budget(manager) and manager.options.budget is None:
        raise ConfigError(
            f"{source}: has no budget of its own, and a plug-in needs one; give --budget, slots per head (64) or a "
            "share of the tokens read (0.25)"
        )
    if model is not None:
        provenance = {**provenance, **_fitted(manager, model)}
    plugins.save(manager, folder, provenance)
    console = wide_console()
    for line in remarks:
        console.print(Text(line, style="yellow"))
    console.print(Text(f"{folder}: {', '.join(plugins.FILES)}"))
    console.print(Text(f"  python: {snippet(folder)}"))


def _saved(
    source: str, path: Path, place: int | None, size: float | None
) -> tuple[MemoryManager, Mapping[str, Any], list[str]]:
    """Return the manager of a run or of a plug-in, its provenance, and what has changed since its search."""
    run = open_run(path) if (path / "config.yaml").is_file() else None
    if run is not None:
        plugin = member_plugin(run, place, size)
    elif place is None and size is None:
        plugin = path
    else:
        raise ConfigError(f"{source}: is a plug-in; --place and --bytes are for a run that has a front")
    plugin_read = plugins.read(plugin)
    if run is not None and plugin == run.plugin:
        run.require_winner(plugin_read.manager)
    changed = changed_tasks(plugin_read.provenance)
    remarks = [f"since the search: {line} (the manager is what it was)" for line in changed]
    return plugin_read.manager, plugin_read.provenance, remarks


def _named(source: str) -> tuple[MemoryManager, Mapping[str, Any]]:
    """Return the manager that a spec such as ``keydiff`` names, or a hub repository holds, and its provenance."""
    try:
        subject = resolve(source)
    except EvomemError as error:
        raise EvomemError(f"{source}: no such run or plug-in, and no manager either: {error}") from None
    if subject.unsearched:
        raise ConfigError(
            f"{source}: has {subject.unsearched} numbers that a search gives, and which are at their first values; "
            "find them with evomem evolve, or solve for an allocation's with evomem allocate, and export that folder"
        )
    return subject.manager, subject.provenance


def _at_budget(manager: MemoryManager, text: str) -> MemoryManager:
    budgets = [one for one in parse_budgets(text, "--budget") if one is not None]
    if len(budgets) != 1:
        raise ConfigError("--budget: a plug-in has one; give slots per head (64) or a share of the tokens read (0.25)")
    return manager.with_options(budget=budgets[0])


def _fitted(manager: MemoryManager, model: str) -> dict[str, Any]:
    """Let a manager keep what a model's heads do, if it looks at that; return what its provenance says of the model."""
    from evomem import models
    from evomem.evaluation.streams import evaluator_of
    from evomem.report.protocols import DEFAULTS, memory_kind

    require_for([model], [], intervals=False)
    loaded = models.load(model)
    evaluator = evaluator_of(loaded, DEFAULTS[memory_kind(loaded)])
    if reason := evaluator.refusal(manager):
        raise ConfigError(f"--model {model}: {reason}")
    if observes_heads(manager):
        keep_probes(manager, loaded.model)
    return {"fitted_to": {"model": loaded.name, "model_digest": loaded.digest, "dtype": loaded.dtype}}
