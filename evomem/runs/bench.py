"""Run: the bench on which a search measures its candidates: evaluator, tasks, and what both are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from evomem.evaluation.types import Evaluation
from evomem.managers.base import MemoryManager
from evomem.runs.config import ExperimentConfig, TaskConfig
from evomem.tasks.base import Sample, Task


class CandidateEvaluator(Protocol):
    """What a search needs of an evaluator (`evomem.evaluation.evaluator.Evaluator` is one).

    Further keyword arguments come from the objective (`evomem.runs.fitness.Objective.arguments`).
    """

    def evaluate(
        self, managers: Sequence[MemoryManager], sample: Sample, task: Task, *, exact: bool = False
    ) -> list[Evaluation]:
        """Return one evaluation a manager, in order: a pure function of the arguments."""
        ...


@dataclass(frozen=True)
class Bench:
    """Evaluator and tasks of a search.

    Attributes
    ----------
    evaluator : measures managers on samples.
    make_task : builds the tasks of the experiment.
    calibrate : sets statistics that a manager measures once, before the search, on some samples; None if none does.
    provenance : what the measurements depend on (model, hash of its weights); a run is resumed on the same only.
    """

    evaluator: CandidateEvaluator
    make_task: Callable[[TaskConfig], Task]
    calibrate: Callable[[MemoryManager, Sequence[Sample]], None] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)


BenchFactory = Callable[[ExperimentConfig], Bench]


def model_bench(config: ExperimentConfig) -> Bench:
    """Return the bench of a real frozen model: loads it, and evaluates in this process."""
    import torch

    from evomem import models, tasks
    from evomem.evaluation.evaluator import Evaluator
    from evomem.evaluation.store import PrefillStore

    loaded = models.load(config.model.name, dtype=getattr(torch, config.model.dtype))
    evaluator = Evaluator(loaded, config.protocol, store=PrefillStore(config.store_bytes))

    def make_task(task: TaskConfig) -> Task:
        return tasks.build(task.spec, loaded.tokenizer, task.length, **task.options)

    def calibrate(manager: MemoryManager, samples: Sequence[Sample]) -> None:
        calibrate_spectrum(evaluator, manager, samples)

    return Bench(evaluator, make_task, calibrate, {"model": config.model.name, "model_digest": loaded.digest})


def calibrate_spectrum(evaluator: Any, manager: MemoryManager, samples: Sequence[Sample]) -> None:
    """Set the spectrum statistics of a NAMM from contexts that the model read with everything kept.

    A manager without statistics is left as it is.
    """
    from evomem.managers.namm import NAMM, collect_statistics

    if not isinstance(manager, NAMM):
        return
    readings = (evaluator.reading(evaluator.tokens(sample).read, manager.observes) for sample in samples)
    views = (view for reading in readings for view in reading.views)
    manager.set_statistics(*collect_statistics((view.recorded["attention_spectrum"], view.valid) for view in views))
