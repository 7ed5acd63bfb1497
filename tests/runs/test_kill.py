"""Runs: real processes, killed with SIGKILL at random moments and resumed, end as the one that was left alone."""

from __future__ import annotations

import random
import time

from evomem.runs import search
from evomem.runs.journal import read_journal
from tests.support.interrupted_search import outcome, same
from tests.support.processes import forkserver
from tests.support.synthetic_search import ToyEvaluator, experiment, factory, run

SETTINGS = ("generations=6", "train_contexts=20", "fitness.normalise=full", "driver.options.diagonal=true")
KILLS = 10


def test_kill_9_at_random_moments(tmp_path):
    search(experiment(*SETTINGS), tmp_path / "undisturbed", factory(ToyEvaluator()))
    expected = outcome(tmp_path / "undisturbed")
    processes = forkserver()  # every process that it forks is a real one
    rng, kills, rounds, places = random.Random(0), 0, 0, set()
    while kills < KILLS:
        rounds += 1
        folder = tmp_path / f"run{rounds}"
        while not (folder / "result.json").exists():
            process = processes.Process(target=run, args=(folder, SETTINGS, 0.002))
            before = lines(folder)
            process.start()
            deadline = time.monotonic() + 60
            while process.is_alive() and lines(folder) == before and time.monotonic() < deadline:
                time.sleep(0.005)  # it is at work when the journal grows
            process.join(rng.uniform(0.0, 0.3))
            if process.is_alive() and kills < KILLS:
                process.kill()
                process.join()
                kills += process.exitcode == -9  # it may have ended just before
                places.add(lines(folder))
            process.join()
            assert process.exitcode in (0, -9)
        same(outcome(folder), expected)
    assert len(places) > KILLS // 2  # they did not all die at the same place
    events = [r["event"] for r in read_journal(folder / "journal.jsonl") if r["kind"] == "event"]
    assert "resume" in events


def lines(folder):
    """Number of complete lines in a run's journal."""
    journal = folder / "journal.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0
