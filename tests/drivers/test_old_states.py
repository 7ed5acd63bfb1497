"""States that drivers of an earlier version wrote (`tests/data/golden/drivers.ckpt.gz`) go on as they did then."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from evomem.drivers import Fitness, Stage, build, drivers
from evomem.drivers.estimators import Rollouts
from evomem.evaluation.measurement import Step
from evomem.runs import checkpoint as checkpoints
from tests.drivers.test_drivers import MIXED
from tests.support.gaussian_policy import sphere

FILE = Path(__file__).parents[1] / "data" / "golden" / "drivers.ckpt.gz"
BLOCKS = [np.array([0, 1]), np.array([2, 3])]
# What the drivers were made with at 1ffdb50; the others with their defaults. All had dimension 5 (blocks: 6), start 1.5
# and seed 3, and were told 3 generations (bipop: 90) before the state was taken, and one after it.
OPTIONS = {
    "cmaes": {"mirrored": True, "popsize": 9},
    "cmaes_bipop": {"restarts": "bipop", "popsize": 6},
    "block_cmaes": {"blocks": BLOCKS},
    "catcma": {"variables": MIXED, "popsize": 12},
    "policy_gradient": {"estimator": "grpo", "popsize": 4},
}
NAMES = sorted({*OPTIONS, "cem", "evotorch_cmaes", "lra_cma", "nsga2", "pgpe", "random_search", "snes", "xnes"})


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    path = tmp_path_factory.mktemp("states") / "000000-0told.ckpt"
    path.write_bytes(gzip.decompress(FILE.read_bytes()))
    return checkpoints.load(path).driver


def fitness_of(driver, vectors):
    groups = ()
    if "rollouts" in driver.uses:
        arms = np.arange(len(vectors), dtype=float)
        for k in (1, 2):
            gradients = [np.cos(arm + np.arange(5.0) * k) for arm in arms]
            steps = [(Step(Step.pack(gradient), choices=5),) for gradient in gradients]
            groups = (*groups, Rollouts(0.5, k * arms[:, None], steps))
    heads = np.stack([sphere(vectors[:, block]) for block in BLOCKS], axis=1)
    return Fitness(sphere(vectors), per_head=heads, costs=np.abs(vectors[:, 0]), rollouts=groups)


def test_all_drivers_of_then_are_here():
    assert {key.removesuffix("_bipop") for key in NAMES} <= set(drivers.names())


@pytest.mark.parametrize("key", NAMES)
@pytest.mark.parametrize("when", ["told", "asked"])
def test_a_state_of_an_earlier_version_goes_on(golden, key, when):
    case, dim = golden[key], 6 if key == "block_cmaes" else 5
    driver = build(key.removesuffix("_bipop"), dim, np.full(dim, 1.5), 3, **OPTIONS.get(key, {}))
    driver.load_state_dict(case[when])
    driver.enter(Stage(0, 8, per_head=key == "block_cmaes"))
    population = driver.ask()
    assert population.generation == (90 if key == "cmaes_bipop" else 3)
    assert np.array_equal(population.vectors, case["vectors"]) or when == "told"
    assert population.vectors == pytest.approx(case["vectors"], rel=1e-9, abs=1e-12)
    if when == "asked":  # what was asked before the state was saved needs no other ask
        driver = build(key.removesuffix("_bipop"), dim, np.full(dim, 1.5), 3, **OPTIONS.get(key, {}))
        driver.load_state_dict(case[when])
    driver.tell(population, fitness_of(driver, population.vectors))
    # Decompositions of another processor may differ in their last digits.
    assert driver.mean == pytest.approx(case["mean"], rel=1e-6, abs=1e-9)
    assert driver.ask().vectors == pytest.approx(case["next"], rel=1e-6, abs=1e-9)
    assert driver.state_dict()["driver"] == key.removesuffix("_bipop")
