"""What libraries cannot do is an error of ours before they are asked: every driver at its smallest and its largest."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest

from evomem.bounds import POPULATION, SMALL
from evomem.drivers import build, drivers
from evomem.drivers.base import Fitness, Stage
from evomem.drivers.estimators import Rollouts
from evomem.drivers.restarts import first_descent, next_descent
from evomem.errors import ConfigError
from evomem.evaluation.measurement import Step
from evomem.search_space.option_ranges import Categorical, Integer, Variable

OPTIONS = {
    "cmaes": [
        {}, {"diagonal": True}, {"mirrored": True}, {"restarts": "ipop"}, {"restarts": "bipop"}, {"restart_spread": 0},
    ],
    "block_cmaes": [{}, {"search": "random"}, {"shared_diagonal": False}, {"block_sigma": SMALL}],
    "evotorch_cmaes": [{}, {"diagonal": True}],
    "pgpe": [{}, {"optimizer": "adam"}, {"optimizer": "sgd", "center_learning_rate": 1e6}, {"max_speed": 1e-300}],
    "cem": [{}, {"parents": 0.01}, {"parents": 0.99, "stdev_max_change": None}],
    "nsga2": [{}, {"tournament": POPULATION}, {"remeasure": False}, {"mutation": 1e-300, "crossover": 0}],
    "evolkv": [{}, {"group": 2}, {"group": 3}, {"generations": 1}],
    "snes": [{}, {"stdev_learning_rate": 1e6}],
    "policy_gradient": [{}, {"estimator": "grpo", "clip_norm": 1e-300}, {"learning_rate": 1e6}],
}  # fmt: skip


def settings_of(kind, dim: int) -> list[dict]:
    """What a search space adds for a driver: blocks of two coordinates and of one, none, and kinds of variables."""
    if "variables" in kind.takes:
        whole, word = Integer(kind="integer", low=0, high=1), Categorical(kind="categorical", choices=["a", "b"])
        last = Variable(dim - 1, 1, whole.bounds, whole.codes())
        words = [Variable(0, 2, None, word.codes())] if dim > 2 else []
        return [{"variables": []}, {"variables": [*words, last]}]
    if "blocks" in kind.takes:
        pairs = [np.array([place, place + 1]) for place in range(0, dim - 3, 2)]
        return [{"blocks": []}, {"blocks": pairs}, {"blocks": [np.array([0])]}]
    return [{}]


def turns(driver, dim: int) -> None:
    """Three generations: of different, of equal, and of partly failed candidates."""
    for generation in range(3):
        per_head = "per_head" in driver.uses and bool(generation % 2) and bool(driver._blocks)
        driver.enter(Stage(0, 3, per_head=per_head, exact=generation == 0))
        population = driver.ask()
        count = len(population.vectors)
        assert np.isfinite(population.vectors).all()
        values = [-np.abs(population.vectors).sum(1), np.ones(count), np.where(np.arange(count) % 2, np.nan, 1.0)]
        fitness = values[generation]
        step = Step(Step.pack(np.ones(dim, dtype=np.float32)), ascent=generation == 0, choices=1)
        told = {
            "per_head": np.repeat(fitness[:, None], len(driver._blocks), 1) if per_head else None,
            "costs": np.arange(count, dtype=np.float64),
            "rollouts": (Rollouts(1.0, fitness[:, None], [(step,)] * count),),
        }
        driver.tell(population, Fitness(fitness, **told))
        if driver.stopped() is not None:
            break
    assert np.isfinite(driver.mean).all()
    driver.state_dict()


@pytest.mark.parametrize("name", list(drivers))
def test_a_driver_works_at_its_limits_or_says_what_they_are(name):
    kind, worked, refused = drivers.get(name), 0, set()
    for dim, population, sigma in itertools.product([1, 2, 5], [2, 3, 7, None], [0.3, SMALL, 1e6]):
        for more, space in itertools.product(OPTIONS.get(name, [{}]), settings_of(kind, dim)):
            if (sigma != 0.3 and (more or population != 3)) or (dim == 2 and more):
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of steps that are larger than numbers
                try:
                    driver = build(name, dim, np.zeros(dim), 0, popsize=population, sigma=sigma, **more, **space)
                    turns(driver, dim)
                    worked += 1
                except ConfigError as error:
                    refused.add(str(error))
    assert worked > 10
    assert all(name in message or "driver" in message for message in refused)


@pytest.mark.parametrize("name", list(drivers))
@pytest.mark.parametrize(
    "bad", [{"popsize": 1}, {"popsize": 10**9}, {"sigma": 0}, {"sigma": 1e-40}, {"sigma": 1e300}, {"sigma": np.nan}]
)
def test_numbers_that_no_driver_takes(name, bad):
    with pytest.raises(ConfigError, match=r"driver\.(population|sigma)"):
        build(name, 4, np.zeros(4), 0, **bad)


@pytest.mark.parametrize("name", ["cmaes", "block_cmaes"])
def test_cmas_smallest_population_is_an_option_s_limit(name):
    with pytest.raises(ConfigError, match=r"driver\.population.*3"):
        build(name, 4, np.zeros(4), 0, popsize=2)


@pytest.mark.parametrize("kind", ["ipop", "bipop"])
def test_restarts_stay_within_the_populations_that_there_may_be(kind):
    state, seen = first_descent(3, 0.3), []
    for _ in range(60):
        state = next_descent(kind, state, 1000, 3, 0.3, 0)
        seen.append(state.regime.popsize)
    assert min(seen) >= 3
    assert POPULATION / 2 < max(seen) <= POPULATION
