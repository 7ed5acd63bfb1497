"""Run: candidates into units of work, and their evaluations into a fitness per candidate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from evomem.devices import CURES
from evomem.drivers.base import Population
from evomem.drivers.estimators import Rollouts
from evomem.errors import OutOfMemoryError
from evomem.evaluation.measurement import NOTHING, Evaluation, Measurement
from evomem.evaluation.objectives.base import Objective
from evomem.files.strict_json import as_float
from evomem.runs.chunks import Chunks
from evomem.runs.config import Stage
from evomem.runs.experiment_parts import Budget, TaskConfig
from evomem.runs.fitness import (
    MeasuredFitness,
    TaskValues,
    baseline_scale,
    combine,
    mean_of_finite,
    measurement_of,
    objective_of,
    range_scale,
    rollouts_of,
    weighted_mean,
    worth,
)
from evomem.runs.journaled_pool import JournaledPool
from evomem.runs.samples import Samples
from evomem.tasks.base import Sample
from evomem.workers.units import RolloutVectors, Unit

Vectors = NDArray[np.float64]
Seeds = NDArray[np.int64]


def rollout_vectors(population: Population) -> RolloutVectors:
    """Return what a driver's population asks for besides its vectors."""
    return RolloutVectors(population.behaviour, population.reference, population.learns)


@dataclass(frozen=True)
class Plan:
    """What some candidates are measured on.

    Attributes
    ----------
    phase, generation : see `Unit`; the phase is the first part of the units' keys.
    stage : tasks, budgets and fitness.
    samples : samples of every task of the stage, in its order.
    also : what is measured besides what the objective needs.
    rollouts : measure rollouts of one policy, with gradients.
    """

    phase: str
    generation: int | None
    stage: Stage
    samples: tuple[tuple[Sample, ...], ...]
    also: Measurement = NOTHING
    rollouts: RolloutVectors | None = None

    def measurements(self) -> list[tuple[int, int, Budget | None]]:
        """Return the index of the task, the index of its sample, and the budget of everything that is measured."""
        return [
            (task, sample, budget)
            for task, samples in enumerate(self.samples)
            for sample in range(len(samples))
            for budget in self.stage.budgets or (None,)
        ]

    @property
    def together(self) -> bool:
        """Whether all rollouts on a sample must be one unit: they are compared head by head where they are drawn."""
        return self.rollouts is not None and objective_of(self.stage.fitness).compares_draws

    @property
    def measurement(self) -> Measurement:
        """What the evaluator is asked for."""
        return measurement_of(self.stage.fitness, drawn=self.rollouts is not None).also(self.also)


@dataclass(frozen=True)
class Row:
    """Evaluations of all candidates on one sample at one budget."""

    task: TaskConfig
    budget: int | float | None
    evaluations: list[Evaluation]


def by_head(rows: Sequence[Row], objective: Objective) -> Vectors:
    """Return the heads' fitness (candidates, layers * kv_heads): weighted mean over tasks, samples and budgets."""
    total = sum(row.task.weight for row in rows)
    tables = [[objective.per_head(evaluation) for evaluation in row.evaluations] for row in rows]
    measured = (table for row in tables for table in row if table is not None)
    nothing = np.full(np.size(next(measured, ())), np.nan)  # for a candidate that could not be evaluated
    heads = [
        row.task.weight / total * np.array([nothing if table is None else table for table in of_row])
        for row, of_row in zip(rows, tables, strict=True)
    ]
    return np.asarray(np.sum(heads, axis=0), dtype=np.float64)


def by_bytes(rows: Sequence[Row]) -> Vectors:
    """Return the measured bytes (candidates,): weighted mean over tasks, samples and budgets; NaN if not known."""
    sizes = [[as_float(evaluation.bytes_mean) for evaluation in row.evaluations] for row in rows]
    return np.asarray(np.average(sizes, axis=0, weights=[row.task.weight for row in rows]), dtype=np.float64)


