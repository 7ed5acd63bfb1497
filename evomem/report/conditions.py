"""Report: the conditions of a comparison: models, tasks, budgets and protocol, and whether there is room for it."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomem.errors import ConfigError
from evomem.evaluation.compare import ROWS, Scenario
from evomem.evaluation.measurement import EvaluationProtocol
from evomem.evaluation.rows import Budget
from evomem.files.reading import whole_number
from evomem.managers.base import check_budget
from evomem.models import LoadedModel
from evomem.report.evolving import scenarios_of
from evomem.report.packages import require_for
from evomem.report.protocols import default_protocol
from evomem.report.subjects import Subject, searched_tasks
from evomem.runs.experiment_parts import TaskConfig
from evomem.tasks.base import Split, at_hand
from evomem.tasks.building import is_stream
from evomem.validation import validate

logger = logging.getLogger("evomem")

Say = Callable[[str], None]

MODEL = "smollm2-135m"
"""What a manager without a search is measured on when no model is named."""
STREAM_MODEL = "pair-memory"
"""The same where all tasks are streams of requests."""
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


def checked_scenarios(
    conditions: Conditions,
    subjects: Sequence[Subject],
    entrants: int,
    say: Say,
    *,
    check: bool,
) -> tuple[list[Scenario], int]:
    """Return where subjects are measured and the samples there, once it is sure that there is room and a task."""
    scenarios = make_scenarios(conditions, subjects)
    count = conditions.samples or subjects[0].samples or SAMPLES
    require_room(conditions, scenarios, count, entrants, say)
    for scenario in scenarios if check else ():
        require_above_chance(scenario, conditions.split, count)
    return scenarios, count


def check_tasks(specs: Sequence[str]) -> None:
    """Check the names and options of tasks, which needs no model; raise `ConfigError` for one that is wrong."""
    from evomem.tasks.building import check_options

    for spec in specs:
        check_options(spec)


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


def protocol_for(
    loaded: LoadedModel, text: str | None, conditions: Conditions, subjects: Sequence[Subject]
) -> EvaluationProtocol:
    """Return the protocol under which subjects are measured on a model: the user's, or `default_protocol`, and say so.

    Parameters
    ----------
    text : what the user wrote for this model (`parse_protocol`); None: nothing.
    """
    default, sentence = default_protocol(loaded, subjects)
    if sentence and text is None:
        logger.warning(sentence)
    return parse_protocol(text, conditions.mode, default)


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
    tasks = [TaskConfig(spec=spec) for spec in conditions.tasks] or list(searched_tasks(subjects))
    if not tasks:
        raise ConfigError(
            "--task: say what to measure on, e.g. --task multikey_1:length=500 (evomem list tasks; from Python: "
            'tasks="multikey_1:length=500")'
        )
    streams = all(is_stream(task.spec) for task in tasks)
    searched = next((subject.models for subject in subjects if subject.models), (STREAM_MODEL if streams else MODEL,))
    models: Sequence[str | LoadedModel] = conditions.models or searched
    if conditions.models and not conditions.tasks:  # the user's models do what others did in the search
        tasks = list({task.title: task.for_all_models() for task in tasks}.values())
    parse_protocol(conditions.protocol, conditions.mode, EvaluationProtocol())  # before a model is loaded
    require_for([model for model in models if isinstance(model, str)], [task.spec for task in tasks])
    scenarios = []
    for model in models:
        loaded = load(model, conditions)
        scenarios += scenarios_of(loaded, tasks, protocol_for(loaded, conditions.protocol, conditions, subjects))
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
    entrants: int,
    say: Say,
) -> None:
    """Raise `PlanError` if a comparison needs more memory, disk or time than there is (`evomem.evaluation.needs`).

    Parameters
    ----------
    count : samples per scenario.
    entrants : managers at budgets that are measured.
    say : told of a plan that will take long.
    """
    from evomem.evaluation.needs import Work, needs_of, require

    each, works = entrants * (1 + conditions.exact), []
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
