"""A search by policy gradient on a model of the zoo: exact gradients first, then rollouts; sizes that take seconds."""

from __future__ import annotations

import time

import torch

from evomem.evaluation import Evaluator
from evomem.runs import parse_experiment, search
from evomem.runs.bench import model_bench

FEATURES = ["key_norm", "keydiff", "age", "attention_per_query", "last:8", "mean:3:keydiff"]
STAGES = [
    {"name": "exact", "generations": 3, "fitness": {"objective": "expected_cost"}},
    {"name": "rollouts", "generations": 3},
]


def configured(*settings, **changes):
    data = {
        "name": "policy", "model": "zoo-gpt-neox",
        "space": {"manager": {"name": "kv_policy", "options": {"features": FEATURES, "hidden": 2, "budget": 12}}},
        "tasks": [{"spec": "zoo_needle", "length": 64}],
        "driver": {"name": "policy_gradient", "population": 4, "options": {"estimator": "grpo"}},
        "samples_per_generation": 2, "train_contexts": 4, "stages": STAGES, "chance_contexts": 0,
        "diagnostics": {"every": 2, "contexts": 1},
        "select": {"contexts": 2, "top": 0}, "sealed": {"contexts": 2, "exact": False}, **changes,
    }  # fmt: skip
    return parse_experiment(data, settings)


def run(folder, pause, settings=()):
    """What a process does: goes on with the search, a little slower."""
    torch.set_num_threads(1)

    def slowly(evaluate):
        def slow(*arguments, **options):
            time.sleep(pause)
            return evaluate(*arguments, **options)

        return slow

    Evaluator.evaluate = slowly(Evaluator.evaluate)
    search(configured(*settings), folder, model_bench, resume=True)
