"""Workers: any number of them gives the results of one process, to the bit; contexts are read once, memory shared."""

from __future__ import annotations

import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from evomem.runs import parse_experiment, search
from evomem.runs.bench import model_bench
from evomem.tasks.base import Sample
from evomem.workers import Recipe, Unit, WorkerOptions
from evomem.workers.ray import pool as ray_pool
from evomem.workers.schedule import Policy
from tests.runs.test_block_search import without_tokens
from tests.support.faulty_search import SETTINGS, entries, weighing
from tests.support.interrupted_search import outcome, same
from tests.support.stream_search import CONFIG, POLICY
from tests.support.synthetic_search import ToyEvaluator, experiment, factory
from tests.support.tiny_search import bench, configured

pytestmark = pytest.mark.usefixtures("ray_here")


def test_the_toy_search_is_the_same_with_one_worker_and_with_more_than_cores(tmp_path):
    search(experiment(*SETTINGS), tmp_path / "0", factory(ToyEvaluator()))
    for count in (1, 3):
        options = WorkerOptions(count, cpus=0.5)
        search(experiment(*SETTINGS), tmp_path / str(count), factory(ToyEvaluator()), workers=options)
        same(outcome(tmp_path / str(count)), outcome(tmp_path / "0"))


def test_a_model_search_is_the_same_with_shared_weights_and_contexts(tmp_path):
    """Objectives attention (block_cmaes) and loglik."""
    search(configured(), tmp_path / "0", bench(tmp_path / "log0"))
    read = Counter(name for _, _, name in entries(tmp_path / "log0") if name.startswith("read/"))
    log, folder = tmp_path / "log2", tmp_path / "2"
    search(configured(), folder, bench(log, company=2), workers=WorkerOptions(2, cpus=0.5))
    same(without_tokens(outcome(folder)), without_tokens(outcome(tmp_path / "0")))
    found = Counter(name for _, _, name in entries(log) if name.startswith("read/"))
    assert found.keys() == read.keys()
    assert max(found.values()) <= 2  # who has nothing else to do reads what another one is just reading
    assert len({pid for _, pid, _ in entries(log)}) == 2


@pytest.mark.parametrize("config", [CONFIG, POLICY], ids=["evolution", "policy gradient"])
def test_a_search_on_streams_is_the_same_with_two_workers(tmp_path, config):
    search(parse_experiment(config), tmp_path / "0", model_bench)
    search(parse_experiment(config), tmp_path / "2", model_bench, workers=WorkerOptions(2, cpus=0.5))
    same(outcome(tmp_path / "2"), outcome(tmp_path / "0"))


def test_contexts_are_read_once_and_a_pool_leaves_nothing_behind(tmp_path):
    """Parts and contexts in shared memory, read-only; gone with the pool, as its processes are; another one follows."""
    before, log = plasma_megabytes(), tmp_path / "log"
    for _ in range(2):
        array = np.arange(4 << 20, dtype=np.float64)  # 32 MB
        recipe = Recipe({"array": array, "log": str(log)}, weighing)
        policy = Policy(straggler=1e9)  # no copies
        pool = ray_pool.RayPool(recipe, WorkerOptions(2, cpus=0.5), store_bytes=6 << 20, policy=policy)
        while len(pool.workers()) < 2:
            pool._wait()
        pids = {w["pid"] for w in pool.workers()}
        log.unlink(missing_ok=True)
        evaluated(pool, [unit(0, context) for context in range(5)])
        assert sorted(name for _, _, name in entries(log)) == [f"s{context}" for context in range(5)]
        found = evaluated(pool, [unit(place, context) for place in range(8) for context in range(5)])
        assert len(entries(log)) == 5  # 1 MB each: nothing was read again, though
        for context in range(5):  # both have used everything
            assert {e.bytes_peak for e in found if e.sample == f"s{context}"} == pids
        assert {(e.loglik, e.slots) for e in found} == {(45.0, 0.0)}  # the array as it was, not writeable
        assert before + 37 <= plasma_megabytes() < before + 45
        evaluated(pool, [unit(0, context) for context in range(5, 10)])  # more than may be kept
        evaluated(pool, [unit(place, 0) for place in range(2)])
        assert Counter(name for _, _, name in entries(log))["s0"] >= 2
        assert list(pool.evaluate([])) == []
        assert pool.stats["deaths"] == pool.stats["dropped"] == 0
        pool.close()
        pool.close()
        until(lambda pids=pids: not any(Path(f"/proc/{pid}").exists() for pid in pids))
        until(lambda: plasma_megabytes() <= before)


def evaluated(pool, units):
    outcomes = list(pool.evaluate(units))
    assert sorted(o.unit.key for o in outcomes) == sorted(u.key for u in units)
    assert all(o.error is None and len(o.evaluations) == 2 for o in outcomes)
    return [evaluation for o in outcomes for evaluation in o.evaluations]


def unit(place, context):
    sample, vectors = Sample(f"s{context}", "c", "q", " a", ("a",), 4), np.full((2, 3), float(place))
    return Unit(f"u{place}/{context}", "train", 0, "t", sample, vectors, np.arange(2, dtype=np.int64))


def plasma_megabytes():
    import ray
    from ray._private.internal_api import memory_summary

    said = memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)
    return float(re.search(r"Plasma memory usage (\d+) MiB", said).group(1))


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
