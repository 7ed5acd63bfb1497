"""CLI: the commands ``compare`` and ``evaluate``, and how subjects, models and tasks are named on the command line."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from evomem.cli.commands.outputs import claim
from evomem.cli.commands.packages import require_for
from evomem.cli.commands.progress import ProgressBar
from evomem.errors import ConfigError, RunError
from evomem.evaluation.compare import ROWS, NamedManager, Scenario, field_of
from evomem.evaluation.compare import compare as compare_managers
from evomem.evaluation.compare import evaluate as evaluate_manager
from evomem.evaluation.measurement import EvaluationProtocol
from evomem.evaluation.rows import Budget, Row
from evomem.files.reading import is_folder, user_path, whole_number
from evomem.managers import build
from evomem.managers.base import MemoryManager, check_budget
from evomem.report.evolving import places_of, run_label
from evomem.report.tables import keep_rows, notes, partial_file, rows_json, samples_file, sentences, tables
from evomem.runs import open_run
from evomem.runs.config import TaskConfig
from evomem.runs.inputs import changed_tasks, task_inputs
from evomem.spec import split
from evomem.tasks.base import Split, at_hand
from evomem.terminal import wide_console
from evomem.validation import validate

if TYPE_CHECKING:
    from evomem.models import LoadedModel

_MODEL, _SAMPLES, _CHECKED = "smollm2-135m", 50, 8
"""What a heuristic is measured on when nothing is said."""


@dataclass(frozen=True)
class Wishes:
    """Options of the command line that ``compare`` and ``evaluate`` share; empty or None: the subject's own."""

    models: list[str]
    tasks: list[str]
    budgets: str | None
    protocol: str | None
    mode: str | None
    split: str
    samples: int | None
    exact: bool
    dtype: str | None = None
    device: str | None = None
    plan_check: bool = True


