"""A search whose evaluator is a formula: fast, deterministic, with noise that depends on the sample only."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from evomem.evaluation.measurement import LOGLIK, Evaluation
from evomem.managers.base import ManagerOptions, managers, register
from evomem.managers.base import MemoryManager as Base
from evomem.runs import Bench, parse_experiment, search
from evomem.tasks.base import Sample

DIM = 6


class ToyOptions(ManagerOptions):
    sinks: int = 2
    rate: float = 0.5
    mode: str = "soft"


if "toy" not in managers:

    @register("toy")
    class Toy(Base):
        """Two numbers, for the tests of searches."""

        Options = ToyOptions

        def __init__(self, **options):
            super().__init__(**options)
            self.first = nn.Parameter(torch.randn(2, 2))
            self.second = nn.Parameter(torch.zeros(DIM - 4))
            self.register_buffer("mean", torch.zeros(2))

        def score(self, view):
            return view.slots.float() * self.second.sum()

        @classmethod
        def start_from(cls, heuristic, **options):
            made = cls(**options)
            with torch.no_grad():
                made.first.fill_(1.0)
            return made


class ToyTask:
    name = "toy"
    uniform_chance = 0.0
    has_exact = True

    def __init__(self, label):
        self.label = label

    def samples(self, split, n, seed):
        return [Sample(f"{self.label}/{split}/{seed}/{k}", "c", "q", " a", ("a",), 4) for k in range(n)]

    def score(self, sample, output):
        return 1.0

    def describe(self):
        return {}


def number(*parts) -> float:
    """A number in [0, 1) that depends on nothing but the parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big") / 2**48


class ToyEvaluator:
    """loglik = -|weights - target|^2 (a little different per sample) - difficulty of the sample."""

    def __init__(self, sleep=0.0, broken=None):
        self.sleep, self.broken = sleep, broken
        self.calls = []

    def evaluate(self, candidates, sample, task, measurement=LOGLIK):
        if self.sleep:  # to sleep for no time is to let other processes go first
            time.sleep(self.sleep)
        exact = "exact" in measurement
        self.calls.append((sample.id, len(candidates), exact))
        found = []
        for place, manager in enumerate(candidates):
            if manager.name == "full":
                weights, budget = np.full(DIM, 0.7), 100
            else:
                weights = torch.cat([p.detach().reshape(-1) for p in manager.parameters()]).double().numpy()
                budget = manager.options.budget or 64
            target = np.array([0.7 + 0.1 * (number(sample.id, i) - 0.5) for i in range(DIM)])
            loglik = -float(((weights - target) ** 2).sum()) - 3 * number(sample.id) - 1 / budget
            if self.broken is not None:
                loglik = self.broken(loglik, sample, place)
            values = {"loglik": loglik} | ({"exact": float(np.exp(loglik))} if exact else {})
            found.append(Evaluation(sample.id, values, budget, 1e6 * budget, 1e6 * budget, 10, 0.01))
        return found


def experiment(*settings, **changes):
    """A small experiment, two tasks, two budgets, chunks smaller than the population."""
    data = {
        "name": "synthetic",
        "model": "none",
        "space": {"manager": {"name": "toy"}, "sigma": 0.3},
        "tasks": ["toy:a", {"spec": "toy:b", "weight": 2.0}],
        "driver": {"name": "cmaes", "population": 6},
        "generations": 8,
        "samples_per_generation": 3,
        "train_contexts": 7,
        "budgets": [32, 64],
        "chunk": 4,
        "select": {"contexts": 5, "top": 2, "snapshots": 1},
        "sealed": {"contexts": 6},
    }
    return parse_experiment({**data, **changes}, settings)


def factory(evaluator):
    return lambda config: Bench(evaluator, lambda task: ToyTask(task.spec), provenance={"model_digest": "none"})


def run(folder, settings, sleep):
    """What a killed process runs."""
    os.environ["OMP_NUM_THREADS"] = "1"
    search(experiment(*settings), folder, factory(ToyEvaluator(sleep)), resume=True)


if __name__ == "__main__":
    run(Path(sys.argv[1]), json.loads(sys.argv[2]), float(sys.argv[3]))
