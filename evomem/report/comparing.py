"""Report: a comparison as a whole, as `evomem.compare`: subjects resolved, models loaded, everything measured."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evomem.errors import ConfigError
from evomem.evaluation.compare import NamedManager, Progress, field_of
from evomem.evaluation.compare import compare as compare_managers
from evomem.evaluation.compare import evaluate as evaluate_manager
from evomem.evaluation.rows import Budget, Row, check_price
from evomem.models import LoadedModel
from evomem.report.conditions import Conditions, Say, budgets_of, check_tasks, checked_scenarios
from evomem.report.outputs import claim
from evomem.report.pictures import claim_folder, draw_comparison
from evomem.report.subjects import Source, Subject, own_budgets, resolve, resolve_all, unsearched
from evomem.report.tables import keep_rows, partial_file, repriced_samples, samples_file
from evomem.report.variants import variants_of
from evomem.tasks.base import Split

logger = logging.getLogger("evomem")


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
    price_per_megabyte: float | None = None,
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
    price_per_megabyte : nats per 10^6 bytes of mean memory, as ``fitness.price_per_megabyte`` of a search: rows have a
        net value and are ordered by it. Without ``budgets`` every manager that has a budget is measured at its own.
    check : refuse a task at which the full cache is no better than no context.
    dtype, device : of the models that are loaded.
    plan_check : refuse what needs more memory, disk or time than there is.
    out : JSON file for the rows, with the samples beside it; a comparison that was killed goes on there. One that is
        finished is not measured again where only the price is another.
    plots : folder for pictures: score against bytes (``memory.png``), and a heat map of the slots of every layer and KV
        head (``heads.png``).
    progress : called with (samples done, samples in all).

    Returns
    -------
    list of `evomem.evaluation.rows.Row` : by model, task and budget, the largest log-likelihood (net) first.

    Raises
    ------
    ConfigError : a name, budget, price, protocol, split or task is not valid; no budget or no task is known.
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
        allocations=_listed(allocations),
        oracle=oracle,
        price_per_megabyte=price_per_megabyte,
        check=check,
        output=path,
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
    price_per_megabyte: float | None = None,
    check: bool = True,
    output: str | None = None,
    progress: Progress | None = None,
    say: Say = logger.warning,
) -> list[Row]:
    """Compare subjects with the field; see `compare`.

    Parameters
    ----------
    output : where the rows will be written; finished samples wait beside it for the rest.
    say : told of a plan that will take long, and of allocations' numbers that are left out or were never searched.
    """
    check_price(price_per_megabyte)
    check_tasks(conditions.tasks)
    subjects = resolve_all(sources)
    variants = variants_of(subjects, allocations, say)
    field = field_of(against)  # before a model is loaded: a name may be wrong
    say_unsearched(subjects, field, say)
    priced = price_per_megabyte is not None and not conditions.budgets
    separate = own_budgets(subjects, variants, field) if priced else {}
    budgets = (None,) if priced else budgets_of(conditions, subjects)
    names = [*(one.name for one in subjects), *(one.name for one in [*variants, *field]), "full"]
    entrants = sum(len(separate.get(name, budgets)) for name in names)
    scenarios, count = checked_scenarios(conditions, subjects, entrants, say, check=check)
    comparison = compare_managers(
        [NamedManager(subject.name, subject.manager) for subject in subjects] + variants,
        scenarios,
        samples=count,
        budgets=budgets,
        against=against,
        split=conditions.split,
        exact=conditions.exact,
        oracle=oracle,
        price_per_megabyte=price_per_megabyte,
        own_budgets=separate,
        keep=partial_file(output),
        finished=repriced_samples(output, price_per_megabyte),
        progress=progress,
    )
    return comparison.rows


def say_unsearched(subjects: Sequence[Subject], field: Sequence[NamedManager], say: Say) -> None:
    """Say which managers were built from a text and have numbers that only a search gives."""
    counts = {subject.name: subject.unsearched for subject in subjects}
    counts |= {member.name: unsearched(member.manager) for member in field}
    for name, count in counts.items():
        if count:
            numbers = "number was not searched; it is" if count == 1 else f"{count} numbers were not searched; they are"
            say(f"{name}: its {numbers} as a search begins")


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
    say_unsearched([subject], (), say)
    budgets: Sequence[Budget] = conditions.budgets or subject.budgets
    if not budgets and subject.manager.name == "full":
        budgets = (None,)
    budgets = budgets or budgets_of(conditions, [subject])
    scenarios, count = checked_scenarios(conditions, [subject], len(budgets), say, check=check)
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


def _listed(specs: Any) -> list[Any]:
    """Return specs as a list; what is none is one, which is then refused by its name."""
    return list(specs) if isinstance(specs, list | tuple) else [specs]


def claim_rows(option: str, output: str | None) -> str | None:
    """Return where rows are written, see `claim`; their samples lie beside them."""
    return claim(option, output, lambda path: [samples_file(path)])


def split_called(name: str) -> Split:
    """Return a split by its name; raise `ConfigError` if there is none."""
    try:
        return Split(name)
    except ValueError:
        raise ConfigError(f"split {name!r}: is none of {', '.join(Split)}") from None
