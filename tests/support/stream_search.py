"""A search on a memory that reads streams, in sizes that take a second, and a process that goes on with it."""

from __future__ import annotations

import time

import torch

from evomem.evaluation.streams import StreamEvaluator
from evomem.runs import parse_experiment, search
from evomem.runs.bench import model_bench

CONFIG = {
    "name": "streams",
    "model": "pair-memory",
    "protocol": {"kind": "streaming", "every": 2},
    "space": {
        "manager": {
            "name": "feature_scorer",
            "options": {
                "features": ["recency", "frequency", "relevance:4"],
                "knots": 1,
                "sinks": 0,
                "recent": 2,
                "budget": 6,
            },
        },
        "start": {"heuristic": "lru"},
        "sigma": 0.3,
    },
    "tasks": [{"spec": "zipf", "length": 40, "options": {"keys": 24, "dim": 8, "topics": 4}}],
    "fitness": {"objective": "exact"},
    "driver": {"name": "cmaes", "population": 4},
    "generations": 2,
    "samples_per_generation": 2,
    "train_contexts": 4,
    "select": {"contexts": 2, "top": 1},
    "sealed": {"contexts": 2},
}
POLICY = {
    **CONFIG,
    "space": {
        "manager": {
            "name": "kv_policy",
            "options": {
                "features": ["recency", "frequency"],
                "hidden": 0,
                "knots": 1,
                "recent": 1,
                "budget": 6,
                "draws": "evicted",
            },
        },
        "start": {"heuristic": "lru"},
    },
    "fitness": {"objective": "exact", "reading": 5, "discount": 0.8},
    "driver": {"name": "policy_gradient", "population": 3},
    "select": {"contexts": 2, "top": 0},
}


def run(folder, pause):
    """What a process does: goes on with the search, a little slower."""
    torch.set_num_threads(1)
    evaluate = StreamEvaluator.evaluate

    def slow(*arguments, **options):
        time.sleep(pause)
        return evaluate(*arguments, **options)

    StreamEvaluator.evaluate = slow
    search(parse_experiment(CONFIG), folder, model_bench, resume=True)
