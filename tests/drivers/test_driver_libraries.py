"""Drivers of other libraries: kinds of variables, warm starts, what is refused, what is missing."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tests.support.synthetic_search as synthetic
from evomem.drivers import WarmStart, build, drivers
from evomem.drivers.base import Fitness
from evomem.errors import ConfigError, RunError
from evomem.evaluation.measurement import LOGLIK
from evomem.runs.driver_setup import make_driver
from evomem.runs.run import open_run
from evomem.runs.warm_start import best_vectors, replay
from evomem.search_space.option_ranges import Bounded, Categorical, Integer, Log, Variable
from evomem.search_space.space import SearchSpace, SpaceConfig

NUMBERS = [
    Bounded(kind="bounded", low=-2, high=5, scale=0.7),
    Log(kind="log", low=0.01, high=100, scale=2.5),
    Integer(kind="integer", low=-3, high=9, scale=1.3),
    Integer(kind="integer", low=0, high=1),
]


def variable(kind, place=0):
    return Variable(place, kind.width, kind.bounds, kind.codes())


# ---- kinds of variables ----------------------------------------------------------------------------------------------


@given(st.sampled_from(NUMBERS[:2]), st.floats(-50, 50))
def test_a_coordinate_has_its_equal_within_the_bounds(kind, x):
    one = variable(kind)
    inside = one.inside(x)
    assert 0 <= inside <= one.bounds[1] * (1 + 1e-12)
    assert kind.decode(np.array([inside])) == pytest.approx(kind.decode(np.array([x])), rel=1e-9, abs=1e-9)


@given(st.sampled_from(NUMBERS), st.lists(st.floats(0, 1), min_size=2, max_size=10))
def test_within_the_bounds_every_value_is_met_once_and_in_order(kind, shares):
    high = kind.bounds[1]
    values = [kind.decode(np.array([share * high])) for share in sorted(shares)]
    assert values == sorted(values)
    assert kind.decode(np.array([0.0])) == kind.low
    assert kind.decode(np.array([high])) == pytest.approx(kind.high)


@pytest.mark.parametrize("kind", [*NUMBERS[2:], Categorical(kind="categorical", choices=["x", None, 3], scale=2.0)])
def test_codes_are_those_of_every_value(kind):
    one, values = variable(kind), []
    for row, code in enumerate(one.codes):
        values.append(kind.decode(code))
        assert one.nearest(code) == row
        assert np.array_equal(kind.encode(values[-1]), code)
    assert values == (kind.choices if kind.kind == "categorical" else list(range(int(kind.low), int(kind.high) + 1)))


# ---- CatCMA with margin ----------------------------------------------------------------------------------------------


MODES = ["soft", "hard", "none", "other"]
MIXED = {
    "manager": {"name": "toy"},
    "weights": [{"match": "first"}],
    "options": {
        "mode": {"kind": "categorical", "choices": MODES},
        "sinks": {"kind": "integer", "low": 0, "high": 20},
        "rate": {"kind": "bounded", "low": 0.0, "high": 1.0},
    },
}


def mixed():
    space = SearchSpace(SpaceConfig(**MIXED))
    return space, build(
        "catcma", space.dim, space.encode(space.template), 1, variables=space.variables(), popsize=14, sigma=0.2
    )


def test_a_space_names_its_variables():
    space, _ = mixed()
    mode, sinks, rate = space.variables()
    assert [(one.offset, one.width) for one in (mode, sinks, rate)] == [(4, 4), (8, 1), (9, 1)]
    assert rate.codes is None
    assert space.dim == 10


def test_catcma_asks_in_codes_and_finds_the_category_the_integer_and_the_numbers():
    """The optimum is the one category of four that the search does not start in, 13 sinks, rate 0.8, weights 0.5."""
    space, driver = mixed()
    mode, sinks, rate = space.variables()

    def goal(manager):
        weights = manager.first.detach().double().numpy().ravel()
        chosen = manager.options
        near = ((weights - 0.5) ** 2).sum() + (chosen.rate - 0.8) ** 2 + ((chosen.sinks - 13) / 10) ** 2
        return -near - (chosen.mode != "none")

    assert space.decode(driver.mean).options == space.decode(space.encode(space.template)).options
    seen = []
    for _ in range(110):
        population = driver.ask()
        managers = [space.decode(vector) for vector in population.vectors]
        for vector, manager in zip(population.vectors, managers, strict=True):
            assert vector[sinks.offset] == sinks.codes[manager.options.sinks, 0]
            assert np.array_equal(vector[mode.coordinates], mode.codes[MODES.index(manager.options.mode)])
            assert rate.bounds[0] <= vector[rate.offset] <= rate.bounds[1]
        seen.append({manager.options.mode for manager in managers})
        driver.tell(population, Fitness(np.array([goal(manager) for manager in managers])))
    found = space.decode(driver.mean)
    assert set().union(*seen[:10]) == set(MODES)
    assert (found.options.mode, found.options.sinks) == ("none", 13)
    assert found.options.rate == pytest.approx(0.8, abs=0.02)
    assert goal(found) > -1e-3


def test_a_run_with_catcma_is_told_the_variables(tmp_path):
    driver = {"name": "catcma", "population": 6}
    config = synthetic.experiment("generations=2", space={**MIXED, "weights": "all"}, driver=driver)
    synthetic.search(config, tmp_path / "run", synthetic.factory(synthetic.ToyEvaluator()))
    run = open_run(tmp_path / "run")
    mode = run.space.variables()[0]
    for population, _ in replay(run):
        assert {tuple(row) for row in population.vectors[:, mode.coordinates]} <= {tuple(code) for code in mode.codes}


def test_catcma_begins_at_the_manager_that_the_start_stands_for():
    """Also where a start lies, as other drivers' winners do, outside the bounds."""
    space = SearchSpace(SpaceConfig(**MIXED))
    for shift in (-3.3, 0.4, 1.7, 6.1):
        start = space.encode(space.template) + shift
        driver = build("catcma", space.dim, start, 1, variables=space.variables(), sigma=1e-6)
        first, wanted = space.decode(driver.mean).options, space.decode(start).options
        assert first.mode == wanted.mode
        assert abs(first.sinks - wanted.sinks) <= 1  # a coordinate between two codes belongs to the nearer
        assert first.rate == pytest.approx(wanted.rate)


