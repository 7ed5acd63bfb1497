"""The toy search in worker processes that log what they evaluate, and misbehave on demand."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from pathlib import Path

from synthetic_search import ToyEvaluator, factory

from evomem.runs.journal import read_journal

SETTINGS = ("generations=4", "select.contexts=2", "sealed.contexts=2")


class Logged(ToyEvaluator):
    """Appends a line to a file when an evaluation begins: time, process, sample, budget and candidates, hashed."""

    def __init__(self, log, sleep=0.0, fault=None):
        super().__init__(sleep)
        self.log, self.fault = Path(log), fault

    def evaluate(self, candidates, sample, task, *, exact=False):
        name = identity(candidates, sample)
        line = f"{time.time()!r} {os.getpid()} {name}\n"
        with self.log.open("a") as file:  # one small write: whole lines, whoever else writes
            file.write(line)
        if self.fault is not None:
            self.fault(name, candidates, sample)
        return super().evaluate(candidates, sample, task, exact=exact)


def identity(candidates, sample) -> str:
    """What is evaluated, whoever does it."""
    parts = [repr((c.name, c.options)) for c in candidates]
    parts += [repr([p.detach().flatten().tolist() for p in c.parameters()]) for c in candidates]
    return hashlib.sha256(repr([sample.id, parts]).encode()).hexdigest()[:16]


def logged(log, sleep=0.0, fault=None):
    """Return the factory of a bench whose evaluations are logged."""
    return factory(Logged(log, sleep, fault))


def entries(log) -> list[tuple[float, int, str]]:
    """Return (time, process, what) of everything that began."""
    lines = Path(log).read_text().splitlines() if Path(log).exists() else []
    return [(float(at), int(pid), name) for at, pid, name in (line.split() for line in lines)]


def names_of_units(folder, log) -> dict[tuple[str, str], str]:
    """Return what a run in this process evaluated for each line of its journal, in the same order."""
    units = [(r["key"], r["candidates"]) for r in read_journal(folder / "journal.jsonl") if r["kind"] == "unit"]
    names = [name for _, _, name in entries(log)]
    assert len(units) == len(names) == len(set(names))
    return dict(zip(units, names, strict=True))


def units_in(folder) -> list[tuple[str, str]]:
    """Return key and candidates of the units that are in a journal now."""
    return [(r["key"], r["candidates"]) for r in read_journal(folder / "journal.jsonl") if r["kind"] == "unit"]


def events_in(folder, event) -> list[dict]:
    """Return a journal's events of a kind."""
    return [r for r in read_journal(folder / "journal.jsonl") if r["kind"] == "event" and r["event"] == event]


def begun(log) -> Counter:
    """How often each thing began to be evaluated."""
    return Counter(name for _, _, name in entries(log))
