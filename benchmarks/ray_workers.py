"""Evaluation: what worker processes cost and give: the same bits, more speed, little memory, quick recovery."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import Line, Setting, in_turns, line, progress, ratios, timed
from evomem.evaluation import Evaluation
from evomem.runs import parse_experiment, search
from evomem.runs.bench import model_bench
from evomem.runs.config import ExperimentConfig
from evomem.runs.journal import read_journal
from evomem.runs.pools import make_pool
from evomem.runs.samples import Samples
from evomem.search_space.space import SearchSpace
from evomem.tasks import Sample, Split
from evomem.workers import Recipe, Unit, WorkerOptions
from evomem.workers.ray.cluster import Connection
from evomem.workers.ray.pool import RayPool

BITS, SCALING, DISPATCH = "ray.bit_identical", "ray.scaling_efficiency", "ray.dispatch_overhead_ms"
MEMORY, RECOVERY = "ray.worker_memory_mb", "ray.recovery_s"


def experiment(setting: Setting, **changes: Any) -> ExperimentConfig:
    """Return a small search on the benchmark's model and needle task."""
    data = {
        "name": "benchmark",
        "model": setting.name,
        "space": {"name": "feature_scorer", "manager": {"options": {"budget": setting.sizes.budget}}},
        "tasks": [{"spec": "multikey_1", "length": setting.sizes.ray_context}],
        "driver": {"name": "cmaes", "population": setting.sizes.ray_population},
        "chunk": 16,
        "generations": 2,
        "samples_per_generation": 2,
        "train_contexts": setting.sizes.ray_samples,
        "chance_contexts": 0,
        "select": {"contexts": 2, "top": 1},
        "sealed": {"contexts": 1, "exact": False},
    }
    return parse_experiment({**data, **changes})


@contextmanager
def ray_running(workers: int) -> Iterator[float]:
    """Run one Ray for several pools, for ``workers`` workers in all; yields the cores that each may ask for."""
    cores = len(os.sched_getaffinity(0))
    each = min(1.0, cores / workers)
    connection = Connection(WorkerOptions(min(workers, cores), cpus=each), 1, 3 << 30)
    try:
        yield each
    finally:
        connection.close()


def bit_identical(setting: Setting) -> Iterator[Line]:
    """1 if a search has the same winner and the same evaluations with 0, 1, 2 and 3 workers, else 0."""
    config = experiment(setting)
    counts, found = (0, *setting.sizes.ray_workers), []
    with ray_running(max(counts)) as each, tempfile.TemporaryDirectory() as folder:
        for done, count in enumerate(counts, start=1):
            path = Path(folder) / str(count)
            search(config, path, workers=WorkerOptions(count, cpus=each))
            found.append(traces(path))
            progress(BITS, done, len(counts), f"{count} workers")
    yield Line(BITS, float(all(one == found[0] for one in found)), "1 = yes", (0.0, 1.0))


def traces(folder: Path) -> dict[str, Any]:
    """Return all that a search measured, and its winner, without what time and place add."""
    measured = {
        record["key"]: [
            {name: value for name, value in e.items() if name not in ("tokens", "seconds")}
            for e in record["evaluations"]
        ]
        for record in read_journal(folder / "journal.jsonl")
        if record["kind"] == "unit"
    }
    return {"measured": measured, "winner": (folder / "winner" / "vector.npy").read_bytes()}