def test_categories_alone_are_searched():
    kind = Categorical(kind="categorical", choices=[0, 1, 2])
    variables = [variable(kind, 3 * place) for place in range(4)]
    driver = build("catcma", 12, np.tile([1.0, 0, 0], 4), 0, variables=variables, popsize=12)
    assert math.isnan(driver.sigma)
    for _ in range(60):
        population = driver.ask()
        driver.tell(population, Fitness(population.vectors[:, 2::3].sum(axis=1)))
    assert driver.mean.tolist() == [0.0, 0, 1] * 4
    assert driver.stopped() is None


# ---- the region where an earlier search was good ---------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 12), st.integers(10, 60), st.floats(0.01, 1.0), st.integers(0, 99))
def test_the_region_is_that_of_the_cmaes_package(dim, count, alpha, seed):
    from cmaes import get_warm_start_mgd

    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(count, dim)) @ rng.normal(size=(dim, dim)) + rng.normal(size=dim)
    fitness = rng.normal(size=count)
    mean, sigma, covariance = get_warm_start_mgd(list(zip(vectors, -fitness, strict=True)), gamma=0.5, alpha=alpha)
    warm = WarmStart(vectors[np.argsort(-fitness)[: count // 2]], alpha)
    assert warm.mean == pytest.approx(mean)
    assert warm.full()[0] == pytest.approx(sigma, rel=1e-6)
    assert warm.full()[1] == pytest.approx(covariance, rel=1e-5, abs=1e-6)
    own, scales = warm.diagonal()
    assert (own * scales) ** 2 == pytest.approx(np.diag(covariance) * sigma**2, rel=1e-6)
    assert np.log(scales).sum() == pytest.approx(0, abs=1e-9)


def test_the_region_has_a_size_in_many_dimensions():
    """The determinant of the covariance is 10^-800 here."""
    warm = WarmStart(np.zeros((3, 400)), 0.01)
    assert warm.full()[0] == pytest.approx(0.01)
    assert np.diag(warm.full()[1]) == pytest.approx(np.ones(400))


@pytest.mark.parametrize(("name", "options"), [("cmaes", {}), ("cmaes", {"diagonal": True}), ("lra_cma", {})])
def test_a_warm_driver_draws_from_the_region(name, options):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(200, 3)) * [0.01, 0.5, 3.0] + [5.0, -5.0, 1.0]
    driver = build(name, 3, np.zeros(3), 0, warm=WarmStart(vectors, 0.1), popsize=2000, **options)
    drawn = driver.ask().vectors
    assert (np.abs(drawn.mean(axis=0) - vectors.mean(axis=0)) < [0.02, 0.08, 0.4]).all()
    expected = np.sqrt(vectors.var(axis=0) + 0.01)
    assert drawn.std(axis=0) == pytest.approx(expected, rel=0.1)
    with pytest.raises(ConfigError, match="3 dimensions, those of this search 4"):
        build(name, 4, np.zeros(4), 0, warm=WarmStart(vectors, 0.1), **options)


class Remembering(synthetic.ToyEvaluator):
    """Keeps the weights of what it evaluates, by sample."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def evaluate(self, candidates, sample, task, measurement=LOGLIK):
        for manager in candidates:
            if manager.name == "toy":
                weights = np.concatenate([p.detach().numpy().ravel() for p in manager.parameters()])
                self.seen.setdefault(weights.tobytes(), []).append(sample.id)
        return super().evaluate(candidates, sample, task, measurement)


def test_a_run_is_replayed_and_followed(tmp_path):
    evaluator, first = Remembering(), tmp_path / "first"
    config = synthetic.experiment("generations=6", "driver.name=snes", "select.top=0", "select.snapshots=0")
    synthetic.search(config, first, synthetic.factory(evaluator))
    run = open_run(first)
    told = list(replay(run))
    # What is replayed is what was evaluated, float32 as the manager holds it; the rest is start, mean and full cache.
    vectors = np.concatenate([population.vectors for population, _ in told])
    assert {vector.astype(np.float32).tobytes() for vector in vectors} <= set(evaluator.seen)
    assert [fitness.tolist() for _, fitness in told] == [list(record.fitness) for record in run.generations()]
    fitness = np.concatenate([fitness for _, fitness in told])
    best = best_vectors(run, 0.25)
    assert np.array_equal(best, vectors[np.argsort(-fitness, kind="stable")[: len(vectors) // 4]])

    second = tmp_path / "second"
    warm = {"warm_start": {"run": str(first), "gamma": 0.25, "alpha": 0.02}}
    config = synthetic.experiment("generations=2", driver={"name": "cmaes", "population": 6, "options": warm})
    synthetic.search(config, second, synthetic.factory(synthetic.ToyEvaluator()))
    drawn = next(replay(open_run(second)))[0].vectors  # needs no other run, only its own folder
    assert np.linalg.norm(drawn.mean(axis=0) - best.mean(axis=0)) < 0.5
    assert np.array_equal(np.load(second / "start" / "warm.npy"), best)
    first.rename(tmp_path / "gone")
    space = open_run(second).space
    again = make_driver(config, space, space.start, second)
    assert np.array_equal(again.ask().vectors, drawn)


def test_what_cannot_be_followed_is_said(tmp_path):
    first = tmp_path / "first"
    config = synthetic.experiment("generations=2")
    synthetic.search(config, first, synthetic.factory(synthetic.ToyEvaluator()))

    def follow(name="cmaes", **changes):
        options = {"warm_start": str(first)}
        config = synthetic.experiment(driver={"name": name, "population": 6, "options": options}, **changes)
        space = SearchSpace(config.space)
        return make_driver(config, space, space.start, tmp_path / "other")

    (tmp_path / "other" / "start").mkdir(parents=True)
    with pytest.raises(ConfigError, match="no option warm_start; it is one of cmaes, lra_cma"):
        follow("snes")
    with pytest.raises(ConfigError, match="searched 6 dimensions, this search has 4"):
        follow(space={"manager": {"name": "toy"}, "weights": [{"match": "first"}]})
    journal = first / "journal.jsonl"
    text = journal.read_text()
    sealed = [json.loads(line) for line in text.splitlines()]
    lines = [{key: value for key, value in line.items() if key not in ("line", "check")} for line in sealed]
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines if line["kind"] != "generation"))
    with pytest.raises(RunError, match="not finished a generation"):
        follow()
    changed = [{**line, "candidates": "0" * 16} if line["kind"] == "unit" else line for line in lines]
    journal.write_text("".join(json.dumps(line) + "\n" for line in changed))
    with pytest.raises(RunError, match="generation 0 cannot be reproduced"):
        follow()
    journal.write_text(text)
    assert follow().ask().vectors.shape == (6, 6)


# ---- what is refused, what ends a search, what is missing ------------------------------------------------------------


def test_a_covariance_that_does_not_fit_into_memory_is_refused_before_it_is_made():
    with pytest.raises(ConfigError, match="diagonal: true"):
        build("evotorch_cmaes", 5000, np.zeros(5000), 0, diagonal=False, popsize=32)


@pytest.mark.parametrize("name", ["evotorch_cmaes", "snes", "cem", "lra_cma", "catcma"])
def test_a_search_that_has_converged_says_so(name):
    driver = build(name, 2, np.ones(2), 0, popsize=8)
    for _ in range(3000):
        population = driver.ask()
        driver.tell(population, Fitness(-np.abs(population.vectors).sum(axis=1)))
        if driver.stopped() is not None:
            break
    assert "converged" in driver.stopped()
    assert np.isfinite(driver.mean).all()


@pytest.mark.parametrize("name", ["evotorch_cmaes", "xnes", "catcma"])
def test_a_search_whose_distribution_degenerates_stops_with_a_finite_mean(name):
    """Up along one axis for ever, ever more narrow across: some end with a covariance that cannot be computed with."""
    driver = build(name, 4, np.ones(4), 0, popsize=10)
    for _ in range(700):
        vectors = driver.ask().vectors
        driver.tell(driver.ask(), Fitness(vectors[:, 0] - 1e6 * np.abs(vectors[:, 1:]).sum(axis=1) ** 0.5))
        assert np.isfinite(driver.mean).all()
        if driver.stopped() is not None:
            break
    assert driver.stopped() is not None
    resumed = build(name, 4, np.ones(4), 0, popsize=10)
    resumed.load_state_dict(driver.state_dict())
    assert resumed.stopped() == driver.stopped()
    assert np.array_equal(resumed.mean, driver.mean)


def test_a_covariance_that_cannot_be_decomposed_ends_the_search(monkeypatch):
    """What EvoTorch's CMA-ES does now and then in single precision; in double it could not be provoked."""
    driver = build("evotorch_cmaes", 3, np.ones(3), 0)
    steps = sys.modules["evomem.drivers.evotorch_steps"]
    singular = torch.zeros(3, 3, dtype=torch.float64)
    monkeypatch.setattr(steps.CMAESSteps, "decompose_C", lambda self: torch.linalg.cholesky(singular))
    for _ in range(10):
        population = driver.ask()
        driver.tell(population, Fitness(population.vectors.sum(axis=1)))
    assert driver.stopped() == "the covariance is no longer positive definite"
    assert np.isfinite(driver.mean).all()


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [(name, "evotorch", "search") for name in ("evotorch_cmaes", "snes", "xnes", "pgpe", "cem")]
    + [("lra_cma", "cmaes", "cmaes"), ("catcma", "cmaes", "cmaes"), ("cmaes", "cma", "search")],
)
def test_a_missing_package_is_named_with_its_extra(name, package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "evomem.drivers.evotorch_steps", raising=False)
    with pytest.raises(
        ConfigError, match=rf"{package}, which is not installed: pip install 'evomem-toolkit\[{extra}\]'"
    ):
        build(name, 3, np.zeros(3), 0)
    assert name in drivers.names()
