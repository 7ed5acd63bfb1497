"""Run: candidates into units of work, units into evaluations, each of them once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from evomem.devices import CURES, out_of_memory
from evomem.drivers.base import Population
from evomem.drivers.estimators import Rollouts
from evomem.errors import EvomemError, OutOfMemoryError, RunError
from evomem.evaluation.measurement import NOTHING, Evaluation, Measurement, Step
from evomem.evaluation.measures import Draws
from evomem.evaluation.objectives.base import Objective
from evomem.files.strict_json import as_float
from evomem.managers.base import MemoryManager, managers
from evomem.managers.stochastic import StochasticManager
from evomem.runs.bench import Bench, CandidateEvaluator
from evomem.runs.chunks import Chunks
from evomem.runs.config import Budget, Stage, TaskConfig
from evomem.runs.fitness import (
    MeasuredFitness,
    TaskValues,
    baseline_scale,
    combine,
    measurement_of,
    objective_of,
    rollouts_of,
    worth,
)
from evomem.runs.journal import Journal, Record, evaluations_of, unit_record
from evomem.runs.samples import Samples
from evomem.search_space.space import SearchSpace
from evomem.tasks.base import Sample, Task
from evomem.tracking.base import logger
from evomem.workers.units import RolloutVectors, Unit, WorkerPool

Vectors = NDArray[np.float64]
Seeds = NDArray[np.int64]


def rollout_vectors(population: Population) -> RolloutVectors:
    """Return what a driver's population asks for besides its vectors."""
    return RolloutVectors(population.behaviour, population.reference, population.learns)


class UnitEvaluator:
    """Evaluates a unit: decodes its vectors and asks the evaluator. What a worker pool calls.

    Parameters
    ----------
    space : decodes vectors.
    bench : measures.
    samples : gives the tasks by their names in units.
    """

    def __init__(self, space: SearchSpace, bench: Bench, samples: Samples) -> None:
        self._space = space
        self._bench = bench
        self._samples = samples
        self._decoded: dict[tuple[str, int | float | None], list[MemoryManager]] = {}

    def __call__(self, unit: Unit) -> list[Evaluation]:
        """Return one evaluation a candidate."""
        task, evaluator = self._samples.tasks[unit.task], self._bench.of(self._samples.configs[unit.task]).evaluator
        if unit.rollouts is not None:
            found = self._rollouts(unit, unit.rollouts, task, evaluator)
        else:
            found = evaluator.evaluate(self._managers(unit), unit.sample, task, unit.measurement)
        if len(found) != unit.candidates:
            raise RunError(f"unit {unit.key}: {unit.candidates} evaluations expected, {len(found)} came back")
        return found

    def _rollouts(
        self, unit: Unit, wanted: RolloutVectors, task: Task, evaluator: CandidateEvaluator
    ) -> list[Evaluation]:
        """Return rollouts of the one policy that a unit's candidates are; gradients in the coordinates it learns."""
        if unit.vectors is None or (unit.vectors != unit.vectors[:1]).any():
            raise RunError(f"unit {unit.key}: rollouts are of one policy; these candidates are several")
        behaviour, reference = (self._policy(unit, vector) for vector in (wanted.behaviour, wanted.reference))
        draws = Draws([int(seed) for seed in unit.seeds], behaviour, reference)
        found = evaluator.evaluate(self._managers(unit), unit.sample, task, unit.measurement, draws)
        return [
            replace(one, steps=tuple(self._mapped(step, wanted.learns) for step in one.steps or ())) for one in found
        ]

    def _policy(self, unit: Unit, vector: Vectors | None) -> StochasticManager | None:
        if vector is None:
            return None
        manager = self._space.decode(vector)
        if not isinstance(manager, StochasticManager):
            raise RunError(f"unit {unit.key}: manager {manager.name!r} draws no decisions; there are no rollouts of it")
        return manager if unit.budget is None else manager.with_options(budget=unit.budget)

    def _mapped(self, step: Step, learns: NDArray[np.int64] | None) -> Step:
        """Return a step whose gradients are in the coordinates of the search space, or in those of them that learn."""

        def mapped(packed: bytes) -> bytes:
            if not packed:
                return b""
            whole = self._space.gradient(Step.numbers(packed))
            return Step.pack(whole if learns is None else whole[learns])

        return replace(step, gradient=mapped(step.gradient), lower=mapped(step.lower))

    def _managers(self, unit: Unit) -> list[MemoryManager]:
        if unit.vectors is None:
            return [managers.get("full")()]
        key = (unit.digest, unit.budget)
        if key not in self._decoded:
            if len(self._decoded) >= 16:  # chunks of one generation; older ones do not come back
                self._decoded.pop(next(iter(self._decoded)))
            decoded = [self._space.decode(vector) for vector in unit.vectors]
            if unit.budget is not None:
                decoded = [manager.with_options(budget=unit.budget) for manager in decoded]
            self._decoded[key] = decoded
        return self._decoded[key]


