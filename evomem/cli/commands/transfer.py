"""CLI: the command ``transfer``: managers on models that they were not found on."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.text import Text

from evomem.cli.commands.compare import say_yellow, split_specs
from evomem.cli.commands.progress import ProgressBar
from evomem.errors import ConfigError, PluginError, TaskError
from evomem.evaluation.compare import Comparison, NamedManager, Scenario, field_of
from evomem.evaluation.compare import compare as compare_managers
from evomem.evaluation.measurement import EvaluationProtocol
from evomem.evaluation.rows import Budget
from evomem.files.atomic import write_atomically
from evomem.files.reading import is_folder, user_path
from evomem.managers import build
from evomem.managers.base import MemoryManager
from evomem.report.conditions import Conditions, check_tasks, load, parse_protocol, protocol_for, require_room
from evomem.report.evolving import scenarios_of
from evomem.report.outputs import claim
from evomem.report.packages import require_for
from evomem.report.subjects import Subject, resolve_all, searched_tasks
from evomem.report.tables import partial_file, rows_json, write_rows
from evomem.report.transfer import (
    Cell,
    TransferRow,
    cells,
    summary,
    transfer_markdown,
    transfer_plot,
    transfer_rows,
    transfer_tables,
)
from evomem.report.transfer_record import Record, open_record, write_record
from evomem.runs import open_run
from evomem.runs.bench import calibrate_manager, check_chance
from evomem.runs.experiment_parts import TaskConfig
from evomem.tasks.base import Sample, Split, at_hand
from evomem.terminal import wide_console

_TITLE = "advantage over the best heuristic there, nats (bold: 0 excluded)"
_SAMPLES, _CHECKED, _CALIBRATED, _TIMED = 100, 8, 8, 3


@dataclass(frozen=True)
class _Plan:
    """What every model and task is measured with."""

    subjects: Sequence[Subject]
    budgets: Sequence[Budget]
    field: Sequence[str] | None
    conditions: Conditions
    recalibrate: bool
    speed: bool


def transfer(
    sources: Sequence[str],
    against: str | None,
    conditions: Conditions,
    output: str | None,
    *,
    recalibrate: bool,
    check: bool,
    record: bool = False,
    protocols: Sequence[str] = (),
    speed: bool = True,
) -> None:
    """Measure every subject on every model, print the matrix, and write rows, table and picture.

    The models may have memories of different kinds: a KV cache, pairs, a matrix. A manager, or a heuristic, that
    observes what a memory has not is left out there, and that is said.

    Parameters
    ----------
    conditions : ``models`` are the test models; ``tasks`` may be ``MODEL=TASK``, for one of them.
    output : JSON file; the table and the picture lie beside it, with the endings ``.md`` and ``.png``.
    recalibrate : measure managers with statistics also with these collected anew on the test model.
    check : leave out (and say so) tasks at which a model's full cache is no better than no context.
    record : write the rows into the plug-ins too, those of runs included (`evomem.report.transfer_record`); hub
        repositories and heuristics are left alone.
    protocols : ``PROTOCOL`` for all models or ``MODEL=PROTOCOL`` for one of them, which goes before; by default
        `default_protocol`.
    speed : also time managers, one sequence at a time.

    Raises
    ------
    ConfigError : no models, no budget; a task or protocol for a model that is not among them, or two protocols for
        one; nothing to record into.
    PluginError : a plug-in to record into cannot be written.
    """
    output = claim("--json", output, lambda path: [path.with_suffix(ending) for ending in (".md", ".png")])
    subjects = resolve_all(sources)
    names = [name for m in conditions.models if isinstance(m, str) for name in m.split(",") if name]
    if not names:
        raise ConfigError("--models: say which models to move to, e.g. --models zoo-gpt2,smollm2-135m (evomem models)")
    tasks = _tasks(conditions.tasks, names) or _tasks_of(subjects)
    check_tasks([task.spec for task in tasks])
    budgets = conditions.budgets or next((s.budgets for s in subjects if s.budgets), ())
    if not budgets:
        raise ConfigError(
            "--budgets: give slots per head or shares of the tokens read, for example --budgets 0.125,0.25"
        )
    require_for(names, [task.spec for task in tasks], plots=output is not None or record)
    records = _records(subjects) if record else {}
    plan = _Plan(subjects, budgets, split_specs(against), conditions, recalibrate, speed)
    by_model = _protocols(protocols or filter(None, [conditions.protocol]), names)
    for text in (None, *by_model.values()):  # before a model is loaded
        parse_protocol(text, conditions.mode, EvaluationProtocol())
    rows: list[TransferRow] = []
    skipped: list[str] = []
    partials: list[Path] = []
    console = wide_console(stderr=True)
    for name in dict.fromkeys(names):
        loaded = load(name, conditions)
        decides = protocol_for(loaded, by_model.get(name, by_model.get(None)), conditions, subjects)
        for scenario in scenarios_of(loaded, tasks, decides):
            keep = None if output in (None, "-") else partial_file(f"{output}.{len(partials)}")
            if keep is not None:
                partials.append(keep)
            try:
                here, refused = _applicable(plan, scenario)
                skipped += refused
                for reason in refused:
                    console.print(Text(f"left out: {reason}", style="yellow"))
                rows += _measured(here, scenario, keep, check=check) if here.subjects else []
            except TaskError as error:
                skipped.append(f"{scenario.task} on {scenario.model}: {error}")
                console.print(Text(f"left out: {skipped[-1]}", style="yellow"))
    if not rows:
        raise TaskError("nothing was measured: " + "; ".join(skipped or ["no task is for any of the models"]))
    _deliver(rows, skipped, output)
    _record(records, cells(rows))
    for path in partials:
        path.unlink(missing_ok=True)


def _applicable(plan: _Plan, scenario: Scenario) -> tuple[_Plan, list[str]]:
    """Return the plan with the subjects and the field that decide about a scenario's memory, and why others cannot."""
    named = [one for one in field_of(plan.field or []) if one.name in (plan.field or [])]  # "all" sees to itself
    managers = {one.name: one.manager for one in named} | {one.name: one.manager for one in plan.subjects}
    reasons = {name: scenario.evaluator.refusal(manager) for name, manager in managers.items()}
    subjects = [one for one in plan.subjects if not reasons[one.name]]
    field = None if plan.field is None else [spec for spec in plan.field if not reasons.get(spec)]
    refused = [f"{name} on {scenario.model}: {reason}" for name, reason in reasons.items() if reason]
    return replace(plan, subjects=subjects, field=field), refused


