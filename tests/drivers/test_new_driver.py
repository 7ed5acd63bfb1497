"""A new driver is one class with its algorithm in it: it passes what every driver must, and searches."""

from __future__ import annotations

import numpy as np
import pytest

import evomem.drivers.base as base
from evomem.drivers import Driver, Fitness, drivers
from evomem.errors import ConfigError
from evomem.registry import Registry
from evomem.runs import search
from tests.drivers import test_drivers as every
from tests.support.interrupted_search import Interrupted, Stop, outcome, same
from tests.support.synthetic_search import ToyEvaluator, experiment, factory

INVARIANTS = [
    every.test_asks_what_it_is_told_to,
    every.test_resumes_bit_exactly_between_ask_and_tell_and_after,
    every.test_same_seed_same_search_other_seed_another,
    every.test_a_generation_without_any_fitness_is_refused_and_nothing_is_lost,
    every.test_a_population_that_was_not_asked_is_refused_and_nothing_is_lost,
    every.test_a_fitness_that_says_nothing_is_survived,
    every.test_a_stage_does_not_change_between_ask_and_tell,
    every.test_the_state_of_another_driver_is_refused,
    every.test_what_a_caller_does_to_its_arrays_is_not_the_drivers,
]


@pytest.fixture
def toy(monkeypatch):
    """(1 + n) hill climbing: steps grow while it gains, by a generator and numbers that nobody else saves."""
    monkeypatch.setattr(drivers, "_classes", dict(drivers._classes))

    @drivers.register("hill")
    class Hill(Driver):
        """A hill climber, for the tests."""

        def _ask(self):
            self.step = getattr(self, "step", self.options.sigma)
            self.here = getattr(self, "here", (-np.inf, self.start))
            return self.here[1] + self.step * self.rng.standard_normal((self.popsize, self.dim))

        def _tell(self, vectors, fitness):
            best = int(np.argmax(fitness.values))
            gained = fitness.values[best] > self.here[0]
            self.step *= 1.2 if gained else 0.8
            if gained:
                self.here = (float(fitness.values[best]), vectors[best])

    return Hill


@pytest.mark.parametrize("invariant", INVARIANTS)
def test_the_algorithm_is_enough_for_what_every_driver_must(toy, invariant):
    invariant("hill", {})
    invariant("hill", {"popsize": 3, "sigma": 0.1})


def test_it_is_found_by_name_and_searches_one_dimension(toy, tmp_path, monkeypatch, capfd, recwarn):
    every.test_leaves_the_world_alone("hill", {}, tmp_path, monkeypatch, capfd, recwarn)
    every.test_one_dimension_is_searched_or_refused_with_a_message("hill")
    every.test_wrong_options_are_named("hill", {"sigma": 0}, "driver 'hill'.*sigma")
    every.test_every_driver_has_a_line_for_the_list("hill")
    assert "hill" in drivers.names()


def test_a_search_with_it_that_is_killed_again_and_again_ends_the_same(toy, tmp_path):
    config = experiment("select={contexts: 2, top: 2, snapshots: 2}", "sealed.contexts=2", driver="hill", generations=4)
    search(config, tmp_path / "whole", factory(ToyEvaluator()))
    for _ in range(300):
        try:
            search(config, tmp_path / "run", factory(Interrupted(19)), resume=True)
            break
        except Stop:
            continue
    same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))
    mean = np.load(tmp_path / "whole" / "start" / "vector.npy")
    assert not np.array_equal(mean, np.load(tmp_path / "whole" / "winner" / "vector.npy"))


def test_what_cannot_be_a_driver_is_refused(toy):
    registry = base._Drivers("driver")
    assert isinstance(registry, Registry)
    with pytest.raises(ConfigError, match=r"no subclass of evomem\.drivers\.Driver"):
        registry.register("duck")(type("Duck", (), {"ask": None, "tell": None}))
    for what, message in (("uses", "per_head, costs, rollouts"), ("takes", "blocks, variables, warm")):
        with pytest.raises(ConfigError, match=f"{what}: 'magic' is none of {message}"):
            registry.register("wrong")(type("Wrong", (toy,), {what: frozenset({"magic"})}))


def test_a_driver_whose_attributes_cannot_be_saved_says_so(toy):
    class Opaque:
        pass

    driver = every.new("hill", {})
    driver.ask()
    driver.helper = Opaque()
    with pytest.raises(ConfigError, match=r"hill.*Opaque.*_state and _load"):
        driver.state_dict()
    del driver.helper
    driver.function = lambda: 0  # code is not state
    driver.state_dict()


@pytest.mark.parametrize("vectors", [np.zeros(5), np.zeros((3, 4)), np.zeros((0, 5)), np.full((3, 5), np.nan)])
def test_proposals_of_another_shape_or_not_finite_are_refused(toy, vectors, monkeypatch):
    monkeypatch.setattr(toy, "_ask", lambda self: vectors)
    with pytest.raises(ConfigError, match="driver 'hill': proposes"):
        every.new("hill", {}).ask()


def test_a_mean_that_is_no_longer_finite_stops_the_search(toy, monkeypatch):
    driver = every.new("hill", {})
    first = driver.ask()
    monkeypatch.setattr(toy, "_mean", lambda self: np.full(5, np.nan if self.generation else 1.0))
    driver.tell(first, Fitness(np.zeros(len(first.vectors))))
    assert "no longer finite" in driver.stopped()
    assert driver.mean.tolist() == [1.0] * 5
    resumed = every.new("hill", {})
    resumed.load_state_dict(driver.state_dict())
    assert (resumed.stopped(), resumed.mean.tolist()) == (driver.stopped(), [1.0] * 5)
