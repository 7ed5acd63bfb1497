"""Evaluation: managers side by side on the same samples at the same budgets, with paired intervals."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evomem.devices import named
from evomem.errors import ConfigError
from evomem.evaluation.entrants import (
    ROWS,
    SPREAD,
    Entrant,
    NamedManager,
    Pool,
    Progress,
    ResultKey,
    Scenario,
    entrants_of,
    measure,
    pools_of,
)
from evomem.evaluation.measurement import Evaluation
from evomem.evaluation.oracle import FutureOracle
from evomem.evaluation.rows import Budget, Measured, Row, check_price, rows_of
from evomem.managers import build, names
from evomem.tasks.base import Split

__all__ = [
    "ROWS",
    "SPREAD",
    "Comparison",
    "NamedManager",
    "Pool",
    "Progress",
    "Scenario",
    "compare",
    "evaluate",
    "field_of",
]

logger = logging.getLogger("evomem")


@dataclass(frozen=True)
class Comparison:
    """What came out.

    Attributes
    ----------
    subject : name of the manager that the others are set against; None for a plain evaluation.
    rows : by model, task and budget, the largest log-likelihood (with a price: the largest net) first.
    evaluations : per row's key (model, task, manager, budget), its evaluations in the order of the samples.
    measured : what the rows were made of.
    """

    subject: str | None
    rows: list[Row]
    evaluations: dict[ResultKey, list[Evaluation]]
    measured: list[Measured]


def field_of(against: str | Sequence[str] | None) -> list[NamedManager]:
    """Return the managers that subjects are set against.

    Parameters
    ----------
    against : specs such as ``keydiff`` or ``adakv(keydiff)``; None or ``all``: every heuristic, ``lru`` and
        other policies of caches among them, and ``adakv(keydiff)``; not ``kvzip``, for which every context is read
        twice.

    Raises
    ------
    ConfigError : a spec cannot be read, or names no manager.
    """
    specs = [against] if isinstance(against, str) else list(against) if against is not None else ["all"]
    chosen: list[str] = []
    for spec in specs:
        if spec == "all":
            chosen += [f"{name}(keydiff)" if name == "adakv" else name for name in _heuristics()]
        elif spec != "full":
            chosen.append(spec)
    return [NamedManager(spec, build(spec)) for spec in dict.fromkeys(chosen)]


def _heuristics() -> list[str]:
    """Return all managers but the reference, which is always there, those with numbers of a search, and costly ones."""
    leave_out = ("full", "evicted_rows", "refit", "kvzip")  # the last reads every context twice
    return [name for name in names() if name not in leave_out and not any(True for _ in build(name).parameters())]


def compare(
    subjects: Sequence[NamedManager],
    scenarios: Sequence[Scenario],
    *,
    samples: int,
    budgets: Sequence[Budget] = (None,),
    against: str | Sequence[str] | None = None,
    split: Split = Split.SEALED,
    seed: int = 0,
    exact: bool = True,
    oracle: bool = False,
    price_per_megabyte: float | None = None,
    own_budgets: Mapping[str, Sequence[Budget]] | None = None,
    keep: Path | None = None,
    finished: Path | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Evaluate subjects, field and the full cache on the same samples.

    Parameters
    ----------
    subjects : what the comparison is about; the first is the one that differences are taken of.
    scenarios : models and tasks.
    samples : per task; fewer where a split has no more (`Row.remark`).
    budgets : every manager is evaluated at each; None: at its own. A manager that takes no budget is evaluated as it
        is, once. So is the full cache; without a field it is left out too.
    against : the field, see `field_of`; an empty list: none.
    exact : also generate, for the exact metric.
    oracle : at every budget also the decision that knows what question and answer will attend to (`FutureOracle`): no
        manager can know that, so it is a mark, and no competitor.
    price_per_megabyte : nats per 10^6 bytes of mean memory, by which rows get a net value. What is measured does not
        depend on it.
    own_budgets : by name, the budgets that a manager is evaluated at in place of ``budgets``.
    keep : file to which every finished sample is appended; a comparison that was killed goes on from it.
    finished : file of an earlier comparison, whose samples are taken over if it measured the same.
    progress : called with samples done and samples in all.

    Raises
    ------
    ConfigError : two managers have the same name, the price is none, or ``keep`` holds another comparison.
    TaskError : a split has no samples, or one is longer than a model can read.
    EvaluationError : a manager's likelihood, score or memory on a sample is NaN or infinite.
    """
    check_price(price_per_megabyte)
    own_budgets = {} if own_budgets is None else own_budgets
    scenarios, budgets = _distinct(scenarios, budgets)
    _require_distinct([*budgets, *(budget for some in own_budgets.values() for budget in some)])
    field = field_of(against)
    names_taken = {subject.name for subject in subjects}
    field = [member for member in field if member.name not in names_taken]
    if against is None or "all" in ([against] if isinstance(against, str) else against):
        field = _applicable(field, scenarios)
    entrants = entrants_of(subjects, "subject", budgets, own_budgets) + entrants_of(
        field, "field", budgets, own_budgets
    )
    if "full" not in names_taken and field:
        entrants += entrants_of([NamedManager("full", build("full"))], "full", budgets)
    if oracle:
        if any(scenario.evaluator.protocol.kind != "compress_once" for scenario in scenarios):
            raise ConfigError("oracle: what will be attended to is known under the protocol compress_once only")
        limits = dict.fromkeys(entrant.budget for entrant in entrants if entrant.budget is not None)
        entrants += [Entrant(FutureOracle.name, "oracle", budget, FutureOracle((), budget=budget)) for budget in limits]
    pools = pools_of(scenarios, samples, split, seed, exact=exact)
    evaluations = measure(
        entrants, pools, split=split, seed=seed, exact=exact, keep=keep, finished=finished, progress=progress
    )
    first = subjects[0].name
    return _comparison(first, first, entrants, pools, evaluations, split, price_per_megabyte)


