"""Faults, tried for real: whatever dies on the way, the run ends as the undisturbed one, and nothing is done twice."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import random
import resource
import signal
import subprocess
import threading
import time
from dataclasses import replace

import pytest

from evomem.drivers import build
from evomem.errors import ModelError, RunError, WorkerError
from evomem.evaluation.measurement import LOGLIK, Evaluation
from evomem.runs import open_run, search
from evomem.search_space.space import SearchSpace
from evomem.workers import WorkerOptions
from evomem.workers.ray import pool as ray_pool
from tests.support.faulty_search import (
    SETTINGS,
    All,
    Killer,
    Logged,
    Once,
    OnlyHere,
    Refuses,
    SlowProcess,
    begun,
    breaks,
    bug,
    die,
    entries,
    events_in,
    exhaust,
    hang,
    killed_while_allocating,
    logged,
    names_of_units,
    no_model,
    stop,
    units_in,
    wait_for,
    weights,
)
from tests.support.interrupted_search import outcome, same
from tests.support.synthetic_search import experiment, factory

pytestmark = pytest.mark.usefixtures("ray_here")
TWO = WorkerOptions(2, cpus=0.5)
KILLS = 10


class Pools(list):
    """The pools that searches make, and when to break off."""

    breaks_off = staticmethod(lambda outcome: False)


@pytest.fixture
def pools(monkeypatch):
    made = Pools()

    class Seen(ray_pool.RayPool):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

        def evaluate(self, units):
            for found in super().evaluate(units):
                yield found
                if made.breaks_off(found):  # as Ctrl-C does, when the outcome is in the journal
                    raise KeyboardInterrupt

    monkeypatch.setattr(ray_pool, "RayPool", Seen)
    return made


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The outcome of the run in this process, and what was evaluated for every line of its journal."""
    folder = tmp_path_factory.mktemp("undisturbed")
    search(experiment(*SETTINGS), folder / "run", logged(folder / "log"))
    return outcome(folder / "run"), names_of_units(folder / "run", folder / "log")


def unit_of(names, generation, number=0):
    """The name of a training unit of a generation."""
    return [name for (key, _), name in names.items() if key.startswith(f"train/{generation}/")][number]


# ---- workers that die -----------------------------------------------------------------------------------------------


class Murderer(threading.Thread):
    """Kills random workers at random moments, and notes what the journal held then."""

    def __init__(self, pools, folder, kills):
        super().__init__(daemon=True)
        self.pools, self.folder, self.kills = pools, folder, kills
        self.rng, self.finished, self.over = random.Random(0), {}, threading.Event()
        self.killed = []

    def run(self):
        while len(self.killed) < self.kills and not self.over.wait(self.rng.uniform(0.0, 0.4)):
            workers = self.pools[-1].workers() if self.pools else []
            pids = [w["pid"] for w in workers if w["pid"] not in self.killed]
            if pids:
                now = time.time()
                for unit in units_in(self.folder):
                    self.finished.setdefault(unit, now)
                self.killed.append(self.rng.choice(pids))
                os.kill(self.killed[-1], signal.SIGKILL)


def nothing_again(log, names, finished):
    """Nothing began that was in the journal before."""
    ended = {names[unit]: at for unit, at in finished.items()}
    assert [name for at, _, name in entries(log) if at > ended.get(name, at)] == []


def test_random_workers_killed_at_random_moments(tmp_path, pools, undisturbed, capfd, monkeypatch):
    # On a slow machine all may fall on one candidate: so many that no policy of 3 deaths could tell it from a killer.
    policy, deaths = ray_pool._policy, KILLS // 2 + 1  # once as a part of its job, once alone: more than there are
    monkeypatch.setattr(ray_pool, "_policy", lambda *options: replace(policy(*options), deaths=deaths))
    expected, names = undisturbed
    killer = Murderer(pools, tmp_path / "run", KILLS)
    killer.start()
    search(experiment(*SETTINGS), tmp_path / "run", logged(tmp_path / "log", sleep=0.08), workers=TWO)
    killer.over.set()
    killer.join()
    assert len(killer.killed) == KILLS
    assert events_in(tmp_path / "run", "quarantined") == []
    same(outcome(tmp_path / "run"), expected)
    nothing_again(tmp_path / "log", names, killer.finished)
    assert set(begun(tmp_path / "log")) >= set(names.values())  # more, if candidates were tried alone
    told = [event["message"] for event in events_in(tmp_path / "run", "warning")]
    assert (
        sum("ended unexpectedly" in message for message in told) >= KILLS - 1
    )  # the last may have fallen after the end
    assert "raylet" not in "".join(capfd.readouterr())  # Ray itself is silent


