"""EvolKV's search: groups one after the other, each frozen at its best; and its fitness against the paper's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomem.drivers import Stage, build
from evomem.errors import ConfigError
from evomem.evaluation.measurement import Evaluation
from evomem.evaluation.objectives import make
from evomem.evaluation.objectives.evolkv import cache_score
from tests.support.gaussian_policy import sphere, tell


@pytest.mark.parametrize(("dim", "group", "sizes"), [(30, 8, [8, 8, 8, 6]), (9, 8, [9]), (7, 3, [3, 4]), (4, 8, [4])])
@pytest.mark.parametrize("told", [False, True])
def test_groups_are_searched_bottom_up_and_frozen_at_their_best(dim, group, sizes, told):
    driver = build("evolkv", dim, np.ones(dim), 0, group=group, **({"generations": 3} if told else {}))
    driver.enter(Stage(0, 3 * len(sizes) + 1))
    here, begin = np.ones(dim), 0
    for size in sizes:
        best, best_value = None, -np.inf
        for _ in range(3):
            assert driver.stopped() is None
            asked = driver.ask()
            assert len(asked.vectors) == 4 + int(3 * math.log(min(group, dim)))
            moves = np.ptp(asked.vectors, axis=0) > 0
            assert np.flatnonzero(moves).tolist() == list(range(begin, begin + size))
            assert np.array_equal(asked.vectors[:, ~moves], np.tile(here[~moves], (len(asked.vectors), 1)))
            values = sphere(asked.vectors)
            if values.max() > best_value:
                best, best_value = asked.vectors[values.argmax()], values.max()
            tell(driver, asked, values)
        here[begin : begin + size] = best[begin : begin + size]
        assert np.array_equal(driver.mean, here)
        begin += size
    assert (driver.stopped() is not None) == told  # else the rest of the stage is the last group's


def test_a_search_that_is_too_short_is_refused():
    with pytest.raises(ConfigError, match="4 groups of layers"):
        build("evolkv", 30, np.ones(30), 0).enter(Stage(0, 3))


@given(mean=st.floats(0, 300), target=st.floats(1, 100))
def test_cache_score_is_the_papers(mean, target):
    slow = max(0, 1 - (mean - target) / target) if mean > target else 1 - 0.2 * (1 - mean / target)
    assert cache_score(mean, target) == pytest.approx(slow)


@pytest.mark.parametrize(("slots", "score"), [(64, 1.0), (32, 0.9), (96, 0.5), (200, 0.0)])
def test_fitness_is_score_times_one_plus_the_bonus(slots, score):
    found = Evaluation("s", {"exact": 0.5, "loglik": -2.0, "target_slots": 64.0}, slots)
    assert make("evolkv").value(found) == pytest.approx(0.5 * (1 + 0.3 * score))
    assert make("evolkv_loglik").value(found) == pytest.approx(math.exp(-2) * (1 + 0.3 * score))
    for missing in ({"target_slots": 64.0}, {"exact": 1.0, "loglik": 0.0}):
        assert math.isnan(make("evolkv").value(Evaluation("s", missing, slots)))