def evaluate(
    subject: NamedManager,
    scenarios: Sequence[Scenario],
    *,
    samples: int,
    budgets: Sequence[Budget] = (None,),
    split: Split = Split.SEALED,
    seed: int = 0,
    exact: bool = True,
    keep: Path | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Evaluate one manager, without a comparison; see `compare`."""
    scenarios, budgets = _distinct(scenarios, budgets)
    entrants = entrants_of([subject], "subject", budgets)
    pools = pools_of(scenarios, samples, split, seed, exact=exact)
    evaluations = measure(entrants, pools, split=split, seed=seed, exact=exact, keep=keep, progress=progress)
    return _comparison(None, subject.name, entrants, pools, evaluations, split)


def _applicable(field: Sequence[NamedManager], scenarios: Sequence[Scenario]) -> list[NamedManager]:
    """Return the members of "all" that decide about the memories of all scenarios; the others are warned of."""
    kept = []
    for member in field:
        reasons = [scenario.evaluator.refusal(member.manager) for scenario in scenarios]
        if reason := next(filter(None, reasons), ""):
            logger.warning("%s is left out of the field: %s", member.name, reason)
        else:
            kept.append(member)
    return kept


def _distinct(scenarios: Sequence[Scenario], budgets: Sequence[Budget]) -> tuple[list[Scenario], list[Budget]]:
    """Return scenarios and budgets without those that are named again: twice the samples would halve an interval.

    Raises
    ------
    ConfigError : 1 and 1.0, a slot and everything, which the rows could not tell apart.
    """
    distinct = _require_distinct(budgets)
    descriptions: dict[tuple[str, str], list[str]] = {}
    kept = []
    for scenario in scenarios:
        description = json.dumps(
            [scenario.subject_task.name, scenario.subject_task.describe()], sort_keys=True, default=str
        )
        same_title = descriptions.setdefault((scenario.model, scenario.task), [])
        if description not in same_title:
            same_title.append(description)
            # Tasks that differ in options which their title does not tell are two, and their samples do not mix.
            kept.append(
                scenario if len(same_title) == 1 else replace(scenario, task=f"{scenario.task} ({len(same_title)})")
            )
    return kept, distinct


def _require_distinct(budgets: Sequence[Budget]) -> list[Budget]:
    """Return budgets once each; raise `ConfigError` where 1 and 1.0 are among them."""
    distinct = list({(type(budget), budget): budget for budget in budgets}.values())
    if len(set(distinct)) < len(distinct):
        raise ConfigError("budgets: 1 is one slot and 1.0 is everything; compare at one after the other")
    return distinct


def _comparison(
    subject: str | None,
    first: str,
    entrants: Sequence[Entrant],
    pools: Sequence[Pool],
    evaluations: dict[ResultKey, list[Evaluation]],
    split: Split,
    price_per_megabyte: float | None = None,
) -> Comparison:
    rows: list[Row] = []
    measured: list[Measured] = []
    for pool in pools:
        scenario, reach = pool.scenario, pool.reach
        measured_here = [
            Measured(
                model=scenario.model,
                task=scenario.task,
                manager=entrant.name,
                budget=entrant.budget,
                protocol=str(scenario.evaluator.protocol),
                split=str(split),
                role=entrant.role,
                evaluations=evaluations[scenario.model, scenario.task, entrant.name, entrant.budget],
                dtype=scenario.evaluator.loaded.dtype,
                device=named(scenario.evaluator.loaded.devices),
                prefix=scenario.evaluator.encoder.spelled,
                chat_template=scenario.chat_template,
                remark=pool.remark,
                longest=None if reach.limit is None else reach.longest,
                positions=reach.limit,
            )
            for entrant in entrants
        ]
        rows += rows_of(first, measured_here, price_per_megabyte)
        measured += measured_here
    return Comparison(subject, rows, evaluations, measured)