def _measured(plan: _Plan, scenario: Scenario, keep: Path | None, *, check: bool) -> list[TransferRow]:
    """Return the rows of all subjects on one scenario."""
    split, count = plan.conditions.split, plan.conditions.samples or _SAMPLES
    managers_at_once = len(plan.subjects) + len(field_of(plan.field)) + 1
    require_room(plan.conditions, [scenario], count, managers_at_once * max(1, len(plan.budgets)), say_yellow)
    if check and count > 1:
        samples = _samples(scenario, split, min(_CHECKED, count))
        if len(samples) > 1:
            check_chance(scenario.evaluator, scenario.task, scenario.subject_task, samples).require()
    managers = {subject.name: subject.manager for subject in plan.subjects}
    trained = {subject.name: " + ".join(subject.models) for subject in plan.subjects}
    if plan.recalibrate:
        for subject in plan.subjects:
            other = _recalibrated(subject.manager, scenario)
            if other is not None:
                managers[_anew(subject.name)] = other
                trained[_anew(subject.name)] = trained[subject.name]
    with ProgressBar(f"{scenario.task} on {scenario.model}") as bar:
        comparison = compare_managers(
            [NamedManager(name, manager) for name, manager in managers.items()],
            [scenario],
            samples=count,
            budgets=plan.budgets,
            against=plan.field,
            split=split,
            exact=plan.conditions.exact,
            keep=keep,
            progress=bar.report,
        )
    samples = _samples(scenario, split, min(_TIMED, count)) if plan.speed else []
    return transfer_rows(comparison, trained, _speeds(comparison, managers, scenario, samples))


def _samples(scenario: Scenario, split: Split, count: int) -> list[Sample]:
    """Return the first samples of a split, or all where there are fewer."""
    return scenario.subject_task.samples(split, at_hand(scenario.subject_task, split, count), 0)


def _anew(name: str) -> str:
    """Return what a subject is called with statistics that were collected anew."""
    return f"{name} (recalibrated)"


def _recalibrated(manager: MemoryManager, scenario: Scenario) -> MemoryManager | None:
    """Return a copy whose statistics were collected on the scenario's training samples; None if it has none."""
    if not manager.calibrates:
        return None
    other = manager.with_options()
    calibrate_manager(other, [(scenario.evaluator, _samples(scenario, Split.TRAIN, _CALIBRATED))])
    scenario.evaluator.store.close()
    return other


