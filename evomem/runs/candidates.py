"""Run: candidates into units of work, units into evaluations, each of them once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from evomem.devices import CURES, out_of_memory
from evomem.drivers.base import Population
from evomem.drivers.estimators import Rollouts
from evomem.errors import EvomemError, OutOfMemoryError, RunError
from evomem.evaluation.measurement import Evaluation, Step
from evomem.managers.base import MemoryManager, managers
from evomem.runs.bench import Bench
from evomem.runs.chunks import Chunks
from evomem.runs.config import Budget, Stage, TaskConfig
from evomem.runs.fitness import Fitness, TaskValues, baseline_scale, combine, objective_of, rollouts_of, worth
from evomem.runs.journal import Journal, Record, evaluations_of, unit_record
from evomem.runs.samples import Samples
from evomem.search_space.space import SearchSpace
from evomem.tasks.base import Sample, Task
from evomem.tracking.base import logger
from evomem.workers.units import Unit, WorkerPool

Vectors = NDArray[np.float64]
Seeds = NDArray[np.int64]


@dataclass(frozen=True)
class WantedRollouts:
    """Rollouts of one policy with their gradients: what else is needed than the vectors; see `Population`."""

    behaviour: Vectors | None = None
    reference: Vectors | None = None
    learns: NDArray[np.int64] | None = None

    @classmethod
    def of(cls, population: Population) -> Self:
        """Return what a driver's population asks for."""
        return cls(population.behaviour, population.reference, population.learns)


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
        if "rollouts" in unit.arguments:
            found = self._rollouts(unit, task, evaluator)
        else:
            found = evaluator.evaluate(self._managers(unit), unit.sample, task, **unit.arguments)
        if len(found) != unit.candidates:
            raise RunError(f"unit {unit.key}: {unit.candidates} evaluations expected, {len(found)} came back")
        return found

    def _rollouts(self, unit: Unit, task: Task, evaluator: Any) -> list[Evaluation]:
        """Return rollouts of the one policy that a unit's candidates are; gradients in the coordinates it learns."""
        if unit.vectors is None or (unit.vectors != unit.vectors[:1]).any():
            raise RunError(f"unit {unit.key}: rollouts are of one policy; these candidates are several")
        arguments = dict(unit.arguments)
        wanted = arguments.pop("rollouts")
        how = arguments.pop("costs", None)
        managers = self._managers(unit)
        seeds = [int(seed) for seed in unit.seeds]
        if how is not None:
            found = evaluator.costs(managers, unit.sample, how, seeds=seeds, gradient=True)
        else:
            others = {
                name: self._policy(unit, vector)
                for name, vector in (("behaviour", wanted.behaviour), ("reference", wanted.reference))
                if vector is not None
            }
            found = evaluator.rollouts(managers[0], unit.sample, task, seeds, **others, **arguments)
        return [
            replace(one, steps=tuple(self._mapped(step, wanted.learns) for step in one.steps or ())) for one in found
        ]

    def _policy(self, unit: Unit, vector: Vectors) -> MemoryManager:
        manager = self._space.decode(vector)
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
            found = evaluations_of(record)
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
    exact : generate text too, whatever the objective.
    rollouts : measure rollouts of one policy, with gradients.
    arguments : take these in place of the objective's; the fitness is then not worth looking at.
    """

    phase: str
    generation: int | None
    stage: Stage
    samples: tuple[tuple[Sample, ...], ...]
    exact: bool = False
    rollouts: WantedRollouts | None = None
    arguments: Mapping[str, Any] | None = None

    @property
    def together(self) -> bool:
        """Whether all rollouts on a sample must be one unit: they are compared head by head where they are drawn."""
        return self.rollouts is not None and bool(objective_of(self.stage.fitness).drawn)

    def evaluator_arguments(self) -> dict[str, Any]:
        """Return what the evaluator is asked for."""
        objective = objective_of(self.stage.fitness)
        if self.arguments is not None:
            return dict(self.arguments)
        found = dict(objective.arguments)
        if self.exact:
            found["exact"] = True
        if self.rollouts is not None:
            found |= objective.drawn
            found["rollouts"] = self.rollouts
            if self.stage.fitness.reading:
                found["listens"] = True
        return found


@dataclass(frozen=True)
class Row:
    """Evaluations of all candidates on one sample at one budget."""

    task: TaskConfig
    budget: int | float | None
    evaluations: list[Evaluation]


def by_head(rows: Sequence[Row]) -> Vectors:
    """Return the heads' fitness (candidates, layers * kv_heads): weighted mean over tasks, samples and budgets."""
    total = sum(row.task.weight for row in rows)
    measured = (evaluation.heads for row in rows for evaluation in row.evaluations if evaluation.heads is not None)
    nothing = np.full(np.size(next(measured, ())), np.nan)  # for a candidate that could not be evaluated
    heads = [
        row.task.weight
        / total
        * np.array([nothing if one.heads is None else np.ravel(one.heads) for one in row.evaluations])
        for row in rows
    ]
    return np.asarray(np.sum(heads, axis=0), dtype=np.float64)


