"""Run: which samples a generation, a selection and the final report are measured on."""

from __future__ import annotations

import json

import numpy as np

from evomem.errors import TaskError
from evomem.runs.bench import Bench
from evomem.runs.config import ExperimentConfig, Stage, TaskConfig
from evomem.tasks.base import Sample, Split, Task

# The splits that judge are the same for every seed of a search, so that searches can be compared sample by sample.
_JUDGING_SEED = 0


class Samples:
    """The tasks of an experiment and their samples, built when they are first asked for.

    Parameters
    ----------
    config : the experiment.
    bench : builds tasks.
    """

    def __init__(self, config: ExperimentConfig, bench: Bench) -> None:
        self._config = config
        self._bench = bench
        self._names: dict[str, str] = {}
        self.tasks: dict[str, Task] = {}
        self.configs: dict[str, TaskConfig] = {}
        self._pools: dict[tuple[str, Split], list[Sample]] = {}
        for stage in config.plan():
            for task in stage.tasks:
                self._names.setdefault(_identity(task), f"t{len(self._names)}")

    def name(self, task: TaskConfig) -> str:
        """Return the task's short name in the journal; tasks that differ only in their weight are one."""
        name = self._names[_identity(task)]
        if name not in self.tasks:
            self.tasks[name] = self._bench.of(task).make_task(task)
            self.configs[name] = task
        return name

    def pool(self, task: TaskConfig, split: Split, count: int) -> list[Sample]:
        """Return the first ``count`` samples of a split.

        Raises
        ------
        TaskError : the task has fewer.
        """
        name = self.name(task)
        held = self._pools.get((name, split), [])
        if len(held) < count:
            seed = self._config.seed if split is Split.TRAIN else _JUDGING_SEED
            held = self.tasks[name].samples(split, count, seed)
            if len(held) < count:
                raise TaskError(f"task {task.label}: split {split.value!r} has {len(held)} samples, {count} are needed")
            self._pools[name, split] = held
        return held[:count]

    def minibatch(self, stage: Stage, task: TaskConfig, generation: int) -> list[Sample]:
        """Return a generation's samples of a task: common random numbers, the same for all candidates.

        The pool is gone through in a new random order every time round, so that no context is used twice before the
        others are used (what is left at the end of a round, fewer than a generation needs, waits for the next).
        A pure function of (seed, stage, task, generation).
        """
        pool = self.pool(task, Split.TRAIN, stage.train_contexts)
        count = stage.samples_per_generation
        number, step = divmod(generation - stage.begin, len(pool) // count)
        place = stage.tasks.index(task)
        rng = np.random.default_rng([self._config.seed, stage.place, place, number, 4])
        order = rng.permutation(len(pool))
        return [pool[i] for i in order[step * count : (step + 1) * count].tolist()]


def _identity(task: TaskConfig) -> str:
    return json.dumps(task.model_dump(mode="json", exclude={"weight"}), sort_keys=True)
