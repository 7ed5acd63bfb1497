"""Run: choose, once, how many candidates are a batch on an accelerator: from free memory and what candidates take."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from evomem import devices, drivers
from evomem.evaluation.rows import budget_size
from evomem.runs.candidates import Plan, units_of
from evomem.runs.chunks import DEFAULT, EVENT, Chunk, Chunks, chunks_of
from evomem.runs.journal import read_journal
from evomem.runs.unit_evaluator import UnitEvaluator
from evomem.tasks.base import Sample, Split
from evomem.workers.units import RolloutVectors

if TYPE_CHECKING:
    from evomem.runs.search import Search

LARGEST = 256
"""More candidates a batch use a GPU no better."""
SHARE = 0.8
"""Of the free memory is planned with; the rest is for what fluctuates."""


@dataclass(frozen=True)
class Fit:
    """What was measured to choose a size.

    Attributes
    ----------
    size : candidates of a batch.
    free : bytes that were free before, on the device with the least room for its share.
    each, fixed : bytes of one more candidate, and of what all have in common, at their peak.
    """

    size: int
    free: int
    each: int
    fixed: int


def fitting(accelerators: Sequence[torch.device], evaluate: Callable[[int], Any], reserved: int) -> Fit | None:
    """Return how many candidates fit into the memory of some accelerators, by measuring one and two.

    Parameters
    ----------
    evaluate : evaluates so many candidates as one batch.
    reserved : bytes of each device that others will take: contexts in the store, workers' own weights.

    Returns
    -------
    None where PyTorch cannot say what is in use.

    Raises
    ------
    torch.OutOfMemoryError : not even two fit.
    """
    evaluate(1)  # what is made once (contexts, tables) is there afterwards
    peaks = []
    for count in (1, 2):
        before = [devices.allocated_bytes(accelerator) for accelerator in accelerators]
        for accelerator in accelerators:
            devices.reset_peak(accelerator)
        evaluate(count)
        after = [devices.allocated_bytes(accelerator) for accelerator in accelerators]
        if any(one is None for one in (*before, *after)):
            return None
        peaks.append([b[1] - a[0] for a, b in zip(before, after, strict=True) if a is not None and b is not None])
    fits = []
    for accelerator, one, two in zip(accelerators, *peaks, strict=True):
        free, each = devices.free_bytes(accelerator), max(1, two - one)
        if free is None:
            return None
        fixed = max(0, one - each)
        room = (SHARE * (free - reserved) - fixed) / each
        size = 2 ** int(math.log2(min(LARGEST, max(1.0, room))))
        fits.append(Fit(size, free, each, fixed))
    return min(fits, key=lambda fit: fit.size)


def choose_chunks(search: Search) -> Chunks:
    """Return how many candidates are a batch: as the experiment or the journal says, else by a measurement.

    What is chosen, and every halving later, goes into the journal before anything is measured with it.
    """
    journal, given = search.run_folder.journal, search.config.chunk

    def note(chunk: Chunk, reason: str, **measured: int) -> None:
        place = {"phase": chunk.phase, "generation": chunk.generation}
        journal.event(EVENT, chunk=chunk.size, **place, reason=reason, **measured)
        journal.sync()

    def halved(chunk: Chunk, reason: str) -> None:
        where = chunk.phase if chunk.generation is None else f"{chunk.phase}, generation {chunk.generation}"
        search.warn(f"{reason} From here on ({where}) {chunk.size} candidates are one batch")
        note(chunk, reason)

    records = list(read_journal(journal.path, report=False))
    chosen = any(r["kind"] == "event" and r["event"] == EVENT and r.get("phase") is None for r in records)
    if given is None and not chosen:
        fit, reason = _fitting(search)
        if fit is None:
            note(Chunk(DEFAULT), reason)
        else:
            note(Chunk(fit.size), reason, free=fit.free, each=fit.each, fixed=fit.fixed)
        records = list(read_journal(journal.path, report=False))
    return chunks_of(records, given, halved)


def _fitting(search: Search) -> tuple[Fit | None, str]:
    """Measure every stage and task on the longest of a few contexts; return the smallest size, and how it was found."""
    bench, smallest = search.bench, None
    if not bench.devices:
        return None, "nothing is measured on the processor"
    evaluate = UnitEvaluator(search.space, bench, search.samples)
    reserved = int(bench.facts.get("store_bytes", 0)) + (bench.weights if search.workers.count != 0 else 0)
    for stage in search.plan:
        rollouts = RolloutVectors() if drivers.uses(stage.driver.name, "rollouts") else None
        for index, task in enumerate(stage.tasks):
            pool = search.samples.pool(task, Split.TRAIN, stage.train_contexts)[:8]
            samples: list[tuple[Sample, ...]] = [()] * len(stage.tasks)
            samples[index] = (max(pool, key=lambda sample: len(sample.context)),)
            plan = Plan("probe", None, stage, tuple(samples), rollouts=rollouts)
            try:
                fit = fitting(bench.devices, partial(_probe, search, evaluate, plan, index), reserved)
            except torch.OutOfMemoryError as error:
                devices.let_go(error)
                return Fit(1, 0, 0, 0), "two candidates do not fit into the memory of the device"
            if fit is None:
                return None, "PyTorch does not say how much memory is in use on this kind of device"
            smallest = fit if smallest is None or fit.size < smallest.size else smallest
    return smallest, "measured: bytes of one more candidate against free memory"


def _probe(search: Search, evaluate: UnitEvaluator, plan: Plan, task: int, count: int) -> None:
    """Evaluate the search's start on a task, by its index, so many times, as one batch."""
    budget = max(plan.stage.budgets or (None,), key=budget_size)
    vectors, seeds = np.repeat(search.start[None], count, 0), np.arange(count, dtype=np.int64)
    for unit in units_of(plan, search.samples, task, 0, budget, vectors, seeds, plan.measurement, count):
        evaluate(unit)
