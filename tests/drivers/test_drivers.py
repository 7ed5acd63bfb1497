"""Drivers: what every driver in the registry must do, and that the search finds what it looks for."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

import tests.support.synthetic_search  # noqa: F401  (registers the manager "toy")
from evomem.drivers import Fitness, Stage, build, drivers
from evomem.errors import ConfigError, FitnessError, RunError, UnknownNameError
from evomem.search_space.option_ranges import Bounded, Categorical, Integer, Variable
from evomem.search_space.space import SearchSpace, SpaceConfig
from tests.support.gaussian_policy import parts, sphere, tell

KINDS = [
    Bounded(kind="bounded", low=-1, high=1, scale=0.4),
    Integer(kind="integer", low=0, high=6, scale=0.5),
    Categorical(kind="categorical", choices=["a", "b", "c"]),
]
MIXED = [Variable(place, kind.width, kind.bounds, kind.codes()) for place, kind in enumerate(KINDS)]

VARIANTS = [
    ("cmaes", {}),
    ("cmaes", {"diagonal": True}),
    ("cmaes", {"mirrored": True, "popsize": 9}),
    ("cmaes", {"restarts": "ipop", "popsize": 5}),
    ("cmaes", {"restarts": "bipop", "popsize": 6, "diagonal": True}),
    ("random_search", {}),
    ("evotorch_cmaes", {}),
    ("evotorch_cmaes", {"diagonal": True, "popsize": 9}),
    ("snes", {"stdev_learning_rate": 2.0, "popsize": 7}),
    ("pgpe", {}),
    ("pgpe", {"optimizer": "adam", "popsize": 10}),
    ("catcma", {}),
    ("catcma", {"variables": MIXED, "popsize": 12}),
    ("policy_gradient", {}),
    ("policy_gradient", {"estimator": "grpo", "passes": 3, "popsize": 6, "ema": 0.0}),
]
# Whatever else is registered must do the same with its defaults.
VARIANTS += [(name, {}) for name in drivers.names() if name not in dict(VARIANTS)]
every_driver = pytest.mark.parametrize(("name", "options"), VARIANTS)


def new(name, options, dim=5, seed=3):
    return build(name, dim, np.full(dim, 1.5), seed, **options)


@every_driver
def test_asks_what_it_is_told_to(name, options):
    driver = new(name, options)
    for generation in range(6):
        asked, again = driver.ask(), driver.ask()
        assert asked.generation == again.generation == generation
        assert np.array_equal(asked.vectors, again.vectors)
        assert np.array_equal(asked.seeds, again.seeds)
        assert asked.vectors.shape == (options.get("popsize", 4 + int(3 * np.log(5))), 5)
        assert asked.vectors.dtype == np.float64
        distinct = len(np.unique(asked.vectors, axis=0))
        if "rollouts" in driver.uses:
            assert distinct == 1  # one policy, drawn several times
        else:
            assert distinct == len(asked.vectors) or (distinct > 1 and "variables" in options)
        assert len(set(asked.seeds.tolist())) == len(asked.seeds)
        tell(driver, asked, sphere(asked.vectors))
    with pytest.raises(ConfigError, match="tell"):
        tell(driver, asked, sphere(asked.vectors))


@every_driver
def test_resumes_bit_exactly_between_ask_and_tell_and_after(name, options):
    """Save at every point of a search whose fitness has holes; what follows is what would have followed."""
    whole = new(name, options)
    saved, trace = [], []
    for generation in range(24):
        population = whole.ask()
        saved.append((generation, population, pickle.dumps(whole.state_dict())))
        fitness = sphere(population.vectors)
        fitness[generation % 3 :: 4] = (np.nan, np.inf, -np.inf)[generation % 3]
        tell(whole, population, fitness)
        saved.append((generation, None, pickle.dumps(whole.state_dict())))
        trace.append((population, fitness, whole.mean))
    for generation, asked, state in saved[::9] + saved[-2:]:
        resumed = new(name, options)
        resumed.load_state_dict(pickle.loads(state))
        for population, fitness, mean in trace[generation + (asked is None) :]:
            same = resumed.ask()
            assert same.generation == population.generation
            assert np.array_equal(same.vectors, population.vectors)
            assert np.array_equal(same.seeds, population.seeds)
            tell(resumed, same, fitness)
            assert np.array_equal(resumed.mean, mean)
        assert resumed.stopped() == whole.stopped()
        if asked is not None:
            direct = new(name, options)
            direct.load_state_dict(pickle.loads(state))
            tell(direct, asked, trace[generation][1])  # what was asked before the state was saved needs no other ask
            assert np.array_equal(direct.mean, trace[generation][2])


@every_driver
def test_same_seed_same_search_other_seed_another(name, options):
    def search(seed, others):
        """``others`` seeds the generators that belong to everybody."""
        before = np.random.get_state()  # noqa: NPY002
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(others)
            np.random.seed(others)  # noqa: NPY002
            driver = new(name, options, seed=seed)
            for _ in range(5):
                population = driver.ask()
                tell(driver, population, sphere(population.vectors))
        np.random.set_state(before)  # noqa: NPY002
        return driver.ask().vectors

    assert np.array_equal(search(0, 0), search(0, 1))
    assert not np.array_equal(search(0, 0), search(1, 0))


@every_driver
def test_a_generation_without_any_fitness_is_refused_and_nothing_is_lost(name, options):
    driver = new(name, options)
    population = driver.ask()
    with pytest.raises(FitnessError):
        tell(driver, population, np.full(len(population.vectors), np.nan))
    with pytest.raises(ConfigError, match="fitness values"):
        tell(driver, population, np.zeros(2))
    assert np.array_equal(driver.ask().vectors, population.vectors)
    tell(driver, population, sphere(population.vectors))


@every_driver
def test_a_population_that_was_not_asked_is_refused_and_nothing_is_lost(name, options):
    driver, untouched, other = new(name, options), new(name, options), new(name, options, seed=4)
    with pytest.raises(ConfigError, match="without ask"):
        tell(driver, other.ask(), sphere(other.ask().vectors))
    asked = driver.ask()
    changed = asked.copy()
    changed.vectors[-1, 0] += 1e-9
    for foreign in (other.ask(), replace(asked, generation=1), replace(asked, seeds=asked.seeds + 1), changed):
        with pytest.raises(ConfigError, match="not the population last asked"):
            tell(driver, foreign, sphere(asked.vectors))
    with pytest.raises(ConfigError, match=r"takes evomem\.drivers\.Fitness"):
        driver.tell(asked, sphere(asked.vectors))
    for part in driver.uses - {"per_head"}:
        with pytest.raises(ConfigError, match=f"learns from {part}"):
            driver.tell(asked, Fitness(sphere(asked.vectors)))
    told = parts(driver, asked, sphere(asked.vectors))
    for wrong in ({"costs": np.ones(1)}, {"per_head": np.ones((1, 2))}):
        with pytest.raises(ConfigError, match="expected"):
            driver.tell(asked, Fitness(sphere(asked.vectors), **{**told, **wrong}))
    asked.vectors[:] = np.nan  # a caller's own
    for one in (driver, untouched):
        tell(one, one.ask(), sphere(one.ask().vectors))
    assert np.array_equal(driver.ask().vectors, untouched.ask().vectors)
    assert np.array_equal(driver.mean, untouched.mean)


@every_driver
def test_a_fitness_that_says_nothing_is_survived(name, options):
    """All equal, then one result among failures: the search goes on, or says why not, and its mean is finite."""
    driver = new(name, options)
    for generation in range(6):
        population = driver.ask()
        fitness = np.full(len(population.vectors), 2.0)
        fitness[1:] = np.nan if generation % 2 else 2.0
        tell(driver, population, fitness)
        assert np.isfinite(driver.mean).all()
        assert driver.mean.shape == (5,)
        if driver.stopped() is not None:  # one that has seen nothing change may have enough, and says so
            assert "converged" in driver.stopped()
            break


@every_driver
def test_a_stage_does_not_change_between_ask_and_tell(name, options):
    driver = new(name, options)
    driver.enter(Stage(0, 3))
    population = driver.ask()
    driver.enter(Stage(0, 3))
    with pytest.raises(ConfigError, match="between ask"):
        driver.enter(Stage(3, 6))
    resumed = new(name, options)
    resumed.load_state_dict(driver.state_dict())
    with pytest.raises(ConfigError, match="between ask"):
        resumed.enter(Stage(3, 6))
    tell(driver, population, sphere(population.vectors))
    driver.enter(Stage(3, 6))


@every_driver
def test_the_state_of_another_driver_is_refused(name, options):
    state = new(name, options).state_dict()
    with pytest.raises(RunError, match="is of driver 'other'"):
        new(name, options).load_state_dict({**state, "driver": "other"})
    with pytest.raises(RunError, match="has no 'generation'"):
        new(name, options).load_state_dict({k: v for k, v in state.items() if k != "generation"})


def world():
    """What no driver may change: everybody's generators, and how many threads torch uses."""
    legacy = np.random.get_state()  # noqa: NPY002
    return (
        (legacy[1].tobytes(), *legacy[2:]),
        torch.get_rng_state().tolist(),
        random.getstate(),
        torch.get_num_threads(),
    )


