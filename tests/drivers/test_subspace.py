"""A driver on some coordinates of a vector is the driver of a smaller space, and the others stay where they are."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from evomem.drivers import Fitness, Stage, SubspaceDriver, build
from evomem.errors import ConfigError
from tests.support.gaussian_policy import parts, sphere, tell

COORDINATES, FROZEN = np.array([1, 2, 4, 6]), np.linspace(-1, 1, 7)
KINDS = ["cmaes", "snes", "random_search", "policy_gradient", "evolkv"]


def pair(name):
    inner, plain = (build(name, 4, FROZEN[COORDINATES], 3) for _ in range(2))
    return SubspaceDriver(inner, COORDINATES, FROZEN), plain


@pytest.mark.parametrize("name", KINDS)
def test_it_is_the_driver_of_the_smaller_space_to_the_bit(name):
    whole, plain = pair(name)
    others = np.setdiff1d(np.arange(7), COORDINATES)
    for driver in (whole, plain):
        driver.enter(Stage(0, 4))
    for _ in range(4):
        asked, expected = whole.ask(), plain.ask()
        assert np.array_equal(asked.vectors[:, COORDINATES], expected.vectors)
        assert np.array_equal(asked.vectors[:, others], np.tile(FROZEN[others], (len(asked.vectors), 1)))
        assert np.array_equal(asked.seeds, expected.seeds)
        assert np.array_equal(asked.learns, COORDINATES)
        fitness = sphere(expected.vectors)
        came_of_it = Fitness(fitness, **parts(plain, expected, fitness))
        plain.tell(expected, came_of_it)
        whole.tell(asked, came_of_it)
        assert np.array_equal(whole.mean[COORDINATES], plain.mean)
        assert np.array_equal(whole.mean[others], FROZEN[others])
        assert (whole.generation, whole.stopped(), whole.uses) == (plain.generation, plain.stopped(), plain.uses)
        assert repr(whole.sigma) == repr(plain.sigma)


@pytest.mark.parametrize("name", KINDS)
def test_its_state_is_the_inner_drivers(name):
    whole, _ = pair(name)

    def step(driver):
        asked, inner = driver.ask(), driver.inner.ask()
        fitness = sphere(inner.vectors)
        driver.tell(asked, Fitness(fitness, **parts(driver, inner, fitness)))

    for _ in range(2):
        step(whole)
    asked = whole.ask()
    again, _ = pair(name)
    again.load_state_dict(pickle.loads(pickle.dumps(whole.state_dict())))
    assert np.array_equal(again.ask().vectors, asked.vectors)
    for driver in (whole, again):
        step(driver)
    assert np.array_equal(again.mean, whole.mean)


def test_another_population_is_refused():
    whole, _ = pair("cmaes")
    asked = whole.ask()
    asked.vectors[0, 1] += 1
    with pytest.raises(ConfigError, match="changed since"):
        tell(whole, asked, sphere(asked.vectors))
