"""Run: the pool that a search's units are evaluated by, in this process or in workers that make the same bench."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import safetensors.torch

from evomem.devices import CPU
from evomem.evaluation.store import Readings, room_for_readings
from evomem.runs.bench import Bench, BenchFactory
from evomem.runs.config import ExperimentConfig
from evomem.runs.samples import Samples
from evomem.runs.unit_evaluator import UnitEvaluator
from evomem.search_space.space import SearchSpace
from evomem.workers.local import LocalPool
from evomem.workers.units import Evaluate, Recipe, WorkerOptions, WorkerPool, cores


def make_pool(
    config: ExperimentConfig,
    space: SearchSpace,
    bench: Bench,
    samples: Samples,
    factory: BenchFactory,
    options: WorkerOptions,
    report: Callable[[str], None],
    quarantined: Sequence[str] = (),
) -> WorkerPool:
    """Return the pool that the options ask for.

    ``report`` is told what happens to workers; ``quarantined`` names candidates that ended theirs before the run was
    resumed (`evomem.workers.quarantine.candidate_digest`).

    Raises
    ------
    WorkerError : Ray cannot be started or reached, or has not the resources.
    """
    options = counted(options, config.threads)
    if options.count == 0:
        return LocalPool(UnitEvaluator(space, bench, samples), config.attempts, quarantined)
    from evomem.workers.ray.pool import RayPool

    state = {name: value.contiguous() for name, value in space.template.state_dict().items()}
    parts = bench.in_workers.parts() if bench.in_workers is not None else {}
    make = bench.in_workers.make if bench.in_workers is not None else partial(_by_factory, factory)
    build = partial(unit_evaluator, config, safetensors.torch.save(state), make)
    recipe = Recipe(parts, build, config.threads)
    return RayPool(
        recipe,
        options,
        attempts=config.attempts,
        store_bytes=room_for_readings([CPU]) if config.store_bytes is None else config.store_bytes,
        report=report,
        quarantined=quarantined,
    )


def counted(options: WorkerOptions, threads: int) -> WorkerOptions:
    """Return the options with the number of workers that this machine has room for, if none is given.

    A machine with room for one has no use for Ray. A cluster is asked when it is joined.
    """
    if options.count is not None or options.address is not None:
        return options
    room = int(cores() / (options.cpus or threads))
    return replace(options, count=room if room > 1 else 0)


def unit_evaluator(
    config: ExperimentConfig,
    state: bytes,
    make: Callable[[ExperimentConfig, Mapping[str, Any], Readings], Bench],
    parts: Mapping[str, Any],
    readings: Readings,
) -> Evaluate:
    """Return, in another process, what evaluates the units of a search."""
    bench = make(config, parts, readings)
    samples = Samples(config, bench)
    for stage in config.plan():
        for task in stage.tasks:
            samples.name(task)  # units name tasks; this builds them
    return UnitEvaluator(SearchSpace(config.space, safetensors.torch.load(state)), bench, samples)


def _by_factory(factory: BenchFactory, config: ExperimentConfig, parts: Mapping[str, Any], readings: Readings) -> Bench:
    return factory(config)


@contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """Compute with that many threads inside the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
