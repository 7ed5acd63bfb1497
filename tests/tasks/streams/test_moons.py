"""Three moons come back when they should, and no split shows another's triple."""

from __future__ import annotations

from math import lcm

import numpy as np
import pytest

from evomem.errors import TaskError
from evomem.tasks import Split
from evomem.tasks.streams.moons import PERIODS, common_multiple, orbits, triples


def test_triples_are_the_nine_that_meet_again_the_soonest():
    chosen = [triple for split in Split for triple in triples(split)]
    assert [len(triples(split)) for split in Split] == [7, 1, 1]
    assert len(set(chosen)) == 9
    every = [(a, b, c) for a in PERIODS for b in PERIODS for c in PERIODS if a < b < c]
    multiples = sorted(lcm(*(int(2 * period) for period in triple)) / 2 for triple in every)
    assert sorted(common_multiple(triple) for triple in chosen) == multiples[:9]
    assert common_multiple(triples(Split.SEALED)[0]) == multiples[8]


@pytest.mark.parametrize("planet", [False, True])
def test_moons_come_back_together_after_their_common_multiple_and_not_before(planet):
    for split in Split:
        for moons in orbits(split, whole=True, planet=planet):
            together = round(moons.together)
            assert together == moons.together
            series = moons.series(800)
            np.testing.assert_allclose(series[together:], series[:-together], atol=1e-5)
            assert all(abs(series[step] - series[0]).max() > 1e-3 for step in range(1, together))
            assert 3 * together <= 800
            assert moons.longest == max(moons.periods) * moons.rate < together + 1
            np.testing.assert_array_equal(moons.series(50, start=30), series[30:80])


def test_each_moon_moves_evenly_on_the_unit_circle_from_its_phase():
    for moons in orbits(Split.TRAIN, length=600, repeats=2):
        series = moons.series(200)
        np.testing.assert_allclose(abs(series), 1, atol=1e-5)
        np.testing.assert_allclose(np.angle(series[0]), 0.3, atol=1e-6)
        turned = np.angle(series[1:] / series[:-1])
        np.testing.assert_allclose(
            turned, 2 * np.pi / (np.array(moons.periods) * moons.rate) * np.ones((199, 1)), rtol=1e-3
        )


def test_from_a_planet_the_others_are_seen_less_where_the_planet_stands():
    for sun, planet in zip(orbits(Split.TRAIN), orbits(Split.TRAIN, planet=True), strict=True):
        seen, true = planet.series(50), sun.series(50)
        np.testing.assert_allclose(seen[:, :-1] + seen[:, -1:], true[:, :-1], atol=1e-5)
        np.testing.assert_array_equal(seen[:, -1], true[:, -1])


def test_too_few_observations_are_refused():
    with pytest.raises(TaskError, match="observations for the shortest period"):
        orbits(Split.TRAIN, length=20)
