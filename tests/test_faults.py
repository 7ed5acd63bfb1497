"""Faults, tried for real: whatever dies on the way, the run ends as the undisturbed one, and nothing is done twice."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import pytest
from faulty_search import SETTINGS, begun, entries, events_in, logged, names_of_units, units_in
from synthetic_search import experiment
from test_runs import outcome, same

from evomem.runs import search
from evomem.workers import WorkerOptions, ray_pool

pytestmark = pytest.mark.usefixtures("ray_here")


@pytest.fixture
def pools(monkeypatch):
    """The pools that searches make, so that a test can see their processes."""
    made = []

    class Seen(ray_pool.RayPool):
        def __init__(self, *arguments, **options):
            made.append(self)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(ray_pool, "RayPool", Seen)
    return made


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The outcome of the run in this process, and what was evaluated for every line of its journal."""
    folder = tmp_path_factory.mktemp("undisturbed")
    search(experiment(*SETTINGS), folder / "run", logged(folder / "log"))
    return outcome(folder / "run"), names_of_units(folder / "run", folder / "log")


class Killer(threading.Thread):
    """Kills random workers at random moments, and notes what the journal held then."""

    def __init__(self, pools, folder, kills, seed):
        super().__init__(daemon=True)
        self.pools, self.folder, self.kills = pools, folder, kills
        self.rng, self.finished, self.over = random.Random(seed), {}, threading.Event()
        self.killed, self.working = [], 0

    def run(self):
        while len(self.killed) < self.kills and not self.over.wait(self.rng.uniform(0.05, 0.6)):
            for pool in self.pools[-1:]:
                pids = [w["pid"] for w in pool.workers() if w["pid"] not in self.killed]
                if pids:
                    now = time.time()
                    for unit in units_in(self.folder):
                        self.finished.setdefault(unit, now)
                    self.killed.append(self.rng.choice(pids))
                    os.kill(self.killed[-1], signal.SIGKILL)


def nothing_again(log, names, finished):
    """Nothing began that was in the journal before."""
    ended = {names[unit]: at for unit, at in finished.items()}
    late = [(name, at - ended[name]) for at, _, name in entries(log) if at > ended.get(name, at)]
    assert late == []


@pytest.mark.parametrize("seed", range(2))
def test_random_workers_killed_at_random_moments(tmp_path, pools, undisturbed, capfd, seed):
    expected, names = undisturbed
    killer = Killer(pools, tmp_path / "run", 5, seed)
    killer.start()
    factory = logged(tmp_path / "log", sleep=0.15)
    search(experiment(*SETTINGS), tmp_path / "run", factory, workers=WorkerOptions(2, cpus=0.5))
    killer.over.set()
    killer.join()
    assert len(killer.killed) == 5
    same(outcome(tmp_path / "run"), expected)
    nothing_again(tmp_path / "log", names, killer.finished)
    assert set(begun(tmp_path / "log")) >= set(names.values())  # more, if candidates were tried alone
    assert pools[-1].stats["workers_started"] >= 2 + 4
    told = [event["message"] for event in events_in(tmp_path / "run", "warning")]
    assert sum("ended unexpectedly" in message for message in told) >= 4
    assert "raylet" not in "".join(capfd.readouterr())  # Ray itself is silent
