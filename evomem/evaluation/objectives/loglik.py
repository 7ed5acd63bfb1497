"""Evaluation: objective ``loglik``, the answer's log-likelihood, and the measure that lets the model answer."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from evomem.errors import ConfigError
from evomem.evaluation.measurement import Evaluation, Measurement
from evomem.evaluation.measures import Draws, Measure, register_measure
from evomem.evaluation.objectives.base import ROLLOUT, Objective, register_objective
from evomem.evaluation.population import PopulationPolicy
from evomem.evaluation.rollouts import rollouts
from evomem.managers.base import MemoryManager
from evomem.managers.stochastic import StochasticManager
from evomem.memory import attached
from evomem.tasks.base import Sample, Task

if TYPE_CHECKING:
    from evomem.evaluation.evaluator import Evaluator


WITHOUT_CONTEXT = "without_context"


@register_objective("loglik")
class Loglik(Objective):
    """Mean log-likelihood of the answer's tokens, in nats."""

    measurement = Measurement.of("loglik")
    rollout_measurement = Measurement.of("loglik", ROLLOUT)
    unit = "nats per answer token"
    without_context = WITHOUT_CONTEXT

    def value(self, evaluation: Evaluation) -> float:
        """Return the log-likelihood."""
        return math.nan if evaluation.loglik is None else evaluation.loglik


@register_measure("loglik")
@register_measure("exact")
@register_measure("rollout")
@register_measure("head_memory")
@register_measure(WITHOUT_CONTEXT)
class Answers(Measure):
    """Lets the model answer: ``loglik``, ``exact``; of drawn decisions, with their gradients, if ``rollout`` is asked.

    ``head_memory`` adds ``head_slots`` and ``head_bytes``; ``without_context`` the log-likelihood of an answer to the
    question alone, which no manager changes. ``loglik`` is given whichever of them is asked for. The
    option ``listens`` of ``rollout`` also notes how likely what is read between decisions is (`Step.reward`).
    """

    option_types: ClassVar = {"rollout": {"listens": bool}}

    def evaluations(
        self,
        evaluator: Evaluator,
        managers: Sequence[MemoryManager],
        sample: Sample,
        task: Task,
        measurement: Measurement,
        draws: Draws,
    ) -> list[Evaluation]:
        """Return the evaluations; see `Measure.evaluations`."""
        if "rollout" in measurement:
            policy = drawing(managers, draws)
            others = {"behaviour": draws.behaviour, "reference": draws.reference}
            return rollouts(evaluator, policy, sample, task, list(draws.seeds), measurement, **others)
        tokens = evaluator.tokens(sample)
        ready = [evaluator.scheduled(manager) for manager in managers]
        by_number: dict[int, Evaluation] = {}
        once = evaluator.protocol.kind == "compress_once"
        for members in [list(range(len(ready)))] if once and ready else batches_alike(ready):
            begin = time.perf_counter()
            with attached(evaluator.loaded.model):
                policies = PopulationPolicy([ready[i] for i in members])
                batch = evaluator.answer(policies, tokens, sample, task, measurement)
            seconds = (time.perf_counter() - begin) / len(members)
            by_number.update(zip(members, (replace(one, seconds=seconds) for one in batch), strict=True))
        evaluations = [by_number[i] for i in range(len(managers))]
        if WITHOUT_CONTEXT in measurement and evaluations:
            added = {WITHOUT_CONTEXT: evaluator.loglik_without_context(sample)}
            fed = tokens.prompt.shape[1] + tokens.answer.shape[1] - 1
            evaluations = [replace(one, values={**one.values, **added}) for one in evaluations]
            evaluations[0] = replace(evaluations[0], tokens=evaluations[0].tokens + fed)
        return evaluations


def drawing(managers: Sequence[MemoryManager], draws: Draws) -> StochasticManager:
    """Return the one policy of which rollouts are drawn.

    Raises
    ------
    ConfigError : it draws no decisions, or has not a seed for each.
    """
    policy = managers[0]
    if not isinstance(policy, StochasticManager) or len(draws.seeds) != len(managers):
        raise ConfigError(
            f"manager {policy.name!r} draws no decisions: rollouts need a stochastic one, and a seed each"
        )
    return policy


def batches_alike(managers: Sequence[MemoryManager]) -> list[list[int]]:
    """Return the indices of the managers of each batch in ``streaming``: of those that observe the same.

    The memory goes on recording, so a row must not pay for observations that only others need. Managers that decide
    layer by layer are also kept apart from those that wait for the end of a pass.
    """
    alike: dict[tuple[frozenset[str], bool], list[int]] = {}
    for number, manager in enumerate(managers):
        alike.setdefault((manager.observes, manager.whole_model), []).append(number)
    return list(alike.values())
