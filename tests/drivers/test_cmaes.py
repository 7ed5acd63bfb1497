"""CMA-ES and random search: invariance, convergence, restarts."""

from __future__ import annotations

import numpy as np
import pytest

from evomem.drivers import Fitness
from evomem.drivers.restarts import first_descent, next_descent
from tests.drivers.test_drivers import VARIANTS, new
from tests.support.gaussian_policy import sphere


def ellipsoid(vectors):
    return -(vectors**2 * 10.0 ** (4 * np.arange(vectors.shape[1]) / (vectors.shape[1] - 1))).sum(axis=1)


@pytest.mark.parametrize("options", [options for name, options in VARIANTS if name == "cmaes"])
def test_cmaes_sees_only_the_order_of_fitness(options):
    plain, bent = new("cmaes", options), new("cmaes", options)
    for _ in range(10):
        a, b = plain.ask(), bent.ask()
        assert np.array_equal(a.vectors, b.vectors)
        plain.tell(a, Fitness(sphere(a.vectors)))
        bent.tell(b, Fitness(np.arctan(sphere(b.vectors)) * 7 - 3))


@pytest.mark.parametrize(("options", "goal"), [({}, sphere), ({}, ellipsoid), ({"diagonal": True}, ellipsoid)])
def test_cmaes_converges(options, goal):
    driver = new("cmaes", {**options, "sigma": 0.5}, dim=10)
    evaluations = 0
    while goal(driver.mean[None])[0] < -1e-8:
        population = driver.ask()
        driver.tell(population, Fitness(goal(population.vectors)))
        evaluations += len(population.vectors)
        assert evaluations < 8000
    assert driver.sigma < 0.01


def test_random_search_believes_in_the_best_it_has_seen():
    driver, seen = new("random_search", {"popsize": 7}), []
    for _ in range(20):
        population = driver.ask()
        driver.tell(population, Fitness(sphere(population.vectors)))
        seen += list(population.vectors)
        assert sphere(driver.mean[None])[0] == sphere(np.array(seen)).max()
    draws = (np.array(seen) - 1.5) / 0.3
    assert abs(draws.mean()) < 0.15
    assert abs(draws.std() - 1) < 0.1


def test_converged_cmaes_stops_without_restarts_and_goes_on_with_them():
    def descend(**options):
        driver, sizes = new("cmaes", {"popsize": 6, **options}, dim=2), []
        while driver.stopped() is None and len(sizes) < 160:
            population = driver.ask()
            sizes.append(len(population.vectors))
            driver.tell(population, Fitness(sphere(population.vectors)))
        return driver, sizes

    driver, sizes = descend()
    assert "converged" in driver.stopped()
    again, more = descend(restarts="ipop")
    assert again.stopped() is None
    assert more[: len(sizes)] == sizes
    assert set(more) >= {6, 12}
    assert more == sorted(more)
    # The best descent's mean is kept while the next one is still far away.
    assert sphere(again.mean[None])[0] > -1e-8


def test_restart_regimes():
    state, popsize, sigma = first_descent(10, 0.5), 10, 0.5
    assert next_descent("none", state, 1000, popsize, sigma, 0) is None
    sizes = []
    for _ in range(5):
        state = next_descent("ipop", state, 1000, popsize, sigma, 0)
        sizes.append(state.regime.popsize)
    assert sizes == [20, 40, 80, 160, 320]
    state = first_descent(10, 0.5)
    used = {"large": 0, "small": 0}
    rng = np.random.default_rng(0)
    for number in range(40):
        spent = int(rng.integers(100, 3000))
        if state.regime.limit is not None:
            spent = min(spent, state.regime.limit)
        if number > 0:
            used[state.regime.kind] += spent
        before = dict(used)
        state = next_descent("bipop", state, spent, popsize, sigma, 7)
        regime = state.regime
        if regime.kind == "small":
            assert before["small"] < before["large"]
            assert 2 <= regime.popsize <= max(2, 10 * 2**state.doublings // 2)
            assert 0.005 <= regime.sigma <= 0.5
            assert regime.limit >= regime.popsize
        else:
            assert before["small"] >= before["large"]
            assert regime.popsize == 10 * 2**state.doublings
            assert regime.sigma == 0.5
    assert min(used.values()) > 0