@every_driver
def test_leaves_the_world_alone(name, options, tmp_path, monkeypatch, capfd, recwarn):
    monkeypatch.chdir(tmp_path)
    asked_for_ray = []  # whether or not other tests of this process have a Ray
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *arguments, **options: asked_for_ray.append(options))
    before = world()
    (tmp_path / "cma_signals.in").write_text("{'timeout': 0}")
    driver = new(name, options)
    for _ in range(30):
        population = driver.ask()
        tell(driver, population, np.round(sphere(population.vectors)))
        driver.load_state_dict(driver.state_dict())
    assert world() == before
    assert os.listdir(tmp_path) == ["cma_signals.in"]
    assert driver.stopped() is None
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    assert not asked_for_ray


@every_driver
def test_what_a_caller_does_to_its_arrays_is_not_the_drivers(name, options):
    """Vectors, mean and start belong to whoever got or gave them."""
    start = np.full(5, 1.5)
    careful, careless = new(name, options), build(name, 5, start, 3, **options)
    start[:] = 7.0
    for _ in range(4):
        population, other = careful.ask(), careless.ask()
        assert np.array_equal(population.vectors, other.vectors)
        fitness = sphere(other.vectors)
        tell(careful, population, fitness.copy())
        tell(careless, other, fitness)
        fitness[:] = np.nan
        careless.mean[:] = np.nan
        for array in (other.vectors, other.behaviour, other.reference):
            if array is not None:
                array[:] = np.nan


