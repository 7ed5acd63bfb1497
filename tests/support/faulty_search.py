"""Searches in worker processes that log what they evaluate, and misbehave on demand."""

from __future__ import annotations

import hashlib
import itertools
import os
import resource
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from evomem.errors import ModelError
from evomem.evaluation.measurement import LOGLIK, Evaluation
from evomem.evaluation.store import Reading
from evomem.memory import LayerView
from evomem.runs.journal import read_journal
from tests.support.synthetic_search import ToyEvaluator, factory

SETTINGS = ("generations=3", "select.contexts=2", "sealed.contexts=2")


class Logged(ToyEvaluator):
    """Appends a line to a file when an evaluation begins: time, process, what; then commits its fault, if any."""

    def __init__(self, log, sleep=0.0, fault=None, broken=None):
        super().__init__(sleep, broken)
        self.log, self.fault = Path(log), fault

    def evaluate(self, candidates, sample, task, measurement=LOGLIK):
        name = identity(candidates, sample)
        note(self.log, name)
        if self.fault is not None:
            self.fault(name, candidates)
        return super().evaluate(candidates, sample, task, measurement)


def note(log, what) -> None:
    """Append time, process and what to a log; one small write, so that lines stay whole, whoever else writes."""
    with Path(log).open("a") as file:
        file.write(f"{time.time()!r} {os.getpid()} {what}\n")


def identity(candidates, sample) -> str:
    """What is evaluated, whoever does it: sample, budget, candidates."""
    parts = [(c.name, c.options, weights(c)) for c in candidates]
    return hashlib.sha256(repr([sample.id, parts]).encode()).hexdigest()[:16]


def weights(candidate) -> list[list[float]]:
    return [p.detach().flatten().tolist() for p in candidate.parameters()]


def logged(log, sleep=0.0, fault=None, broken=None):
    """Return the factory of a bench whose evaluations are logged."""
    return factory(Logged(log, sleep, fault, broken))


# ---- what came of it ------------------------------------------------------------------------------------------------


def entries(log) -> list[tuple[float, int, str]]:
    """Return (time, process, what) of everything that began."""
    lines = Path(log).read_text().splitlines() if Path(log).exists() else []
    return [(float(at), int(pid), name) for at, pid, name in (line.split() for line in lines)]


def begun(log) -> Counter:
    """How often each thing began to be evaluated."""
    return Counter(name for _, _, name in entries(log))


def units_in(folder) -> list[tuple[str, str]]:
    """Return key and candidates of the units that are in a journal now."""
    return [(r["key"], r["candidates"]) for r in read_journal(folder / "journal.jsonl") if r["kind"] == "unit"]


def names_of_units(folder, log) -> dict[tuple[str, str], str]:
    """Return what a run in one process evaluated for each line of its journal, which are in the same order."""
    units, names = units_in(folder), [name for _, _, name in entries(log)]
    assert len(units) == len(names) == len(set(names))
    return dict(zip(units, names, strict=True))


def events_in(folder, event) -> list[dict]:
    """Return a journal's events of a kind."""
    return [r for r in read_journal(folder / "journal.jsonl") if r["kind"] == "event" and r["event"] == event]


# ---- faults ---------------------------------------------------------------------------------------------------------


class Once:
    """Does something the first time that a process evaluates one thing; a file remembers it beyond the process."""

    def __init__(self, name, marker, what, *arguments):
        self.name, self.marker, self.what, self.arguments = name, Path(marker), what, arguments

    def __call__(self, name, candidates):
        if name == self.name and first(self.marker):
            self.what(*self.arguments)


class All:
    """Several faults."""

    def __init__(self, *faults):
        self.faults = faults

    def __call__(self, name, candidates):
        for fault in self.faults:
            fault(name, candidates)


class SlowProcess:
    """The first process that evaluates anything is slow from then on."""

    def __init__(self, marker, seconds):
        self.marker, self.seconds = Path(marker), seconds

    def __call__(self, name, candidates):
        if first(self.marker):
            self.marker.write_text(str(os.getpid()))
        if self.marker.read_text() == str(os.getpid()):
            time.sleep(self.seconds)


class Killer:
    """One candidate ends its process whenever it is evaluated."""

    def __init__(self, candidate):
        self.weights = weights(candidate)

    def __call__(self, name, candidates):
        if any(weights(candidate) == self.weights for candidate in candidates):
            time.sleep(0.1)
            die()


class Refuses:
    """Fails a test in whose process a candidate is evaluated."""

    def __init__(self, candidate):
        self.weights = weights(candidate)

    def __call__(self, name, candidates):
        assert not any(weights(candidate) == self.weights for candidate in candidates)


def first(marker) -> bool:
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(10_000)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)  # not even its threads run


def exhaust() -> None:
    """Ask for more memory than this process may have: a MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), before[1]))
    try:
        np.ones(1 << 28)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def wait_for(path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def killed_while_allocating() -> None:
    """What the system does to a process that takes too much."""
    held = []
    while True:
        held.append(np.ones(1 << 22))  # 32 MB
        if len(held) == 8:
            die()


def breaks(loglik, sample, place):
    """NaN and infinite fitness."""
    return {1: float("nan"), 2: float("inf"), 3: float("-inf")}.get(place, loglik) if loglik < -4 else loglik


class OnlyHere:
    """A bench factory that works in this process and fails in others, from the start or after so many successes.

    With a negative number of successes it fails so often, and works then.
    """

    def __init__(self, make, how, folder, successes=0):
        self.make, self.how, self.here = make, how, os.getpid()
        self.folder, self.successes = Path(folder), successes

    def __call__(self, config):
        if os.getpid() != self.here:
            number = next(i for i in itertools.count() if first(self.folder / f"start{i}"))
            if number >= self.successes if self.successes >= 0 else number < -self.successes:
                self.how()
        return self.make(config)


def no_model() -> None:
    raise ModelError("the model is not on this machine")


def bug() -> None:
    raise ZeroDivisionError("a bug in a bench")


# ---- a pool without a search ----------------------------------------------------------------------------------------


def weighing(parts, readings):
    """The `Evaluate` of a recipe whose parts hold an array; it says how it finds it, and logs what it reads."""
    array = parts["array"]

    def read(unit):
        note(parts["log"], unit.sample.id)
        keys = torch.full((1, 1, 1 << 17, 2), float(unit.sample.id[1:]))  # 1 MB
        slots, start = torch.zeros((1, 1, 1), dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        return Reading((LayerView(keys, keys[:, :, :1], slots, start, 1, 1, 0, 1),), 1)

    def evaluate(unit):
        view = readings.get(unit.sample.id, lambda: read(unit)).views[0]
        assert (view.keys == float(unit.sample.id[1:])).all()
        time.sleep(0.02)
        assert "transformers.modeling_utils" not in sys.modules  # would take a worker seconds, and it needs no model
        facts = {"loglik": float(array[:10].sum())}, float(array.flags.writeable), float(os.getpid()), 0.0
        return [Evaluation(unit.sample.id, *facts, 0, 0.0) for _ in unit.seeds]

    return evaluate