@dataclass(frozen=True)
class Subject:
    """A manager with what its search was about, as far as that is known.

    Attributes
    ----------
    name : in tables.
    source : what the user wrote.
    models : that it was found on.
    tasks : of the last stage.
    budgets : of the last stage, or its own.
    samples : sealed samples per task.
    changed : what of the tasks is no longer as it was in the search, a line each.
    known : what the search says of itself, the digests of its inputs among it.
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
    known: Mapping[str, Any] = field(default_factory=dict)


def compare(
    sources: Sequence[str],
    against: str | None,
    wishes: Wishes,
    output: str | None,
    *,
    check: bool = True,
    oracle: bool = False,
) -> None:
    """Compare subjects with the field, print tables, and write rows; with ``check``, refuse tasks at chance."""
    output = claim_rows(output)
    check_tasks(wishes.tasks)
    subjects = resolve_all(sources)
    budgets = _budgets(wishes, subjects)
    field = split_specs(against)
    with ProgressBar("comparing") as bar:
        places = make_places(wishes, subjects)
        count = wishes.samples or subjects[0].samples or _SAMPLES
        require_room(wishes, places, count, len(subjects) + len(field_of(field)) + 1, budgets)
        for place in places if check else ():
            require_above_chance(place, Split(wishes.split), count)
        comparison = compare_managers(
            [NamedManager(subject.name, subject.manager) for subject in subjects],
            places,
            samples=count,
            budgets=budgets,
            against=field,
            split=Split(wishes.split),
            exact=wishes.exact,
            oracle=oracle,
            keep=partial_file(output),
            progress=bar.report,
        )
    deliver(comparison.rows, output)


def require_room(
    wishes: Wishes, places: Sequence[Scenario], count: int, managers: int, budgets: Sequence[Budget]
) -> None:
    """Raise `PlanError` if a comparison needs more memory, disk or time than there is (`evomem.evaluation.needs`)."""
    from evomem.evaluation.needs import Work, needs_of, require

    each, works = managers * max(1, len(budgets)) * (1 + wishes.exact), []
    for place in places:
        there = at_hand(place.subject_task, Split(wishes.split), count)
        works.append(Work(place.evaluator.loaded.model, place.subject_task, there, there * each, ROWS))
    console = wide_console(stderr=True)
    needs = needs_of(works, store=0, spill=Path(tempfile.gettempdir()))
    require(needs, check=wishes.plan_check, say=lambda text: console.print(Text(text, style="yellow")))


def require_above_chance(place: Scenario, split: Split, count: int) -> None:
    """Raise `TaskError` where the full cache is no better than no context; one sample says nothing and passes."""
    from evomem.runs.bench import check_chance

    task = place.subject_task
    samples = task.samples(split, at_hand(task, split, min(_CHECKED, count)), 0)
    if len(samples) > 1:
        check_chance(place.evaluator, place.task, place.subject_task, samples).require()


def evaluate(source: str, wishes: Wishes, output: str | None, *, check: bool = True) -> None:
    """Evaluate one subject, print its table, and write rows; with ``check``, refuse tasks at chance."""
    output = claim_rows(output)
    check_tasks(wishes.tasks)
    subject = resolve(source)
    if subject.manager.name == "full" or subject.manager.options.budget is not None:
        budgets: Sequence[Budget] = parse_budgets(wishes.budgets) or subject.budgets or (None,)
    else:
        budgets = _budgets(wishes, [subject])
    with ProgressBar("evaluating") as bar:
        places = make_places(wishes, [subject])
        count = wishes.samples or subject.samples or _SAMPLES
        require_room(wishes, places, count, 1, budgets)
        for place in places if check else ():
            require_above_chance(place, Split(wishes.split), count)
        comparison = evaluate_manager(
            NamedManager(subject.name, subject.manager),
            places,
            samples=count,
            budgets=budgets,
            split=Split(wishes.split),
            exact=wishes.exact,
            keep=partial_file(output),
            progress=bar.report,
        )
    deliver(comparison.rows, output)


def check_tasks(specs: Sequence[str]) -> None:
    """Check the names and options of tasks, which needs no model; raise `ConfigError` for one that is wrong."""
    from evomem.tasks.building import check_options

    for spec in specs:
        check_options(spec)


# ---- what the words mean -------------------------------------------------------------------------------------------


def resolve(source: str) -> Subject:
    """Return the subject that a user names: a run folder, a plug-in folder, a hub repository, or a manager's spec.

    Raises
    ------
    RunError : a folder is neither run nor plug-in, or its run is not finished.
    PluginError : a damaged plug-in.
    ConfigError : no manager has that name.
    """
    from evomem import plugins
    from evomem.plugins.hub import REPOSITORY

    path = user_path(source)
    if is_folder(path):
        if (path / "config.yaml").is_file():
            return _of_run(source, path)
        if plugins.is_plugin(path):
            return _of_plugin(source, path)
        raise RunError(f"{path}: is neither a run (no config.yaml) nor a plug-in (no config.json with schema_version)")
    looks_like_path = os.sep in source and "(" not in source
    if looks_like_path and not (REPOSITORY.fullmatch(source) and not path.parent.is_dir()):
        raise RunError(f"{source}: no such folder; give a run, a plug-in, or a manager (evomem list managers)")
    if looks_like_path:
        return _of_plugin(source, source)
    return Subject(source, source, build(source))


def _of_run(source: str, path: Path) -> Subject:
    from evomem import plugins

    run = open_run(path)
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
        budgets=stage.budgets or _own_budget(winner),
        samples=config.sealed.contexts,
        changed=_changed(source, stage.tasks, config.resolved()),
        known=config.resolved(),
    )


def _changed(source: str, tasks: Sequence[TaskConfig], known: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what of a search's tasks has changed; say so if it was made before that was known."""
    if not known.get("inputs") and any(True for task in tasks for _ in task_inputs(task)):
        wide_console(stderr=True).print(
            Text(
                f"{source}: has no digests of its tasks' files; whether they have changed is not known", style="yellow"
            )
        )
    return tuple(changed_tasks(known))


