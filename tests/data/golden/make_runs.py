"""Record runs that are killed and gone on with, and states of drivers, by the code of commit 1ffdb50; see make.py."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from evomem.evaluation.types import Step
from evomem.varying import Bounded, Categorical, Integer, Variable
from make_bench import bench
from make_files import made_with, pack, write

from evomem.drivers import build as build_driver
from evomem.drivers import drivers as registry
from evomem.drivers.estimators import Rollouts
from evomem.drivers.state import overlay, snapshot
from evomem.runs import checkpoint as checkpoints
from evomem.runs import open_run, parse_experiment, search

SHORT = {
    "model": "none", "tasks": ["words"], "samples_per_generation": 2, "train_contexts": 4, "chunk": 4,
    "budgets": [8, 12], "select": {"contexts": 2, "top": 1, "snapshots": 1}, "sealed": {"contexts": 2, "exact": False},
}  # fmt: skip
SEARCHED = ["keydiff", "value_norm", "age", "attention_per_query"]
RUNS = {
    "cmaes": {
        **SHORT, "name": "cmaes", "generations": 5, "driver": {"name": "cmaes", "population": 5},
        "space": {"manager": {"name": "feature_scorer", "options": {
            "features": SEARCHED, "sinks": 1, "recent": 2, "budget": 10}}, "sigma": 0.5},
    },
    "block_cmaes": {
        **SHORT, "name": "block_cmaes", "driver": {"name": "block_cmaes", "population": 5},
        "space": {"manager": {"name": "feature_scorer", "options": {
            "features": SEARCHED, "layers": 2, "heads": 2, "sinks": 1, "recent": 2, "budget": 10}},
            "start": {"heuristic": "keydiff"}, "sigma": 0.3},
        "stages": [
            {"name": "attention", "generations": 2, "budgets": [8], "fitness": {"objective": "attention"}},
            {"name": "likelihood", "generations": 3},
        ],
    },
    "policy_gradient": {
        **SHORT, "name": "policy_gradient", "chance_contexts": 0,
        "driver": {"name": "policy_gradient", "population": 4, "options": {"estimator": "grpo"}},
        "space": {"manager": {"name": "kv_policy", "options": {"features": SEARCHED, "hidden": 2, "budget": 12}}},
        "stages": [
            {"name": "exact", "generations": 2, "fitness": {"objective": "expected_cost"}},
            {"name": "rollouts", "generations": 3},
        ],
    },
    "policy_gradient_shares": {
        **SHORT, "name": "policy_gradient_shares", "chance_contexts": 0, "generations": 4,
        "driver": {"name": "policy_gradient", "population": 4, "options": {"estimator": "grpo"}},
        "space": {"manager": {"name": "kv_policy", "options": {
            "features": SEARCHED, "actions": ["evict", "store", "forget"], "hidden": 2, "allocation": 2, "odds": 1.0,
            "rate": -2.0, "budget": 12}}},
    },
}  # fmt: skip
"""Searches on a tiny model. Where layers have shares of the budget, no floor binds and all shares can be had."""
KILLED_AFTER = 0.25
"""Share of the journal's lines after which a run is killed."""


def goes_on(name, folder, resume=True):
    torch.set_num_threads(1)
    return search(parse_experiment(RUNS[name]), folder, bench, resume=resume)


def runs(folder):
    """Record runs that were killed in the middle, and what comes of them when this code goes on with them."""
    recorded = {}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        for name in RUNS:
            goes_on(name, place / "whole" / name, resume=False)
            total = journal_lines(place / "whole" / name)
            killed = place / "killed" / name
            process = subprocess.Popen([sys.executable, __file__, str(killed), "--search", name])
            while process.poll() is None and journal_lines(killed) < KILLED_AFTER * total:
                time.sleep(0.001)
            process.kill()
            process.wait()
            lines = journal_lines(killed)
            assert process.returncode == -9
            assert lines < total, "it was finished before it could be killed"
            shutil.copytree(killed, place / "resumed" / name)
            goes_on(name, place / "resumed" / name)
            whole, resumed = (ended(place / which / name) for which in ("whole", "resumed"))
            assert whole == resumed
            recorded[name] = {"experiment": RUNS[name], "killed_after": lines, "of_lines": total, **resumed}
        pack(place / "killed", folder / "runs.zip")
    write(folder / "runs.json", {"made_with": made_with(), "runs": recorded})