def _speeds(
    comparison: Comparison, managers: dict[str, MemoryManager], scenario: Scenario, samples: Sequence[Sample]
) -> dict[tuple[str, Budget], float]:
    """Tokens per second of subjects and full cache, each sequence by itself; all take turns on every sample."""
    timed: dict[tuple[str, Budget], MemoryManager] = {}
    for row in comparison.rows:
        if row.role == "full":
            timed[row.manager, row.budget] = build("full")
        elif row.role == "subject":
            manager = managers[row.manager]
            own = row.budget is None or row.budget == manager.options.budget
            timed[row.manager, row.budget] = manager if own else manager.with_options(budget=row.budget)
    speeds: dict[tuple[str, Budget], list[float]] = {key: [] for key in timed}
    for sample in samples:
        length = scenario.evaluator.length_of(sample)
        for key, manager in timed.items():
            evaluation = scenario.evaluator.evaluate_plainly(manager, sample, scenario.subject_task)
            speeds[key].append(length / evaluation.seconds)
    return {key: statistics.median(values) for key, values in speeds.items() if values}


def _tasks(specs: Sequence[str], models: Sequence[str]) -> list[TaskConfig]:
    """Read ``TASK`` and ``MODEL=TASK``; what stands before the first colon of a task is a name without ``=``."""
    tasks = []
    for spec in specs:
        model, sign, task = spec.partition("=")
        if not sign or ":" in model or "(" in model:
            tasks.append(TaskConfig(spec=spec))
        elif model not in models:
            raise ConfigError(f"--tasks {spec}: {model!r} is not among --models {','.join(models)}")
        else:
            tasks.append(TaskConfig(spec=task, model=model))
    return tasks


def _protocols(words: Iterable[str], models: Sequence[str]) -> dict[str | None, str]:
    """Return the protocols by model, None standing for all others, of ``PROTOCOL`` and ``MODEL=PROTOCOL``."""
    protocols: dict[str | None, str] = {}
    for word in words:
        model, sign, text = word.rpartition("=")
        if sign and model not in models:
            raise ConfigError(f"--protocol {word}: {model!r} is not among --models {','.join(models)}")
        if protocols.setdefault(model if sign else None, text) != text:
            raise ConfigError(
                f"--protocol: two are given for {model or 'all models'}, {protocols[model if sign else None]} and "
                f"{text}; one model is measured under one (MODEL=PROTOCOL is for one of them)"
            )
    return protocols


def _tasks_of(subjects: Sequence[Subject]) -> list[TaskConfig]:
    """Return the tasks that the subjects were found on, for all models."""
    tasks = [task.for_all_models() for subject in subjects for task in searched_tasks([subject])]
    if not tasks:
        raise ConfigError("--tasks: say what to measure on, e.g. --tasks multikey_1:length=500 (evomem list tasks)")
    return list({task.title: task for task in tasks}.values())


def _deliver(rows: Sequence[TransferRow], skipped: Sequence[str], output: str | None) -> None:
    """Print the matrix; write rows, table and picture."""
    matrix, console = cells(rows), wide_console(stderr=output == "-")
    for table in transfer_tables(matrix):
        console.print(table)
    for line in (*summary(matrix), *(f"left out: {reason}" for reason in skipped)):
        console.print(Text(line, style="bold"))
    if output == "-":
        sys.stdout.write(rows_json(rows))
    if output is None or output == "-":
        return
    path = Path(output)
    write_rows(path, rows)
    write_atomically(path.with_suffix(".md"), transfer_markdown(matrix, skipped).encode())
    transfer_plot(path.with_suffix(".png"), matrix, _TITLE)
    console.print(Text(f"{path}, {path.with_suffix('.md').name}, {path.with_suffix('.png').name}", style="dim"))


# ---- into the plug-ins ---------------------------------------------------------------------------------------------


def _records(subjects: Sequence[Subject]) -> dict[str, Record]:
    """Return the plug-ins that rows can be written into, by subject; say which subjects have none.

    Raises
    ------
    ConfigError : none has one.
    PluginError : one cannot be written.
    """
    console, records = wide_console(stderr=True), {}
    for subject in subjects:
        path = user_path(subject.source)
        if is_folder(path):
            records[subject.name] = open_record(open_run(path).plugin if (path / "config.yaml").is_file() else path)
        else:
            console.print(Text(f"--record: {subject.name} is no folder and is left alone", style="yellow"))
    if not records:
        raise ConfigError("--record: none of the subjects is a run or a plug-in folder; there is nothing to write into")
    return records


def _record(records: dict[str, Record], matrix: Sequence[Cell]) -> None:
    """Write each plug-in's cells into it; what fails for one does not keep the others from theirs."""
    console, failed = wide_console(), []
    for name, record in records.items():
        names = {name: False, _anew(name): True}
        mine = [(cell, names[cell.row.subject]) for cell in matrix if cell.row.subject in names]
        try:
            notes = write_record(record, mine)
        except PluginError as error:
            failed.append(str(error))
            continue
        console.print(Text(f"{record.folder}: {len(mine)} rows recorded, card and picture made anew", style="dim"))
        for note in notes:
            console.print(Text(note, style="yellow"))
    if failed:
        raise PluginError("; ".join(failed))