def test_workers_that_hang_or_stop_or_run_out_of_memory(tmp_path, pools, undisturbed, monkeypatch):
    policy = ray_pool._policy
    monkeypatch.setattr(ray_pool, "_policy", lambda *options: replace(policy(*options), straggler=1e9))  # no copies
    expected, names = undisturbed
    kinds = {"hang": hang, "stop": stop, "exhaust": exhaust, "allocate": killed_while_allocating}
    faults = [
        Once(unit_of(names, generation, len(kind)), tmp_path / kind, what)
        for (kind, what), generation in zip(kinds.items(), (0, 1, 0, 0), strict=True)
    ]
    options = WorkerOptions(2, cpus=0.5, timeout=2)
    search(experiment(*SETTINGS), tmp_path / "run", logged(tmp_path / "log", 0.06, All(*faults)), workers=options)
    same(outcome(tmp_path / "run"), expected)
    assert all((tmp_path / kind).exists() for kind in kinds)
    told = [event["message"] for event in events_in(tmp_path / "run", "warning")]
    assert sum("did not answer in time" in message for message in told) == 2
    assert sum("ended unexpectedly" in message for message in told) == 1
    errors = [event["error"] for event in events_in(tmp_path / "run", "attempt_failed")]
    assert len(errors) == 1
    assert "MemoryError" in errors[0]
    again = {name: count for name, count in begun(tmp_path / "log").items() if count > 1}
    assert set(again) >= {fault.name for fault in faults}
    assert sum(count - 1 for count in again.values()) <= pools[0].stats["requeued"] + len(errors)


def test_a_worker_ten_times_slower_and_fitness_that_is_no_number(tmp_path, pools):
    """What the slow one has begun is done by the other one; of two results one counts."""
    whole, log = tmp_path / "whole", tmp_path / "log"
    search(experiment(*SETTINGS), whole, logged(tmp_path / "log0", broken=breaks))
    slow = SlowProcess(tmp_path / "slow", 0.4)
    search(experiment(*SETTINGS), tmp_path / "run", logged(log, 0.04, slow, breaks), workers=TWO)
    same(outcome(tmp_path / "run"), outcome(whole))
    values = [float(e["loglik"]) for r in open_run(whole).records() if r["kind"] == "unit" for e in r["evaluations"]]
    assert {math.inf, -math.inf} <= set(values)
    assert any(math.isnan(value) for value in values)
    stats = pools[0].stats
    assert stats["duplicates"] >= 1
    assert stats["deaths"] == stats["requeued"] == 0
    count = begun(log)
    assert set(count) == set(begun(tmp_path / "log0"))
    assert sum(count.values()) - len(count) <= stats["duplicates"]


# ---- a candidate that kills -----------------------------------------------------------------------------------------


def test_a_candidate_that_kills_its_worker_is_quarantined(tmp_path, pools, undisturbed, monkeypatch):
    # Two deaths, to save time; one unit at a time, because a death among several is held against none of them.
    policy, changes = ray_pool._policy, {"deaths": 2, "batch_seconds": 0.0}
    monkeypatch.setattr(ray_pool, "_policy", lambda *options: replace(policy(*options), **changes))
    config = experiment(*SETTINGS)
    space = SearchSpace(config.space)
    driver = build("cmaes", space.dim, space.start, config.seed, sigma=0.3, popsize=6)
    vector = driver.ask().vectors[2]
    # Broken off when the first of its units is done, and resumed in this process, which it would end.
    pools.breaks_off = lambda found: bool(found.quarantined)
    with pytest.raises(KeyboardInterrupt):
        search(config, tmp_path / "run", logged(tmp_path / "log", 0.01, Killer(space.decode(vector))), workers=TWO)
    deaths = pools[0].stats["deaths"]
    assert 4 <= deaths <= 8  # two together, two alone, in one unit or in two at a time
    search(config, tmp_path / "run", logged(tmp_path / "log", fault=Refuses(space.decode(vector))), resume=True)
    quarantined = events_in(tmp_path / "run", "quarantined")
    assert len(quarantined) == 1
    assert "candidate 2 of unit train/0/" in quarantined[0]["message"]
    assert "alone, it ended its worker 2 times (its process ended unexpectedly" in quarantined[0]["message"]

    run, generations = open_run(tmp_path / "run"), open_run(tmp_path / "run").generations()
    assert [math.isnan(value) for value in generations[0].fitness] == [False, False, True, False, False, False]
    assert all(math.isfinite(value) for generation in generations[1:] for value in generation.fitness)
    alone = {r["key"]: r for r in run.records() if r["kind"] == "unit" and r["generation"] == 0}
    known = {key: value for (key, _), value in undisturbed[0][0].items()}
    for key, record in alone.items():
        for place, evaluation in enumerate(record["evaluations"]):
            if key.endswith("/0") and place == 2:
                assert "loglik" not in evaluation
            else:
                assert {**evaluation, "seconds": 0} == known[key][place]

    # All in this process, with nothing but its numbers taken away: the same run.
    search(config, tmp_path / "plain", without(space.decode(vector), tmp_path / "log1"))
    same(outcome(tmp_path / "run"), outcome(tmp_path / "plain"))