def by_bytes(rows: Sequence[Row]) -> Vectors:
    """Return the measured bytes (candidates,): weighted mean over tasks, samples and budgets."""
    held = [[evaluation.bytes_mean for evaluation in row.evaluations] for row in rows]
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

    def judge(self, plan: Plan, vectors: Vectors, seeds: Seeds) -> tuple[Fitness, list[Row]]:
        """Return the fitness of candidates (candidates, dim), and all evaluations.

        Where memory ends, the whole plan is measured again in units of half the size: candidates that are compared
        are measured in batches of one shape.

        Raises
        ------
        OutOfMemoryError : not even one candidate fits, or rollouts that must be one unit do not.
        """
        while True:
            try:
                return self._judge(plan, vectors, seeds)
            except OutOfMemoryError as error:
                if plan.together:
                    cure = CURES[error.memory]
                    raise OutOfMemoryError(f"{error} These rollouts are one unit. {cure}", error.memory) from error
                self._chunks.halve(plan.phase, plan.generation, len(vectors), error)

    def _judge(self, plan: Plan, vectors: Vectors, seeds: Seeds) -> tuple[Fitness, list[Row]]:
        arguments = plan.evaluator_arguments()
        places = [
            (place, number, budget)
            for place, samples in enumerate(plan.samples)
            for number in range(len(samples))
            for budget in plan.stage.budgets or (None,)
        ]
        size = self._chunks.at(plan.phase, plan.generation)
        units = [units_of(plan, self._samples, *where, vectors, seeds, arguments, size) for where in places]
        found = self._measuring.evaluate([unit for chunks in units for unit in chunks])
        baselines = self._baselines(plan)
        values: list[list[list[Vectors]]] = [[[] for _ in samples] for samples in plan.samples]
        total = sum(task.weight for task in plan.stage.tasks)
        rows, groups = [], list[Rollouts]()
        for (place, number, budget), chunks in zip(places, units, strict=True):
            evaluations = [evaluation for unit in chunks for evaluation in found[unit.key]]
            rows.append(Row(plan.stage.tasks[place], budget, evaluations))
            value = worth(evaluations, plan.stage.fitness, *baselines[place][number])
            values[place][number].append(value)
            if plan.rollouts is not None:
                share = plan.stage.tasks[place].weight / total / len(plan.samples[place])
                share /= len(plan.stage.budgets or (None,))
                groups.append(rollouts_of(evaluations, value, plan.stage.fitness, share))
        tasks = [
            TaskValues(task.weight, np.stack([np.mean(sample, axis=0) for sample in values[place]], axis=1))
            for place, task in enumerate(plan.stage.tasks)
        ]
        fitness = replace(combine(tasks), held=by_bytes(rows), rollouts=tuple(groups))
        if objective_of(plan.stage.fitness).headwise and len({task.model for task in plan.stage.tasks}) == 1:
            fitness = replace(fitness, heads=by_head(rows))
        return fitness, rows

    def _baselines(self, plan: Plan) -> list[list[tuple[float | None, float]]]:
        """Return what to subtract and what to divide by, per task and sample."""
        config = plan.stage.fitness
        if config.normalise == "none" or plan.arguments is not None:
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
                    arguments=dict(objective.arguments),
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
    arguments: Mapping[str, Any], size: int,
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
                arguments=arguments,
            )
        )
    return units