def scaling(setting: Setting) -> Iterator[Line]:
    """Work per second of two one-thread workers over twice that of one; and the private memory of a worker."""
    sizes = setting.sizes
    config = experiment(setting)
    bench = model_bench(config)
    samples = Samples(config, bench)
    space = SearchSpace(config.space)
    task = config.plan()[0].tasks[0]
    chosen = samples.pool(task, Split.TRAIN, sizes.ray_samples)
    random = np.random.default_rng(0)
    vectors = space.start + 0.1 * random.standard_normal((sizes.ray_population, space.dim))
    units = [
        Unit(f"{s}/{c}", "train", 0, samples.name(task), sample, vectors[c : c + 16], np.arange(16)[: len(vectors) - c])
        for s, sample in enumerate(chosen)
        for c in range(0, len(vectors), 16)
    ]
    with ray_running(3) as each:

        def pool_of(count: int) -> Any:
            return make_pool(
                config, space, bench, samples, model_bench, WorkerOptions(count, cpus=each), lambda message: None
            )

        one, two = pool_of(1), pool_of(2)

        def work(pool: Any) -> float:
            return timed(lambda: list(pool.evaluate(units)))

        for pool in (one, two):
            work(pool)  # contexts are read, as they are after a search's first generations
        seconds = in_turns(SCALING, {"one": lambda: work(one), "two": lambda: work(two)}, setting.rounds(3))
        yield line(SCALING, ratios(seconds["one"], seconds["two"], 0.5))
        private = [use["private"] / 2**20 for pool in (one, two) for use in pool.memory()]
        yield line(MEMORY, private, "MiB")
        for pool in (one, two):
            pool.close()


def trivial(log: str, seconds: float, parts: Mapping[str, Any], readings: Any) -> Any:
    """Return an evaluator that sleeps, and notes when it began with what, where."""

    def evaluate(unit: Unit) -> list[Evaluation]:
        if log:
            with open(log, "a", encoding="utf-8") as file:
                file.write(json.dumps({"key": unit.key, "pid": os.getpid(), "time": time.time()}) + "\n")
        time.sleep(seconds)
        return [Evaluation(unit.sample.id, {"loglik": 0.0}, 1.0, 1.0, 1.0, 1, 0.0)] * unit.candidates

    return evaluate


def tiny_units(count: int, prefix: str) -> list[Unit]:
    """Return units of one candidate."""
    return [
        Unit(f"{prefix}{i}", "train", 0, "t", Sample(f"s{i}", "c", "q", "a", ("a",), 1), np.zeros((1, 4)), np.arange(1))
        for i in range(count)
    ]


def dispatch(setting: Setting) -> Iterator[Line]:
    """Milliseconds that a generation of 32 units of one candidate each takes when evaluating takes none."""
    with ray_running(2) as each:
        pool = RayPool(Recipe({}, partial(trivial, "", 0.0)), WorkerOptions(2, cpus=each))
        for _ in range(5):
            list(pool.evaluate(tiny_units(32, "warm")))
        took = [1e3 * timed(lambda: list(pool.evaluate(tiny_units(32, "d")))) for _ in range(10 * setting.rounds(5))]
        pool.close()
    yield line(DISPATCH, took, "ms")


def recovery(setting: Setting) -> Iterator[Line]:
    """Seconds from a worker's SIGKILL until what it did is running again elsewhere; another one is idle then."""
    waits = []
    with ray_running(2) as each, tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        pool = RayPool(Recipe({}, partial(trivial, str(log), 3.0)), WorkerOptions(2, cpus=each))
        for round in range(setting.rounds(5)):
            while len(pool.workers()) < 2:  # the killed one's successor
                list(pool.evaluate(tiny_units(1, "warm")))
            log.write_text("")
            killed: list[float] = []

            def kill(killed: list[float] = killed) -> None:
                begun = wait_for(log, 1)[0]
                time.sleep(0.5)
                os.kill(begun["pid"], signal.SIGKILL)
                killed.append(time.time())

            thread = threading.Thread(target=kill)
            thread.start()
            list(pool.evaluate(tiny_units(1, f"r{round}")))
            thread.join()
            waits.append(wait_for(log, 2)[1]["time"] - killed[0])
            progress(RECOVERY, round + 1, setting.rounds(5), f"{waits[-1]:.3f} s")
        pool.close()
    yield line(RECOVERY, waits, "s")


def wait_for(log: Path, lines: int) -> Sequence[dict[str, Any]]:
    """Return the log's lines as soon as there are so many."""
    while True:
        found = log.read_text().splitlines() if log.exists() else []
        if len(found) >= lines:
            return [json.loads(one) for one in found]
        time.sleep(0.001)