def journal_lines(folder):
    journal = folder / "journal.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def ended(folder):
    """Return what a run came to: fitness of every candidate of every generation, the winner's vector."""
    run = open_run(folder)
    fitness = [list(map(float, generation.fitness)) for generation in run.generations()]
    return {"fitness": fitness, "winner": run.winner_vector.tolist()}


DRIVER_BLOCKS = [np.array([0, 1]), np.array([2, 3])]
DRIVER_OPTIONS = {
    "cmaes": {"mirrored": True, "popsize": 9},
    "cmaes_bipop": {"restarts": "bipop", "popsize": 6},
    "block_cmaes": {"blocks": DRIVER_BLOCKS},
    "policy_gradient": {"estimator": "grpo", "popsize": 4},
}


def mixed():
    """Return a number, an integer and a category, as `catcma` is told of them."""
    kinds = [
        Bounded(kind="bounded", low=-1, high=1, scale=0.4),
        Integer(kind="integer", low=0, high=6, scale=0.5),
        Categorical(kind="categorical", choices=["a", "b", "c"]),
    ]
    return [Variable(place, kind.width, kind.bounds, kind.codes()) for place, kind in enumerate(kinds)]


def tell(driver, name, population):
    """Tell a driver the sphere, by the signature of its kind."""
    vectors, parts = population.vectors, []
    if name == "policy_gradient":
        arms = np.arange(len(vectors), dtype=float)
        gradients = [[np.cos(arm + np.arange(5.0) * k) for arm in arms] for k in (1, 2)]
        steps = [[(Step(Step.pack(gradient), choices=5),) for gradient in some] for some in gradients]
        parts = [[Rollouts(0.5, k * arms[:, None], some) for k, some in zip((1, 2), steps, strict=True)]]
    if name == "block_cmaes":
        parts = [np.stack([-(vectors[:, block] ** 2).sum(1) for block in DRIVER_BLOCKS], axis=1)]
    if name == "nsga2":
        parts = [np.abs(vectors[:, 0])]
    driver.tell(population, -(vectors**2).sum(1), *parts)


def states(folder):
    """Record every driver's state between ask and tell and after tell, and what it proposes next."""
    found, options = {}, {**DRIVER_OPTIONS, "catcma": {"variables": mixed(), "popsize": 12}}
    for key in sorted({*options, *registry.names()}):
        name, dim = key.removesuffix("_bipop"), 6 if key == "block_cmaes" else 5
        driver = build_driver(name, dim, np.full(dim, 1.5), 3, **options.get(key, {}))
        if name == "block_cmaes":
            driver.enter(headwise=True)
        if name == "policy_gradient":
            driver.enter(begin=0, end=8, exact=False)
        for _ in range(90 if key == "cmaes_bipop" else 3):
            tell(driver, name, driver.ask())
        kept = []
        for _ in range(2):
            kept.append(overlay(None, snapshot(driver.state_dict()), checkpoints._KINDS))
            population = driver.ask()
        tell(driver, name, population)
        after = {"vectors": population.vectors, "mean": driver.mean, "next": driver.ask().vectors}
        found[key] = {"told": kept[0], "asked": kept[1], **after}
    with tempfile.TemporaryDirectory() as place:
        checkpoints.save(Path(place), checkpoints.Checkpoint(0, False, found, {}, {}, 0, 0))
        (file,) = Path(place).iterdir()
        (folder / "drivers.ckpt.gz").write_bytes(gzip.compress(file.read_bytes(), mtime=0))


if __name__ == "__main__":  # the process that is killed
    torch.set_num_threads(1)
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    goes_on(sys.argv[3], Path(sys.argv[1]))
