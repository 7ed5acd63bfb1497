"""Run: what evaluates a unit: its vectors become managers, and the bench measures them; called by worker pools."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from evomem.errors import RunError
from evomem.evaluation.measurement import Evaluation, Step
from evomem.evaluation.measures import Draws
from evomem.managers.base import MemoryManager, managers
from evomem.managers.stochastic import StochasticManager
from evomem.runs.bench import Bench, CandidateEvaluator
from evomem.runs.samples import Samples
from evomem.search_space.space import SearchSpace
from evomem.tasks.base import Task
from evomem.workers.units import RolloutVectors, Unit


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
            evaluations = self._rollouts(unit, unit.rollouts, task, evaluator)
        else:
            evaluations = evaluator.evaluate(self._managers(unit), unit.sample, task, unit.measurement)
        if len(evaluations) != unit.candidates:
            raise RunError(f"unit {unit.key}: {unit.candidates} evaluations expected, {len(evaluations)} came back")
        return evaluations

    def _rollouts(
        self, unit: Unit, wanted: RolloutVectors, task: Task, evaluator: CandidateEvaluator
    ) -> list[Evaluation]:
        """Return rollouts of the one policy that a unit's candidates are; gradients in the coordinates it learns."""
        if unit.vectors is None or (unit.vectors != unit.vectors[:1]).any():
            raise RunError(f"unit {unit.key}: rollouts are of one policy; these candidates are several")
        behaviour, reference = (self._policy(unit, vector) for vector in (wanted.behaviour, wanted.reference))
        draws = Draws([int(seed) for seed in unit.seeds], behaviour, reference)
        evaluations = evaluator.evaluate(self._managers(unit), unit.sample, task, unit.measurement, draws)
        return [
            replace(one, steps=tuple(self._mapped(step, wanted.learns) for step in one.steps or ()))
            for one in evaluations
        ]

    def _policy(self, unit: Unit, vector: NDArray[np.float64] | None) -> StochasticManager | None:
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
