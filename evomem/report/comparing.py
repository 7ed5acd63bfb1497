"""Report: a comparison as a whole, as `evomem.compare`: subjects resolved, models loaded, everything measured."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomem.errors import ConfigError
from evomem.evaluation.compare import ROWS, NamedManager, Progress, Scenario, field_of
from evomem.evaluation.compare import compare as compare_managers
from evomem.evaluation.compare import evaluate as evaluate_manager
from evomem.evaluation.measurement import EvaluationProtocol
from evomem.evaluation.rows import Budget, Row
from evomem.files.reading import whole_number
from evomem.managers.base import check_budget
from evomem.models import LoadedModel
from evomem.report.evolving import scenarios_of
from evomem.report.outputs import claim
from evomem.report.packages import require_for
from evomem.report.pictures import claim_folder, draw_comparison
from evomem.report.subjects import Source, Subject, resolve, resolve_all, searched_tasks
from evomem.report.tables import keep_rows, partial_file, samples_file
from evomem.report.variants import variants_of
from evomem.runs.experiment_parts import TaskConfig
from evomem.tasks.base import Split, at_hand
from evomem.validation import validate

logger = logging.getLogger("evomem")

Say = Callable[[str], None]

MODEL = "smollm2-135m"
"""What a manager without a search is measured on when no model is named."""
SAMPLES = 50
"""Samples per task when neither the user nor a search says how many."""
_CHECKED = 8
"""Samples on which the full cache must beat having read nothing."""


@dataclass(frozen=True)
class Conditions:
    """What subjects are measured on, and how; empty or None: as in the first subject's search.

    Attributes
    ----------
    models : aliases, folders or hub ids, or models that are loaded already.
    tasks : specs such as ``multikey_1:length=500``.
    budgets : slots per head (int) or shares of the tokens read (float).
    protocol : ``compress_once``, ``streaming`` or ``streaming:N``.
    mode : ``query_agnostic`` or ``query_aware``.
    split : the samples.
    samples : per task.
    exact : also generate text, for the exact score.
    dtype, device : of the models that are loaded.
    plan_check : refuse what needs more memory, disk or time than there is.
    """

    models: Sequence[str | LoadedModel] = ()
    tasks: Sequence[str] = ()
    budgets: Sequence[Budget] = ()
    protocol: str | None = None
    mode: str | None = None
    split: Split = Split.SEALED
    samples: int | None = None
    exact: bool = True
    dtype: str | None = None
    device: str | None = None
    plan_check: bool = True

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        for budget in self.budgets:
            check_budget(budget)
        if self.samples is not None and self.samples < 1:
            raise ConfigError(f"samples: {self.samples}; at least 1 is needed")


def compare(
    subjects: Source | Sequence[Source],
    *,
    against: str | Sequence[str] | None = None,
    allocations: str | Sequence[str] = (),
    models: str | LoadedModel | Sequence[str | LoadedModel] = (),
    tasks: str | Sequence[str] = (),
    budgets: int | float | Sequence[Budget] = (),
    protocol: str | None = None,
    mode: str | None = None,
    split: str = "sealed",
    samples: int | None = None,
    exact: bool = True,
    oracle: bool = False,
    check: bool = True,
    dtype: str | None = None,
    device: str | None = None,
    plan_check: bool = True,
    out: str | Path | None = None,
    plots: str | Path | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Compare managers with the field on the same samples at the same budgets.

    ``evomem compare`` is this function and what it prints. ::

        rows = evomem.compare("runs/demo", budgets=[32, 64], against=["keydiff", "snapkv"])
        best = max(rows, key=lambda row: row.loglik)

    What is left out is as in the first subject's search, or the default of the command.

    Parameters
    ----------
    subjects : one or several: a run, a plug-in, a hub repository, a manager's spec (`Source`). Differences are taken of
        the first one.
    against : the field, as specs; ``all`` or None: every heuristic; an empty list: none.
    allocations : also the first subject's scorer under each of these, e.g. ``probe_shares(power=0.5)``: only how its
        budget is shared out differs (`evomem.managers.reallocation`).
    models : aliases, folders or hub ids, or models that are loaded already.
    tasks : specs such as ``multikey_1:length=500`` or ``file:questions.jsonl``.
    budgets : slots per head (int) or shares of the tokens read (float).
    protocol : ``compress_once``, ``streaming`` or ``streaming:N``.
    mode : ``query_agnostic`` or ``query_aware``.
    split : ``train``, ``select`` or ``sealed``.
    samples : per task.
    exact : also generate text, for the exact score (slower).
    oracle : also the decision that knows what will be attended to: a mark, no manager.
    check : refuse a task at which the full cache is no better than no context.
    dtype, device : of the models that are loaded.
    plan_check : refuse what needs more memory, disk or time than there is.
    out : JSON file for the rows, with the samples beside it; a comparison that was killed goes on there.
    plots : folder for pictures: score against bytes (``memory.png``), and a heat map of the slots of every layer and KV
        head (``heads.png``).
    progress : called with (samples done, samples in all).

    Returns
    -------
    list of `evomem.evaluation.rows.Row` : by model, task and budget, the largest log-likelihood first.

    Raises
    ------
    ConfigError : a name, budget, protocol, split or task is not valid; no budget or no task is known.
    RunError, PluginError : a subject is none, or its search's tasks have changed since.
    TaskError : a task measures nothing on a model, or has no samples.
    PlanError : it needs more than there is.
    """
    conditions = Conditions(
        models=[models] if isinstance(models, str | LoadedModel) else list(models),
        tasks=[tasks] if isinstance(tasks, str) else list(tasks),
        budgets=[budgets] if isinstance(budgets, int | float) else list(budgets),
        protocol=protocol,
        mode=mode,
        split=split_called(split),
        samples=samples,
        exact=exact,
        dtype=dtype,
        device=device,
        plan_check=plan_check,
    )
    if str(out) == "-":
        raise ConfigError("out: - is no file; the rows are returned")
    path = claim_rows("out", None if out is None else str(out))
    folder = claim_folder("plots", plots)
    rows = compare_subjects(
        subjects,
        against,
        conditions,
        allocations=[allocations] if isinstance(allocations, str) else allocations,
        oracle=oracle,
        check=check,
        keep=partial_file(path),
        progress=progress,
    )
    if path is not None:
        keep_rows(rows, Path(path))
    if folder is not None:
        draw_comparison(folder, rows)
    return rows


