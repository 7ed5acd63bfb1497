"""Searches that are broken off in the middle, and what of a run must not depend on that."""

from __future__ import annotations

import pytest

from evomem.runs import open_run, search
from tests.support.synthetic_search import ToyEvaluator, experiment, factory

SMALL = ("generations=3", "samples_per_generation=2", "select.contexts=2", "sealed.contexts=2")


def outcome(folder):
    """Everything that must not depend on interruptions: what was measured for whom, fitness, winner."""
    run = open_run(folder)
    units = {}
    for record in run.records():
        if record["kind"] == "unit":
            key = (record["key"], record["candidates"])
            assert key not in units, f"{key} was evaluated twice"
            units[key] = [{**e, "seconds": 0} for e in record["evaluations"]]
    fitness = [generation.fitness for generation in run.generations()]
    result = {**run.result.to_json(), "spent": run.result.spent["evaluations"]}
    return units, repr(fitness), run.winner_vector.tobytes(), repr(result)


def same(one, other):
    assert one[0].keys() == other[0].keys()
    assert one == other


class Stop(BaseException):
    """Stands for whatever ends a process."""


class Interrupted(ToyEvaluator):
    def __init__(self, after):
        super().__init__()
        self.after = after

    def evaluate(self, *arguments, **options):
        if len(self.calls) >= self.after:
            raise Stop
        return super().evaluate(*arguments, **options)


def broken_off(folder, after=40):
    with pytest.raises(Stop):
        search(experiment(*SMALL), folder, factory(Interrupted(after)))
