"""Run: what a search will take, from its configuration alone: nothing is read or drawn for it yet."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomem.evaluation.needs import RECORD, Needs, Work, length_of, needs_of
from evomem.managers import names
from evomem.runs.bench import Bench
from evomem.runs.config import ExperimentConfig, Stage
from evomem.runs.samples import Samples
from evomem.tasks.base import Split, at_hand

_POPULATION, _CHUNK = 16, 32
"""Where neither the experiment nor its driver says."""
_FULL = frozenset({"cmaes", "evotorch_cmaes", "xnes", "lra_cma", "catcma"})
"""Drivers that keep a covariance of all numbers, unless they are told to keep its diagonal."""


def search_needs(config: ExperimentConfig, bench: Bench, samples: Samples, folder: Path, workers: int = 1) -> Needs:
    """Return what a whole search takes: generations, choice of the winner, report, and comparison with the field."""
    plan = config.plan()
    tasks = {samples.name(task): task for stage in plan for task in stage.tasks}
    works = []
    for name, task in tasks.items():
        stages = [stage for stage in plan if any(samples.name(one) == name for one in stage.tasks)]
        drawn = sum((stage.end - stage.begin) * stage.samples_per_generation for stage in stages)
        built = samples.tasks[name]
        train = min(drawn, at_hand(built, Split.TRAIN, max(stage.train_contexts for stage in stages)))
        select = at_hand(built, Split.SELECT, config.select.contexts)
        sealed = at_hand(built, Split.SEALED, config.sealed.contexts)
        evaluations = sum(
            (stage.end - stage.begin) * population(stage) * stage.samples_per_generation * max(1, len(stage.budgets))
            for stage in stages
        )
        budgets = max(1, len(plan[-1].budgets))
        finalists = 2 + config.select.top + config.select.snapshots
        field = len(config.against) or len(list(names()))
        evaluations += budgets * (finalists * select + (2 + field) * sealed)
        works.append(
            Work(
                model=_model(bench.of(task)),
                task=built,
                contexts=train + select + 2 * sealed,
                evaluations=evaluations,
                rows=max(min(config.chunk or _CHUNK, population(stage)) for stage in stages),
                share=max(_share(stage, config, length_of(built)) for stage in stages),
                keeps=True,
            )
        )
    facts = bench.facts.get("store_bytes") if config.store_bytes is None else config.store_bytes
    store = int(facts) if facts is not None else 2 << 30
    needs = needs_of(works, store=store, spill=Path(tempfile.gettempdir()), workers=workers)
    needs.write(folder, needs.evaluations * RECORD)
    return needs


def vectors_needs(config: ExperimentConfig, dim: int) -> Needs:
    """Return what the drivers take for vectors of ``dim`` numbers: populations, and covariances where they are full."""
    largest = 0.0
    for stage in config.plan():
        options: Mapping[str, Any] = stage.driver.options
        full = stage.driver.name in _FULL and not options.get("diagonal", stage.driver.name == "cmaes" and dim >= 500)
        largest = max(largest, 8.0 * dim * (4 * population(stage) + (3 * dim if full else 0)))
    return Needs(memory=largest)


def population(stage: Stage) -> int:
    """Return the candidates of a stage's generations, about."""
    return stage.driver.population or _POPULATION


def _share(stage: Stage, config: ExperimentConfig, length: int) -> float:
    budgets = stage.budgets or (config.space.manager.options.get("budget"),)
    shares = []
    for budget in budgets:
        if isinstance(budget, float):
            shares.append(budget)
        elif isinstance(budget, int) and not isinstance(budget, bool) and length:
            shares.append(budget / length)
        else:
            shares.append(1.0)
    return min(1.0, max(shares))


def _model(bench: Bench) -> Any:
    return getattr(getattr(bench.evaluator, "loaded", None), "model", None)