def compare_subjects(
    sources: Source | Sequence[Source],
    against: str | Sequence[str] | None,
    conditions: Conditions,
    *,
    allocations: Sequence[str] = (),
    oracle: bool = False,
    check: bool = True,
    keep: Path | None = None,
    progress: Progress | None = None,
    say: Say = logger.warning,
) -> list[Row]:
    """Compare subjects with the field; see `compare`.

    Parameters
    ----------
    keep : file in which finished samples wait for the rest.
    say : told of a plan that will take long, and of allocations' numbers that are left out or were never searched.
    """
    check_tasks(conditions.tasks)
    subjects = resolve_all(sources)
    variants = variants_of(subjects, allocations, say)
    budgets = budgets_of(conditions, subjects)
    field = field_of(against)  # before a model is loaded: a name may be wrong
    managers = len(subjects) + len(variants) + len(field) + 1
    scenarios, count = _checked_scenarios(conditions, subjects, managers, budgets, say, check=check)
    comparison = compare_managers(
        [NamedManager(subject.name, subject.manager) for subject in subjects] + variants,
        scenarios,
        samples=count,
        budgets=budgets,
        against=against,
        split=conditions.split,
        exact=conditions.exact,
        oracle=oracle,
        keep=keep,
        progress=progress,
    )
    return comparison.rows


def evaluate_subject(
    source: Source,
    conditions: Conditions,
    *,
    check: bool = True,
    keep: Path | None = None,
    progress: Progress | None = None,
    say: Say = logger.warning,
) -> list[Row]:
    """Evaluate one subject by itself; see `compare_subjects`."""
    check_tasks(conditions.tasks)
    subject = resolve(source)
    budgets: Sequence[Budget] = conditions.budgets or subject.budgets
    if not budgets and subject.manager.name == "full":
        budgets = (None,)
    budgets = budgets or budgets_of(conditions, [subject])
    scenarios, count = _checked_scenarios(conditions, [subject], 1, budgets, say, check=check)
    comparison = evaluate_manager(
        NamedManager(subject.name, subject.manager),
        scenarios,
        samples=count,
        budgets=budgets,
        split=conditions.split,
        exact=conditions.exact,
        keep=keep,
        progress=progress,
    )
    return comparison.rows


def _checked_scenarios(
    conditions: Conditions,
    subjects: Sequence[Subject],
    managers: int,
    budgets: Sequence[Budget],
    say: Say,
    *,
    check: bool,
) -> tuple[list[Scenario], int]:
    """Return where subjects are measured and the samples there, once it is sure that there is room and a task."""
    scenarios = make_scenarios(conditions, subjects)
    count = conditions.samples or subjects[0].samples or SAMPLES
    require_room(conditions, scenarios, count, managers, budgets, say)
    for scenario in scenarios if check else ():
        require_above_chance(scenario, conditions.split, count)
    return scenarios, count


