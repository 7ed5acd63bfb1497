"""Run: which samples a generation, a selection and the final report are measured on."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from evomem.errors import TaskError
from evomem.runs.bench import Bench, PositionChecker
from evomem.runs.config import ExperimentConfig, Stage
from evomem.runs.experiment_parts import TaskConfig
from evomem.runs.fitness import objective_of
from evomem.tasks.base import Sample, Split, Task, at_hand

# The splits that judge are the same for every seed of a search, so that searches can be compared sample by sample.
_JUDGING_SEED = 0


class Samples:
    """The tasks of an experiment and their samples, built when they are first asked for.

    Parameters
    ----------
    config : the experiment.
    bench : builds tasks.

    Attributes
    ----------
    remarks : what a user must know of the samples: fewer than asked for, longer than a model was made for.
    """

    def __init__(self, config: ExperimentConfig, bench: Bench) -> None:
        self._config = config
        self._bench = bench
        self._names: dict[str, str] = {}
        self.tasks: dict[str, Task] = {}
        self.configs: dict[str, TaskConfig] = {}
        self._pools: dict[tuple[str, Split], list[Sample]] = {}
        self._wanted: dict[tuple[str, Split], int] = {}
        self.remarks: list[str] = []
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
        """Return the first ``count`` samples of a split, or all of them if a task tells that it has fewer.

        Raises
        ------
        TaskError : the split is empty, a task that should have enough has fewer, or a sample is longer than the model
            can read.
        """
        name = self.name(task)
        if self._wanted.get((name, split), 0) < count:
            built = self.tasks[name]
            seed = self._config.seed if split is Split.TRAIN else _JUDGING_SEED
            there = at_hand(built, split, count)
            pool = built.samples(split, there, seed)
            if len(pool) < there:
                raise TaskError(f"task {task.label}: split {split.value!r} has {len(pool)} samples, {there} are needed")
            if there < count:
                self._remark(f"task {task.label}: {there} of {count} samples: the {split} split has no more")
            self._check(task, split, pool)
            self._pools[name, split], self._wanted[name, split] = pool, count
        return self._pools[name, split][:count]

    def check(self) -> None:
        """Draw all samples of the experiment, so that what is missing is said before anything is measured.

        Raises
        ------
        TaskError : as of `pool`; or all sealed rows of a file are trained on, so nothing could be reported.
        """
        plan = self._config.plan()
        for stage in plan:
            for task in stage.tasks:
                trained = {_text(sample) for sample in self.pool(task, Split.TRAIN, stage.train_contexts)}
                if stage is not plan[-1]:
                    continue
                self.pool(task, Split.SELECT, self._config.select.contexts)
                sealed = self.pool(task, Split.SEALED, self._config.sealed.contexts)
                small = hasattr(self.tasks[self.name(task)], "available")  # a user's own rows, and few of them
                if small and all(_text(sample) in trained for sample in sealed):
                    raise TaskError(
                        f"task {task.label}: what is trained on is in the sealed split too, so a report would say "
                        "nothing; give at least two different rows"
                    )
        for built in self.tasks.values():
            self._remark(str(getattr(built, "note", "")))

    def _check(self, task: TaskConfig, split: Split, samples: Sequence[Sample]) -> None:
        """Compare samples with what the model can read, and with what will be measured of them."""
        built = self.tasks[self.name(task)]
        searched = any("exact" in objective_of(stage.fitness).measurement for stage in self._config.plan())
        if searched and not all(sample.max_new_tokens for sample in samples):
            raise TaskError(
                f"task {task.label}: has samples without an exact metric, which the objective needs; take the "
                "objective loglik, or give every row a metric"
            )
        exact = built.has_exact and (searched or (split is Split.SEALED and self._config.sealed.exact))
        evaluator = self._bench.of(task).evaluator
        if not isinstance(evaluator, PositionChecker):
            return
        reach = evaluator.check_positions(samples, exact=exact)
        if reach.limit is not None:
            self._remark(
                f"task {task.label}: samples of up to {reach.longest:,} tokens, but the model was made for "
                f"{reach.limit:,} positions; it was not trained for later ones"
            )

    def _remark(self, text: str) -> None:
        if text and text not in self.remarks:
            self.remarks.append(text)

    def minibatch(self, stage: Stage, task: TaskConfig, generation: int) -> list[Sample]:
        """Return a generation's samples of a task: common random numbers, the same for all candidates.

        The pool is gone through in a new random order every time round, so that no context is used twice before the
        others are used (what is left at the end of a round, fewer than a generation needs, waits for the next).
        A pure function of (seed, stage, task, generation).
        """
        pool = self.pool(task, Split.TRAIN, stage.train_contexts)
        count = min(stage.samples_per_generation, len(pool))
        number, step = divmod(generation - stage.begin, len(pool) // count)
        task_index = stage.tasks.index(task)
        rng = np.random.default_rng([self._config.seed, stage.index, task_index, number, 4])
        order = rng.permutation(len(pool))
        return [pool[i] for i in order[step * count : (step + 1) * count].tolist()]


def _text(sample: Sample) -> tuple[str, str, str]:
    return sample.context, sample.question, sample.answer


def _identity(task: TaskConfig) -> str:
    return json.dumps(task.model_dump(mode="json", exclude={"weight"}), sort_keys=True)