def without(candidate, log):
    """Return the factory of a bench that says nothing of one candidate."""

    class Without(Logged):
        def evaluate(self, candidates, sample, task, measurement=LOGLIK):
            found = super().evaluate(candidates, sample, task, measurement)
            lost = Evaluation(sample.id)
            bad = [weights(one) == weights(candidate) for one in candidates]
            return [lost if is_bad else one for one, is_bad in zip(found, bad, strict=True)]

    return factory(Without(log))


# ---- workers that cannot start --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [(no_model, ModelError, "is not on this machine"), (die, WorkerError, "2 workers in a row could not start")],
)
def test_workers_that_cannot_start(tmp_path, pools, monkeypatch, how, error, message):
    monkeypatch.setattr(ray_pool, "STARTS", 2)
    monkeypatch.setattr(ray_pool, "KILLED_STARTS", 2)
    make = OnlyHere(logged(tmp_path / "log"), how, tmp_path)
    with pytest.raises(error, match=message):
        search(experiment(*SETTINGS), tmp_path / "run", make, workers=TWO)
    assert len(list(tmp_path.glob("start*"))) <= 3


def test_workers_that_are_killed_while_they_start(tmp_path, pools, undisturbed, monkeypatch):
    """More of them than may raise: as with other deaths, others take their places."""
    monkeypatch.setattr(ray_pool, "PAUSES", (0.0, 0.1))
    kills = ray_pool.STARTS + 1
    make = OnlyHere(logged(tmp_path / "log"), die, tmp_path, successes=-kills)
    search(experiment(*SETTINGS), tmp_path / "run", make, workers=TWO)
    same(outcome(tmp_path / "run"), undisturbed[0])
    told = [event["message"] for event in events_in(tmp_path / "run", "warning")]
    assert sum("was lost while it started" in message for message in told) == kills
    assert pools[0].stats["workers_started"] == kills + 2


def test_a_worker_that_cannot_be_replaced(tmp_path, pools, undisturbed, monkeypatch):
    """The others go on, and nothing is started for ever."""
    monkeypatch.setattr(ray_pool, "STARTS", 2)
    expected, names = undisturbed
    dies = Once(unit_of(names, 0), tmp_path / "dead", die)
    waits = Once(unit_of(names, 2), tmp_path / "waited", wait_for, tmp_path / "start3")
    make = OnlyHere(logged(tmp_path / "log", 0.02, All(dies, waits)), bug, tmp_path, successes=2)
    search(experiment(*SETTINGS), tmp_path / "run", make, workers=TWO)
    same(outcome(tmp_path / "run"), expected)
    told = [event["message"] for event in events_in(tmp_path / "run", "warning")]
    assert sum("a bug in a bench" in message for message in told) >= 2
    assert pools[0].stats["workers_started"] == 2 + 2


# ---- a full disk ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder):
    """A disk of its own where that is allowed (yields True), else a limit on the size of this process's files."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


class Fills:
    """A tracker that fills the disk after a generation."""

    def __init__(self, folder, generation, mounted):
        self.folder, self.generation, self.mounted = folder, generation, mounted

    def start(self, config, generations, done): ...

    def log(self, record):
        if record.generation != self.generation:
            return
        if not self.mounted:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            size = (self.folder / "run" / "journal.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, resource.RLIM_INFINITY))
            return
        with (self.folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(256))

    def artifact(self, name, path): ...

    def finish(self, summary): ...


def test_a_full_disk(tmp_path, undisturbed):
    expected, names = undisturbed
    folder = tmp_path / "disk"
    with small_disk(folder) as mounted:
        make = logged(tmp_path / "log", 0.01)
        message = "the disk is full" if mounted else os.strerror(errno.EFBIG)
        try:
            with pytest.raises(RunError, match=message):
                search(experiment(*SETTINGS), folder / "run", make, tracker=Fills(folder, 1, mounted), workers=TWO)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        (folder / "filler").unlink(missing_ok=True)
        finished, now = units_in(folder / "run"), time.time()
        assert len(finished) >= 2 * 24
        search(experiment(*SETTINGS), folder / "run", make, resume=True, workers=TWO)
        same(outcome(folder / "run"), expected)
        nothing_again(tmp_path / "log", names, dict.fromkeys(finished, now))