# ---- what subjects are measured on ---------------------------------------------------------------------------------


def claim_rows(option: str, output: str | None) -> str | None:
    """Return where rows are written, see `claim`; their samples lie beside them."""
    return claim(option, output, lambda path: [samples_file(path)])


def check_tasks(specs: Sequence[str]) -> None:
    """Check the names and options of tasks, which needs no model; raise `ConfigError` for one that is wrong."""
    from evomem.tasks.building import check_options

    for spec in specs:
        check_options(spec)


def split_called(name: str) -> Split:
    """Return a split by its name; raise `ConfigError` if there is none."""
    try:
        return Split(name)
    except ValueError:
        raise ConfigError(f"split {name!r}: is none of {', '.join(Split)}") from None


def parse_protocol(text: str | None, mode: str | None, default: EvaluationProtocol) -> EvaluationProtocol:
    """Read ``compress_once`` or ``streaming[:N]``, and the mode; what is None is the default's."""
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


def budgets_of(conditions: Conditions, subjects: Sequence[Subject]) -> Sequence[Budget]:
    """Return the budgets of the conditions, or those of the first subject that has any.

    Raises
    ------
    ConfigError : nobody says any.
    """
    if conditions.budgets:
        return conditions.budgets
    for subject in subjects:
        if subject.budgets:
            return subject.budgets
    raise ConfigError(
        f"--budgets: {subjects[0].name} has no budget of its own; give slots per head, for example --budgets 64,128 "
        "(from Python: budgets=[64, 128])"
    )


def make_scenarios(conditions: Conditions, subjects: Sequence[Subject]) -> list[Scenario]:
    """Load the models and build the tasks of the conditions, or else those of the first subject that has any.

    Raises
    ------
    ConfigError : nobody names a task.
    RunError : the tasks are a search's, and their files have changed since.
    MissingPackagesError : a model or a task needs packages that are not installed.
    """
    searched = next((subject.models for subject in subjects if subject.models), (MODEL,))
    models: Sequence[str | LoadedModel] = conditions.models or searched
    tasks = [TaskConfig(spec=spec) for spec in conditions.tasks] or list(searched_tasks(subjects))
    if not tasks:
        raise ConfigError(
            "--task: say what to measure on, e.g. --task multikey_1:length=500 (evomem list tasks; from Python: "
            'tasks="multikey_1:length=500")'
        )
    default = next((subject.protocol for subject in subjects if subject.protocol), EvaluationProtocol())
    protocol = parse_protocol(conditions.protocol, conditions.mode, default)
    if conditions.models and not conditions.tasks:  # the user's models do what others did in the search
        tasks = list({task.title: task.for_all_models() for task in tasks}.values())
    require_for([model for model in models if isinstance(model, str)], [task.spec for task in tasks])
    scenarios = [scenario for model in models for scenario in scenarios_of(load(model, conditions), tasks, protocol)]
    if not conditions.tasks:  # again: the files have been read since
        searched_tasks([subject.with_changes_now() for subject in subjects])
    return scenarios


def load(model: str | LoadedModel, conditions: Conditions) -> LoadedModel:
    """Return a model with weights of the conditions' type, on their device; a loaded one is returned as it is."""
    from evomem import models

    if isinstance(model, LoadedModel):
        return model
    return models.load(model, dtype=conditions.dtype, device=conditions.device)


def require_room(
    conditions: Conditions,
    scenarios: Sequence[Scenario],
    count: int,
    managers: int,
    budgets: Sequence[Budget],
    say: Say,
) -> None:
    """Raise `PlanError` if a comparison needs more memory, disk or time than there is (`evomem.evaluation.needs`).

    Parameters
    ----------
    count : samples per scenario.
    managers : that are measured at every budget.
    say : told of a plan that will take long.
    """
    from evomem.evaluation.needs import Work, needs_of, require

    each, works = managers * max(1, len(budgets)) * (1 + conditions.exact), []
    for scenario in scenarios:
        there = at_hand(scenario.subject_task, conditions.split, count)
        works.append(Work(scenario.evaluator.loaded.model, scenario.subject_task, there, there * each, ROWS))
    needs = needs_of(works, store=0, spill=Path(tempfile.gettempdir()))
    require(needs, check=conditions.plan_check, say=say)


def require_above_chance(scenario: Scenario, split: Split, count: int) -> None:
    """Raise `TaskError` where the full cache is no better than no context; one sample says nothing and passes."""
    from evomem.runs.bench import check_chance

    task = scenario.subject_task
    samples = task.samples(split, at_hand(task, split, min(_CHECKED, count)), 0)
    if len(samples) > 1:
        check_chance(scenario.evaluator, scenario.task, scenario.subject_task, samples).require()