class Judge:
    """Gives candidates their fitness.

    Parameters
    ----------
    units : evaluates units, each once.
    samples : names tasks.
    chunks : how many candidates are a unit, and when.
    """

    def __init__(self, units: JournaledPool, samples: Samples, chunks: Chunks) -> None:
        self._units = units
        self._samples = samples
        self._chunks = chunks

    def judge(self, plan: Plan, vectors: Vectors, seeds: Seeds) -> tuple[MeasuredFitness, list[Row]]:
        """Return the fitness of candidates (candidates, dim), and all evaluations.

        Raises
        ------
        OutOfMemoryError : see `measure`.
        """
        rows = self.measure(plan, plan.measurement, vectors, seeds)
        return self._fitness(plan, rows), rows

    def measure(self, plan: Plan, measurement: Measurement, vectors: Vectors, seeds: Seeds) -> list[Row]:
        """Return the evaluations of candidates (candidates, dim): a row per task, sample and budget, in this order.

        Where memory ends, the whole plan is measured again in units of half the size: candidates that are compared
        are measured in batches of one shape.

        Raises
        ------
        OutOfMemoryError : not even one candidate fits, or rollouts that must be one unit do not.
        """
        while True:
            try:
                return self._measure(plan, measurement, vectors, seeds)
            except OutOfMemoryError as error:
                if plan.together:
                    cure = CURES[error.memory]
                    raise OutOfMemoryError(f"{error} These rollouts are one unit. {cure}", error.memory) from error
                self._chunks.halve(plan.phase, plan.generation, len(vectors), error)

    def _measure(self, plan: Plan, measurement: Measurement, vectors: Vectors, seeds: Seeds) -> list[Row]:
        measurements = plan.measurements()
        size = self._chunks.at(plan.phase, plan.generation)
        units = [units_of(plan, self._samples, *what, vectors, seeds, measurement, size) for what in measurements]
        evaluations = self._units.evaluate([unit for chunks in units for unit in chunks])
        return [
            Row(plan.stage.tasks[task], budget, [one for unit in chunks for one in evaluations[unit.key]])
            for (task, _, budget), chunks in zip(measurements, units, strict=True)
        ]

    def _fitness(self, plan: Plan, rows: list[Row]) -> MeasuredFitness:
        objective = objective_of(plan.stage.fitness)
        baselines = self._baselines(plan)
        values: list[list[list[Vectors]]] = [[[] for _ in samples] for samples in plan.samples]
        by_budget: dict[str, list[tuple[float, float]]] = {}
        total = sum(task.weight for task in plan.stage.tasks)
        groups: list[Rollouts] = []
        for (task, sample, budget), row in zip(plan.measurements(), rows, strict=True):
            value = worth(row.evaluations, plan.stage.fitness, *baselines[task][sample])
            values[task][sample].append(value)
            weight = plan.stage.tasks[task].weight / len(plan.samples[task])
            by_budget.setdefault(f"mean_at_{budget}", []).append((mean_of_finite(value), weight))
            if plan.rollouts is not None:
                share = plan.stage.tasks[task].weight / total / len(plan.samples[task])
                share /= len(plan.stage.budgets or (None,))
                groups.append(rollouts_of(row.evaluations, value, plan.stage.fitness, share))
        tasks = [
            TaskValues(config.weight, np.stack([np.mean(sample, axis=0) for sample in of_task], axis=1))
            for config, of_task in zip(plan.stage.tasks, values, strict=True)
        ]
        one_model = len({task.model for task in plan.stage.tasks}) == 1
        return replace(
            combine(tasks, objective),
            per_head=by_head(rows, objective) if objective.headwise and one_model else None,
            costs=by_bytes(rows),
            rollouts=tuple(groups),
            by_budget={name: weighted_mean(pairs) for name, pairs in by_budget.items() if len(by_budget) > 1},
        )

    def _baselines(self, plan: Plan) -> list[list[tuple[float | None, float]]]:
        """Return what to subtract and what to divide by, per task and sample."""
        config = plan.stage.fitness
        if config.normalise == "none":
            return [[(None, 1.0)] * len(samples) for samples in plan.samples]
        objective = objective_of(config)
        nothing = objective.without_context if config.normalise == "range" else None
        measurement = objective.measurement if nothing is None else objective.measurement.also(Measurement.of(nothing))
        head = f"reference/{config.objective}" + ("" if nothing is None else f"+{nothing}")
        units = [
            [
                Unit(
                    key=f"{head}/{name}/{sample.id}",
                    phase="reference",
                    generation=None,
                    task=name,
                    sample=sample,
                    vectors=None,
                    seeds=np.zeros(1, dtype=np.int64),
                    measurement=measurement,
                )
                for sample in samples
            ]
            for name, samples in zip(map(self._samples.name, plan.stage.tasks), plan.samples, strict=True)
        ]
        evaluations = self._units.evaluate([unit for row in units for unit in row])
        full = [[objective.value(evaluations[unit.key][0]) for unit in row] for row in units]
        if nothing is not None:
            guessed = [[as_float(evaluations[unit.key][0].number(nothing)) for unit in row] for row in units]
            scales = [range_scale(*pair) for pair in zip(full, guessed, strict=True)]
            return [[(value, scale) for value in row] for row, scale in zip(guessed, scales, strict=True)]
        if objective.against_full == "subtract":
            return [[(value, 1.0) for value in row] for row in full]
        return [[(None, baseline_scale(row))] * len(row) for row in full]


def units_of(
    plan: Plan, samples: Samples, task: int, sample: int, budget: Budget | None, vectors: Vectors, seeds: Seeds,
    measurement: Measurement, size: int,
) -> list[Unit]:  # fmt: skip
    """Return the units of candidates on a sample of a task, by their indices, at a budget; ``size`` candidates each."""
    name, content = samples.name(plan.stage.tasks[task]), plan.samples[task][sample]
    head = plan.phase if plan.generation is None else f"{plan.phase}/{plan.generation}"
    head = f"{head}/{name}/{content.id}/{'own' if budget is None else budget}"
    units = []
    for chunk, begin in enumerate(range(0, len(vectors), size)):
        part = slice(begin, begin + size)
        units.append(
            Unit(
                key=f"{head}/{chunk}",
                phase=plan.phase,
                generation=plan.generation,
                task=name,
                sample=content,
                vectors=vectors[part],
                seeds=seeds[part],
                budget=budget,
                measurement=measurement,
                rollouts=plan.rollouts,
            )
        )
    return units