def own_tasks(subjects: Sequence[Subject]) -> tuple[TaskConfig, ...]:
    """Return the tasks of the first subject that has any.

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


def _of_plugin(source: str, folder: str | Path) -> Subject:
    from evomem import plugins

    plugin = plugins.read(folder)
    known, where = plugin.provenance, f"{folder}/provenance.json"
    models = known.get("models") or [known.get("model")]
    protocol = known.get("protocol")
    tasks = tuple(validate(TaskConfig, task, where) for task in known.get("tasks") or ())
    return Subject(
        name=run_label(str(known.get("experiment") or Path(source).name)),
        source=source,
        manager=plugin.manager,
        models=tuple(str(model["name"] if isinstance(model, dict) else model) for model in models if model),
        tasks=tasks,
        protocol=validate(EvaluationProtocol, protocol, where) if protocol else None,
        budgets=tuple(known.get("budgets") or ()) or _own_budget(plugin.manager),
        changed=_changed(source, tasks, known),
        known=known,
    )


def _own_budget(manager: MemoryManager) -> tuple[Budget, ...]:
    return () if manager.options.budget is None else (manager.options.budget,)


def resolve_all(sources: Sequence[str]) -> list[Subject]:
    """Return the subjects that a user names; those of the same name (seeds) get the names that the user wrote."""
    subjects = [resolve(source) for source in sources]
    taken = [subject.name for subject in subjects]
    return [
        Subject(**{**vars(subject), "name": subject.source}) if taken.count(subject.name) > 1 else subject
        for subject in subjects
    ]


def _budgets(wishes: Wishes, subjects: Sequence[Subject]) -> Sequence[Budget]:
    given = parse_budgets(wishes.budgets)
    if given:
        return given
    for subject in subjects:
        own = subject.budgets or _own_budget(subject.manager)
        if own:
            return own
    raise ConfigError(
        f"--budgets: {subjects[0].name} has no budget of its own; give slots per head, for example --budgets 64,128"
    )


def parse_budgets(text: str | None) -> list[Budget]:
    """Read ``64,128,0.25``: whole numbers are slots per head, others shares of the tokens read."""
    found: list[Budget] = []
    for part in (text or "").split(","):
        word = part.strip()
        if not word:
            continue
        try:
            budget: Budget = int(word) if word.lstrip("+-").isdigit() else float(word)
        except ValueError:
            raise ConfigError(f"--budgets: {word!r} is no number; write for example 64,128 or 0.25") from None
        check_budget(budget)
        found.append(budget)
    return found


def split_specs(text: str | None) -> list[str] | None:
    """Split managers' specs at the commas that are outside of brackets and quotation marks."""
    if text is None:
        return None
    if text.strip() in ("none", ""):
        return []
    return split(text)


def parse_protocol(text: str | None, mode: str | None, default: EvaluationProtocol) -> EvaluationProtocol:
    """Read ``compress_once`` or ``streaming[:N]``, and the mode; what is not given is the default's."""
    changes: dict[str, Any] = {} if mode is None else {"mode": mode}
    if text is not None:
        kind, colon, every = text.partition(":")
        if kind not in ("compress_once", "streaming") or (
            colon and (kind != "streaming" or whole_number(every) is None)
        ):
            raise ConfigError(f"--protocol: {text!r}; write compress_once, streaming, or streaming:512")
        changes["kind"] = kind
        if every:
            changes["every"] = int(every)
    return validate(EvaluationProtocol, {**default.model_dump(), **changes}, "--protocol")


def make_places(wishes: Wishes, subjects: Sequence[Subject]) -> list[Scenario]:
    """Load the models and build the tasks that are asked for, or else those of the first subject that has any."""

    def first(values: Sequence[Any], otherwise: Any) -> Any:
        return next((value for value in values if value), otherwise)

    models = wishes.models or first([subject.models for subject in subjects], [_MODEL])
    tasks = [TaskConfig(spec=spec) for spec in wishes.tasks]
    tasks = tasks or list(own_tasks(subjects))
    if not tasks:
        raise ConfigError("--task: say what to measure on, e.g. --task multikey_1:length=500 (evomem list tasks)")
    default = first([subject.protocol for subject in subjects], EvaluationProtocol())
    protocol = parse_protocol(wishes.protocol, wishes.mode, default)
    if wishes.models and not wishes.tasks:  # the user's models do what others did in the search
        tasks = list({task.title: task.for_all_models() for task in tasks}.values())
    require_for(models, [task.spec for task in tasks])
    places = [place for name in models for place in places_of(load(name, wishes.dtype, wishes.device), tasks, protocol)]
    if not wishes.tasks:  # again: the files have been read since
        own_tasks([replace(subject, changed=tuple(changed_tasks(subject.known))) for subject in subjects])
    return places


def load(name: str, dtype: str | None = None, device: str | None = None) -> LoadedModel:
    """Return the model called ``name`` with weights of a type by name, on a device by name (`evomem.models.load`)."""
    from evomem import models

    return models.load(name, dtype=dtype, device=device)


# ---- what comes out ------------------------------------------------------------------------------------------------


def claim_rows(output: str | None) -> str | None:
    """Return where rows are written, see `claim`; their samples lie beside them."""
    return claim("--json", output, lambda path: [samples_file(path)])


def deliver(rows: Sequence[Row], output: str | None) -> None:
    """Print tables, and write rows where the user wants them; samples lie beside them."""
    if output == "-":
        show(rows, wide_console(stderr=True))
        sys.stdout.write(rows_json(rows))
        return
    if output is not None:
        keep_rows(rows, Path(output))
    show(rows, wide_console())


def show(rows: Sequence[Row], console: Console) -> None:
    """Print tables, then what they say."""
    for table in tables(rows):
        console.print(table)
    for note in notes(rows):
        console.print(Text(note, style="dim"))
    for sentence in sentences(rows):
        console.print(Text(sentence, style="bold"))