IN_ANOTHER_PROCESS = """
import pickle, sys
from evomem.drivers import Fitness, build
assert not {"evotorch", "ray", "cma", "cmaes"} & set(sys.modules), "a library is imported before it is needed"
cases = pickle.loads(sys.stdin.buffer.read())
found = []
for arguments, options, state, fitness, parts in cases:
    driver = build(*arguments, **options)
    driver.load_state_dict(pickle.loads(state))
    driver.tell(driver.ask(), Fitness(fitness, **parts))
    found.append((driver.mean, driver.ask().vectors))
sys.__stdout__.buffer.write(pickle.dumps(found))
"""


def test_another_process_continues_bit_exactly_and_in_silence():
    """One process for all drivers: the libraries take seconds to import."""
    cases, expected = [], []
    for name, options in VARIANTS:
        driver = new(name, options)
        for _ in range(7):
            population = driver.ask()
            tell(driver, population, sphere(population.vectors))
        population = driver.ask()
        fitness, state = sphere(population.vectors), pickle.dumps(driver.state_dict())
        cases.append(((name, 5, np.full(5, 1.5), 3), options, state, fitness, parts(driver, population, fitness)))
        tell(driver, population, fitness)
        expected.append((driver.mean, driver.ask().vectors))
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS],
        input=pickle.dumps(cases),
        capture_output=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        check=False,
    )
    assert done.stderr == b""
    found = pickle.loads(done.stdout)  # nothing else was printed
    for (name, options), (mean, vectors), (same_mean, same_vectors) in zip(VARIANTS, expected, found, strict=True):
        assert np.array_equal(mean, same_mean), (name, options)
        assert np.array_equal(vectors, same_vectors), (name, options)


