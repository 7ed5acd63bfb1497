"""CLI: the command ``allocate``: solve for the budget of every head, and write the manager as a plug-in."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from rich.text import Text

from evomem import plugins
from evomem.cli.commands.compare import parse_budgets
from evomem.cli.commands.progress import ProgressBar
from evomem.errors import ConfigError
from evomem.evaluation.entrants import Scenario
from evomem.evaluation.evaluator import Evaluator
from evomem.evaluation.measurement import EvaluationProtocol
from evomem.evaluation.needs import Work, needs_of, require
from evomem.evaluation.store import PrefillStore
from evomem.evaluation.traces.store import TraceCollection, Traces
from evomem.evaluation.utility import UtilityCurves, solve, utility_curves, with_curves, with_shares
from evomem.files.reading import user_path
from evomem.managers.base import MemoryManager
from evomem.managers.reallocation import change_between
from evomem.memory.kv.attach import has_own_memory
from evomem.plugins.folder import check_replaceable
from evomem.plugins.reallocation import reallocated_provenance
from evomem.report.conditions import check_tasks, require_above_chance
from evomem.report.packages import require_for
from evomem.report.subjects import resolve
from evomem.search_space.space import SearchSpace, load_space
from evomem.tasks.base import Split, at_hand
from evomem.terminal import plain_console, wide_console
from evomem.validation import validate

_SPACE = "space:"
"""Before the name of a search space."""
_SHOWN = (8, 16, 32, 64, 128)
"""Budgets whose solutions are told."""


def allocate(
    source: str,
    model: str,
    task: str,
    folder: Path,
    *,
    samples: int,
    seed: int,
    split: str,
    mode: str,
    points: int,
    budget: str | None,
    shares: bool,
    traces: list[str],
    dtype: str | None = None,
    device: str | None = None,
    check: bool = True,
    plan_check: bool = True,
) -> None:
    """Measure the curves of a manager's ranking, solve, and write the plug-in.

    Raises
    ------
    ConfigError : ``shares`` without one budget, a manager that does not rank, or a model with a memory of its own.
    PluginError : the folder holds something else than a plug-in.
    """
    from evomem import models, tasks

    budgets = [one for one in parse_budgets(budget, "--budget") if one is not None]
    if len(budgets) > 1 or (shares and not budgets):
        raise ConfigError("--budget: give one, at which the plug-in is used and learned shares (--shares) begin")
    folder = user_path(folder)
    check_replaceable(folder)
    check_tasks([task])
    manager = _ranking(source)
    if budgets:
        manager = manager.with_options(budget=budgets[0])
    require_for([model], [task], intervals=False)
    loaded = models.load(model, dtype=dtype, device=device)
    if has_own_memory(loaded.model):
        raise ConfigError(
            f"model {loaded.name!r} has a memory of its own, about which managers decide while it reads; curves are of "
            "a context that is read once for all. Share its budget out by across_heads, or search per_head_shares"
        )
    protocol = validate(EvaluationProtocol, {"mode": mode}, "--mode")
    evaluator = Evaluator(loaded, protocol, store=PrefillStore())
    if traces:
        opened = [Traces.open(one) for one in traces]
        for one in opened:
            one.matches(loaded, mode=mode)
        evaluator.traces = TraceCollection(opened)
    built = tasks.build(task, loaded.tokenizer)
    there = at_hand(built, Split(split), samples)
    messages = plain_console(stderr=True, soft_wrap=True, highlight=False)
    needs = needs_of([Work(loaded.model, built, there, there, 0)], store=0, spill=folder.parent)
    require(needs, check=plan_check, say=lambda text: messages.print(Text(text)))
    if check:
        require_above_chance(Scenario(loaded.name, task, evaluator, built), Split(split), there)
    begin = time.perf_counter()
    with ProgressBar("measuring") as bar:
        chosen = built.samples(Split(split), there, seed)
        curves = utility_curves(evaluator, manager, chosen, points=points, progress=bar.report)
    made = with_shares(manager, curves, budgets[0]) if shares else with_curves(manager, curves)
    measured_with = {
        "model": {"name": model, "dtype": loaded.dtype},
        "model_digest": loaded.digest,
        "tasks": [{"spec": task}],
        "protocol": protocol.model_dump(mode="json"),
        "allocated": {
            "ranking": source,
            "samples": curves.contexts,
            "split": split,
            "seed": seed,
            "floor": curves.floor,
        },
    }
    change = replace(change_between(manager, made), initial={})  # its numbers were solved for
    plugins.save(made, folder, {**reallocated_provenance(manager.provenance, change), **measured_with})
    seconds = time.perf_counter() - begin
    lines = [
        f"{folder}: {made.allocation.name}, from {curves.contexts} contexts of {curves.slots:,.0f} slots, "
        f"{seconds:,.1f} s"
    ]
    lines += [_line(curves, one) for one in (budgets or [size for size in _SHOWN if size < curves.slots])]
    for line in lines:
        wide_console().print(Text(line), soft_wrap=True)


def _ranking(source: str) -> MemoryManager:
    """Return the manager that a user names as for `resolve`, or the one that a search space starts from."""
    if source.startswith(_SPACE):
        return SearchSpace(load_space(source.removeprefix(_SPACE))).template
    return resolve(source).manager


def _line(curves: UtilityCurves, budget: int | float) -> str:
    slots = solve(curves, budget).double()
    layer, head = divmod(int(slots.argmax()), slots.shape[1])
    return (
        f"  {budget} slots a head: heads get {slots.min():.0f} to {slots.max():.0f} (layer {layer}, head {head}), "
        f"deviation {slots.std(correction=0):.1f}"
    )
