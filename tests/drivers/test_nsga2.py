"""Drivers: NSGA-II against a slow, independent sorting, and on fronts that are known."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomem.drivers import build
from evomem.drivers.base import Fitness
from evomem.errors import ConfigError, FitnessError

DIM = 6


def new(seed=0, dim=DIM, start=0.5, **options):
    return build("nsga2", dim, np.full(dim, start), seed, **{"popsize": 12, **options})


def told(scores, costs):
    return Fitness(scores, costs=costs)


def two(vectors):
    """Score and cost whose front is known: the first coordinate is the size, the others want to be 0.5."""
    size = np.clip(vectors[:, 0], 0, 1) * 99 + 1
    return np.sqrt(size) - ((vectors[:, 1:] - 0.5) ** 2).sum(axis=1) * 3, size


def dominates(a, b):
    return a[0] >= b[0] and a[1] <= b[1] and (a[0] > b[0] or a[1] < b[1])


def slow_fronts(points):
    left, fronts = list(range(len(points))), []
    while left:
        front = [i for i in left if not any(dominates(points[j], points[i]) for j in left)]
        fronts.append(front)
        left = [i for i in left if i not in front]
    return fronts


def slow_crowding(points):
    """The definition: per objective, neighbours' distance over the range; the ends are infinitely far."""
    distance = dict.fromkeys(range(len(points)), 0.0)
    for objective in (0, 1):
        order = sorted(range(len(points)), key=lambda i: points[i][objective])
        span = points[order[-1]][objective] - points[order[0]][objective]
        distance[order[0]] = distance[order[-1]] = np.inf
        for before, i, after in zip(order, order[1:], order[2:], strict=False):
            distance[i] += (points[after][objective] - points[before][objective]) / span
    return distance


def hypervolume(scores, costs, worst, largest):
    """Area between the front and the corner (worst score, largest cost), by strips of cost."""
    area, best = 0.0, worst
    points = sorted(zip(costs, scores, strict=True))
    for (cost, score), following in zip(points, [*[p[0] for p in points[1:]], largest], strict=True):
        best = max(best, score)
        area += (best - worst) * max(0.0, min(following, largest) - min(cost, largest))
    return area


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 16), st.integers(0, 12))
def test_survivors_are_the_best_fronts_and_of_the_last_those_that_stand_most_alone(seed, popsize, coarse):
    driver = new(seed, popsize=popsize)
    asked = driver.ask()
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((popsize, 2)) if coarse > 6 else rng.integers(0, 3 + coarse, (popsize, 2)) * 1.0
    driver.tell(asked, told(points[:, 0], points[:, 1]))
    survivors = driver.ask().vectors[: popsize // 2]
    places = [int(np.flatnonzero((asked.vectors == vector).all(axis=1))[0]) for vector in survivors]
    assert len(set(places)) == popsize // 2
    left = popsize // 2
    for front in slow_fronts(points.tolist()):
        kept = [place for place in front if place in places]
        assert len(kept) == min(left, len(front))
        if 0 < left < len(front) and coarse > 6:  # which of equals stays is not said
            crowding = slow_crowding([points[i].tolist() for i in front])
            of = {place: crowding[n] for n, place in enumerate(front)}
            assert min(of[place] for place in kept) >= max(of[place] for place in front if place not in kept)
        left -= len(kept)


def test_the_ends_of_a_front_survive():
    """What EvoTorch's own survival does not see to: it takes the order of crowding distances for their ranks."""
    driver = new(popsize=12)
    asked = driver.ask()
    values = np.array([0, 9, 1, 1.1, 1.2, 4, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8])
    driver.tell(asked, told(values, values))
    survivors = {vector.tobytes() for vector in driver.ask().vectors[:6]}
    assert all(asked.vectors[place].tobytes() in survivors for place in (0, 1, 5))


@pytest.mark.parametrize("remeasure", [True, False])
def test_finds_a_known_front(remeasure):
    found = []
    for seed in range(3):
        driver = new(seed, popsize=48, remeasure=remeasure, sigma=0.2)
        for _ in range(40):
            population = driver.ask()
            driver.tell(population, told(*two(population.vectors)))
        scores, costs = two(driver.state_dict()["survivors"])
        sizes = np.linspace(1, 100, 2000)
        found.append(hypervolume(scores, costs, 0.0, 100.0) / hypervolume(np.sqrt(sizes), sizes, 0.0, 100.0))
        assert scores[np.argmin(costs)] < two(driver.mean[None])[0] == scores.max()
    assert min(found) > 0.9


def test_survivors_are_measured_again_beside_their_children():
    driver = new(popsize=11)
    first = driver.ask()
    assert np.array_equal(first.vectors[0], np.full(DIM, 0.5))  # the start
    driver.tell(first, told(*two(first.vectors)))
    second = driver.ask()
    known = {vector.tobytes() for vector in first.vectors}
    assert [vector.tobytes() in known for vector in second.vectors] == [True] * 5 + [False] * 6
    # Who was lucky once must be so again: now all survivors are bad.
    scores, costs = two(second.vectors)
    scores[:5] -= 100
    costs[:5] += 100
    driver.tell(second, told(scores, costs))
    assert not {v.tobytes() for v in driver.ask().vectors[:5]} & known


def test_without_measuring_again_everything_asked_is_new_and_what_was_measured_counts():
    driver = new(popsize=8, remeasure=False)
    seen, best = set(), -np.inf
    for _ in range(12):
        population = driver.ask()
        assert not {v.tobytes() for v in population.vectors} & seen
        seen |= {v.tobytes() for v in population.vectors}
        scores, costs = two(population.vectors)
        best = max(best, scores.max())
        driver.tell(population, told(scores, costs))
        assert two(driver.mean[None])[0] == best


@pytest.mark.parametrize("remeasure", [True, False])
def test_resumes_bit_exactly_with_two_objectives(remeasure):
    whole, saved, trace = new(3, remeasure=remeasure), [], []
    for generation in range(12):
        saved.append((generation, pickle.dumps(whole.state_dict())))
        population = whole.ask()
        saved.append((generation, pickle.dumps(whole.state_dict())))
        scores, costs = two(population.vectors)
        scores[generation % 3 :: 5], costs[1::7] = np.nan, np.inf
        trace.append((population, scores, costs))
        whole.tell(population, told(scores, costs))
    for generation, state in saved:
        resumed = new(99, remeasure=remeasure)
        resumed.seed = 3  # of the sampling seeds; a run builds the driver with its own
        resumed.load_state_dict(pickle.loads(state))
        for population, scores, costs in trace[generation:]:
            again = resumed.ask()
            assert np.array_equal(again.vectors, population.vectors)
            assert np.array_equal(again.seeds, population.seeds)
            resumed.tell(again, told(scores, costs))
        assert np.array_equal(resumed.ask().vectors, whole.ask().vectors)
        assert np.array_equal(resumed.mean, whole.mean)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["score", "cost"])