# A policy gradient refuses options that vary: they have none.
@pytest.mark.parametrize("name", [n for n in drivers.names() if "rollouts" not in drivers.get(n).uses])
def test_whatever_is_asked_decodes_within_the_bounds(name):
    """With steps far wider than the options' ranges."""
    space = SearchSpace(
        SpaceConfig(
            manager={"name": "toy"},
            options={
                "sinks": {"kind": "integer", "low": 1, "high": 7, "scale": 0.5},
                "rate": {"kind": "bounded", "low": -0.25, "high": 0.5},
                "mode": {"kind": "categorical", "choices": ["soft", "hard", "none"]},
            },
        )
    )
    options = {"variables": space.variables()} if "variables" in drivers.get(name).takes else {}
    driver = build(name, space.dim, space.start + 5.0, 0, sigma=4.0, **options)
    seen = []
    for _ in range(6):
        population = driver.ask()
        for vector in [*population.vectors, driver.mean]:
            chosen = space.decode(vector).options
            seen.append((chosen.sinks, chosen.mode))
            assert isinstance(chosen.sinks, int)
            assert 1 <= chosen.sinks <= 7
            assert -0.25 <= chosen.rate <= 0.5
        tell(driver, population, sphere(population.vectors))
    assert len(set(seen)) > 6


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cmaes", {"sigma": 0}, "sigma"),
        ("cmaes", {"popsize": 1}, "popsize"),
        ("cmaes", {"restart": "ipop"}, "restarts"),
        ("random_search", {"diagonal": True}, "diagonal"),
        ("snes", {"center_learning_rate": 0.0}, "center_learning_rate"),
        ("pgpe", {"popsize": 7}, "give 8"),
        ("pgpe", {"optimizer": "adam", "max_speed": 0.1}, "clipup"),
        ("cem", {"parents": 1.0}, "parents"),
        ("cem", {"popsize": 2}, "at least 3"),
        ("catcma", {"popsize": 3}, "at least 4"),
        ("catcma", {"variables": [MIXED[1], MIXED[1]]}, "overlap"),
        ("lra_cma", {"lr_adapt": False}, "lr_adapt"),
    ],
)
def test_wrong_options_are_named(name, options, message):
    with pytest.raises(ConfigError, match=message):
        new(name, options)


@pytest.mark.parametrize("name", drivers.names())
def test_one_dimension_is_searched_or_refused_with_a_message(name):
    try:
        driver = build(name, 1, np.ones(1), 0)
    except ConfigError as error:
        assert "2 dimensions" in str(error)  # noqa: PT017
        return
    for _ in range(5):
        population = driver.ask()
        tell(driver, population, sphere(population.vectors))
    assert driver.mean.shape == (1,)


@pytest.mark.parametrize("name", drivers.names())
def test_every_driver_has_a_line_for_the_list(name):
    line = (drivers.get(name).__doc__ or "").strip().splitlines()[0]
    assert 20 <= len(line) <= 118
    assert line.endswith(".")


def test_unknown_driver_and_bad_start():
    with pytest.raises(UnknownNameError, match="'cmaes'"):
        build("cmae", 3, np.zeros(3), 0)
    with pytest.raises(ConfigError, match="start"):
        build("random_search", 3, np.zeros(4), 0)
    with pytest.raises(ConfigError, match="2 dimensions"):
        build("cmaes", 1, np.zeros(1), 0)