class Measuring:
    """Evaluates units through a pool, once each: what the journal holds is taken from there.

    Parameters
    ----------
    journal : of the run.
    known : unit lines of the journal, by key; see `UnitEvaluator` for what they hold.
    """

    def __init__(self, pool: WorkerPool, journal: Journal, known: Iterable[Record]) -> None:
        self._pool = pool
        self._journal = journal
        self._told: set[str] = set()
        self._known = {(record["key"], record["candidates"]): record for record in known}

    def evaluate(self, units: Sequence[Unit]) -> dict[str, list[Evaluation]]:
        """Return the evaluations of all units by key.

        Raises
        ------
        RunError : a unit failed on every attempt; a sample is no longer the one that the journal knows by its name.
            Errors of evomem itself are passed on at once.
        OutOfMemoryError : a unit does not fit into memory.
        """
        results: dict[str, list[Evaluation]] = {}
        missing = []
        for unit in units:
            record = self._known.get((unit.key, unit.digest))
            found = None if record is None else self._of_journal(record, unit)
            if found is None:
                missing.append(unit)
            else:
                results[unit.key] = found
        attempts: Counter[str] = Counter()
        for outcome in self._pool.evaluate(missing):
            key = outcome.unit.key
            if outcome.error is None:
                for told, candidate in zip(outcome.quarantined, outcome.digests, strict=True):
                    if candidate not in self._told:
                        logger.warning(told)
                        self._told.add(candidate)
                    self._journal.event("quarantined", key=key, candidate=candidate, message=told)
                record = unit_record(outcome)
                self._journal.append(record)
                if outcome.unit.generation is None:  # units outside a generation are asked for again
                    self._known[key, outcome.unit.digest] = record
                results[key] = outcome.evaluations
                continue
            attempts[key] += 1
            self._journal.event(
                "attempt_failed",
                key=key,
                attempt=attempts[key],
                seconds=outcome.seconds,
                error=f"{type(outcome.error).__name__}: {outcome.error}",
            )
            if isinstance(outcome.error, EvomemError):
                raise outcome.error
            if not outcome.again:  # at first it is tried once more: another process may have had the memory
                ended = out_of_memory(outcome.error, f"unit {key} of {outcome.unit.candidates} candidates")
                if ended is not None:
                    raise ended
                raise RunError(
                    f"unit {key} failed {attempts[key]} times; the last time: "
                    f"{type(outcome.error).__name__}: {outcome.error}. "
                    "What is finished is kept: mend the cause and resume the run"
                ) from outcome.error
        return results

    def agrees(self, generation: int, candidates: set[str]) -> bool:
        """Whether the journal has evaluated some of these candidates in a generation, or nothing of it."""
        known = {
            digest
            for (_, digest), record in self._known.items()
            if record["generation"] == generation and record["phase"] == "train"
        }
        return not known or not known.isdisjoint(candidates)

    def _of_journal(self, record: Record, unit: Unit) -> list[Evaluation] | None:
        """Return what the journal says of a unit; None if it is damaged, so that the unit is evaluated again."""
        content = record.get("content", unit.sample.digest)  # older lines have none
        if content != unit.sample.digest:
            raise RunError(
                f"unit {unit.key}: sample {unit.sample.id} is another one than when it was evaluated ({content} -> "
                f"{unit.sample.digest}): the data of its task, or the package that makes it, has changed since the run "
                "began. Put it back to resume this run, or begin another one in another folder"
            )
        try:
            found = evaluations_of(record, unit.measurement)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            found = []
        if len(found) != unit.candidates or any(one.sample != unit.sample.id for one in found):
            message = f"journal.jsonl: the line of unit {unit.key} is damaged; it is evaluated again"
            logger.warning(message)
            self._journal.event("warning", message=message)
            return None
        return found

    def forget(self, generation: int) -> None:
        """Drop what is known of generations up to this one; they do not come back."""
        self._known = {
            key: record
            for key, record in self._known.items()
            if record["generation"] is None or record["generation"] > generation
        }


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

    def places(self) -> list[tuple[int, int, Budget | None]]:
        """Return the number of the task, the number of the sample, and the budget of everything that is measured."""
        return [
            (place, number, budget)
            for place, samples in enumerate(self.samples)
            for number in range(len(samples))
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
    held = [[as_float(evaluation.bytes_mean) for evaluation in row.evaluations] for row in rows]
    return np.asarray(np.average(held, axis=0, weights=[row.task.weight for row in rows]), dtype=np.float64)


class Judge:
    """Gives candidates their fitness.

    Parameters
    ----------
    measuring : evaluates units.
    samples : names tasks.
    chunks : how many candidates are a unit, and when.
    """

    def __init__(self, measuring: Measuring, samples: Samples, chunks: Chunks) -> None:
        self._measuring = measuring
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
        places = plan.places()
        size = self._chunks.at(plan.phase, plan.generation)
        units = [units_of(plan, self._samples, *where, vectors, seeds, measurement, size) for where in places]
        found = self._measuring.evaluate([unit for chunks in units for unit in chunks])
        return [
            Row(plan.stage.tasks[place], budget, [evaluation for unit in chunks for evaluation in found[unit.key]])
            for (place, _, budget), chunks in zip(places, units, strict=True)
        ]

    def _fitness(self, plan: Plan, rows: list[Row]) -> MeasuredFitness:
        objective = objective_of(plan.stage.fitness)
        baselines = self._baselines(plan)
        values: list[list[list[Vectors]]] = [[[] for _ in samples] for samples in plan.samples]
        total = sum(task.weight for task in plan.stage.tasks)
        groups: list[Rollouts] = []
        for (place, number, _), row in zip(plan.places(), rows, strict=True):
            value = worth(row.evaluations, plan.stage.fitness, *baselines[place][number])
            values[place][number].append(value)
            if plan.rollouts is not None:
                share = plan.stage.tasks[place].weight / total / len(plan.samples[place])
                share /= len(plan.stage.budgets or (None,))
                groups.append(rollouts_of(row.evaluations, value, plan.stage.fitness, share))
        tasks = [
            TaskValues(task.weight, np.stack([np.mean(sample, axis=0) for sample in values[place]], axis=1))
            for place, task in enumerate(plan.stage.tasks)
        ]
        one_model = len({task.model for task in plan.stage.tasks}) == 1
        return replace(
            combine(tasks, objective),
            per_head=by_head(rows, objective) if objective.headwise and one_model else None,
            costs=by_bytes(rows),
            rollouts=tuple(groups),
        )

    def _baselines(self, plan: Plan) -> list[list[tuple[float | None, float]]]:
        """Return what to subtract and what to divide by, per task and sample."""
        config = plan.stage.fitness
        if config.normalise == "none":
            return [[(None, 1.0)] * len(samples) for samples in plan.samples]
        objective = objective_of(config)
        units = [
            [
                Unit(
                    key=f"reference/{config.objective}/{name}/{sample.id}",
                    phase="reference",
                    generation=None,
                    task=name,
                    sample=sample,
                    vectors=None,
                    seeds=np.zeros(1, dtype=np.int64),
                    measurement=objective.measurement,
                )
                for sample in samples
            ]
            for name, samples in zip(map(self._samples.name, plan.stage.tasks), plan.samples, strict=True)
        ]
        found = self._measuring.evaluate([unit for row in units for unit in row])
        full = [[objective.value(found[unit.key][0]) for unit in row] for row in units]
        if objective.against_full == "subtract":
            return [[(value, 1.0) for value in row] for row in full]
        return [[(None, baseline_scale(row))] * len(row) for row in full]


def units_of(
    plan: Plan, samples: Samples, place: int, number: int, budget: Budget | None, vectors: Vectors, seeds: Seeds,
    measurement: Measurement, size: int,
) -> list[Unit]:  # fmt: skip
    """Return the units of candidates on sample ``number`` of task ``place`` at one budget, ``size`` candidates each."""
    name, sample = samples.name(plan.stage.tasks[place]), plan.samples[place][number]
    head = plan.phase if plan.generation is None else f"{plan.phase}/{plan.generation}"
    head = f"{head}/{name}/{sample.id}/{'own' if budget is None else budget}"
    units = []
    for chunk, begin in enumerate(range(0, len(vectors), size)):
        part = slice(begin, begin + size)
        units.append(
            Unit(
                key=f"{head}/{chunk}",
                phase=plan.phase,
                generation=plan.generation,
                task=name,
                sample=sample,
                vectors=vectors[part],
                seeds=seeds[part],
                budget=budget,
                measurement=measurement,
                rollouts=plan.rollouts,
            )
        )
    return units