def test_a_failed_candidate_is_worse_than_all_others(bad, where):
    driver = new()
    population = driver.ask()
    # All others are equal: a failed one that counted as one of them would share their front.
    scores, costs = np.ones(12), np.ones(12)
    (scores if where == "score" else costs)[[2, 5, 7, 8, 9, 11]] = bad
    driver.tell(population, told(scores, costs))
    survivors = {vector.tobytes() for vector in driver.ask().vectors[:6]}
    assert survivors == {population.vectors[place].tobytes() for place in (0, 1, 3, 4, 6, 10)}


def test_children_are_no_copies_whatever_the_options():
    for options in ({"mutation": 0.01}, {"mutation": 0.01, "crossover": 1e6, "tournament": 8}):
        driver = new(popsize=16, **options)
        for _ in range(15):
            population = driver.ask()
            assert len(np.unique(population.vectors, axis=0)) == 16
            driver.tell(population, told(*two(population.vectors)))
    tiny = new(popsize=8, sigma=1e-30, start=1.0)  # every step is lost in rounding: it must still come to an end
    for _ in range(3):
        population = tiny.ask()
        tiny.tell(population, told(*two(population.vectors)))


def test_leaves_torch_alone():
    torch.manual_seed(5)
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    driver = new()
    for _ in range(3):
        population = driver.ask()
        driver.tell(population, told(*two(population.vectors)))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.get_num_threads() == threads


def test_refusals():
    with pytest.raises(ConfigError, match="popsize"):
        new(popsize=3)
    driver = new()
    population = driver.ask()
    scores, costs = two(population.vectors)
    with pytest.raises(ConfigError, match="12 costs are expected"):
        driver.tell(population, told(scores, costs[:-1]))
    with pytest.raises(FitnessError, match="both a fitness and a size"):
        driver.tell(
            population, told(np.where(np.arange(12) < 6, np.nan, 1.0), np.where(np.arange(12) < 6, 1.0, np.nan))
        )
    driver.tell(population, told(scores, costs))
