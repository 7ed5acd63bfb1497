"""The simulated cluster: it agrees with arithmetic where there is no chance, and conserves work where there is."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from evomem.errors import EvomemError
from evomem.workers.schedule import Job, Policy, Schedule
from evomem.workers.simulation import Cluster, Generation, simulate

CALM = Cluster(0.0, 0.5, 0.25, 0.0, straggler_share=0, failures_per_hour=0, turnover_per_hour=0, message_seconds=0)


@given(
    workers=st.integers(1, 40),
    population=st.integers(1, 40),
    samples=st.integers(1, 6),
    parts=st.integers(1, 6),
    reading=st.sampled_from([0.0, 2.0]),
)
@settings(max_examples=60, deadline=None)
def test_without_chance_it_is_arithmetic(workers, population, samples, parts, reading):
    chunk = math.ceil(population / parts)
    population = chunk * parts  # units of equal length
    generation = Generation(population, samples, chunk)
    cluster = replace(CALM, reading_seconds=reading)
    report = simulate(workers, generation, generations=3, cluster=cluster)
    unit = 0.5 + 0.25 * chunk
    rounds = math.ceil(samples * parts / workers)
    if not reading:
        assert report.seconds == pytest.approx(rounds * unit + cluster.step_seconds)
        assert report.utilisation == pytest.approx(samples * parts * unit / (workers * report.seconds))
    # Whoever begins while a context is not there reads it; after that nobody does.
    assert report.seconds >= rounds * unit + reading + cluster.step_seconds - 1e-9
    assert report.seconds <= rounds * (unit + reading) + cluster.step_seconds + 1e-9
    once = samples * (reading + 0.5 + 0.25 * population)
    assert report.efficiency == pytest.approx(once / (workers * report.seconds))
    assert report.wasted == pytest.approx(0, abs=1e-9)


def test_a_context_is_read_by_those_who_begin_before_it_is_there_and_by_nobody_after():
    # Six workers begin with five units of one sample and one of the other; nobody reads for the six that are left.
    cluster = replace(CALM, reading_seconds=2.0)
    report = simulate(6, Generation(6, 2, 1), generations=3, cluster=cluster)
    assert report.seconds == pytest.approx(2.0 + 2 * 0.75 + cluster.step_seconds)


WILD = st.builds(
    Cluster,
    reading_seconds=st.sampled_from([0.0, 3.0]),
    unit_seconds=st.sampled_from([0.001, 0.4]),
    candidate_seconds=st.sampled_from([0.001, 0.3]),
    spread=st.sampled_from([0.0, 0.3, 1.5]),
    straggler_share=st.sampled_from([0.0, 0.05, 0.5]),
    slow_share=st.sampled_from([0.0, 0.3]),
    failures_per_hour=st.sampled_from([0.0, 1.0, 60.0]),
    turnover_per_hour=st.sampled_from([0.0, 60.0]),
    message_seconds=st.sampled_from([0.0, 0.0005, 0.1]),
)


@given(
    workers=st.integers(1, 30),
    generation=st.builds(Generation, st.integers(1, 40), st.integers(1, 5), st.integers(1, 9)),
    cluster=WILD,
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_whatever_happens_every_unit_has_one_result_and_no_second_is_counted_twice(workers, generation, cluster, seed):
    report = simulate(workers, generation, generations=2, cluster=cluster, seed=seed)
    assert report.results == 2 * generation.units
    assert report.utilisation >= 0
    assert report.wasted >= -1e-9
    assert report.utilisation + report.wasted <= 1 + 1e-9
    assert report.seconds >= generation.units * cluster.message_seconds  # the driver does one thing at a time
    assert report == simulate(workers, generation, generations=2, cluster=cluster, seed=seed)


def test_a_generation_is_over_sooner_when_stragglers_are_duplicated():
    generation = Generation(64, 16, 1)
    without, two, four = (simulate(64, generation, policy=Policy(copies=copies)) for copies in (1, 2, 4))
    assert without.stats.duplicates == 0
    assert four.seconds < two.seconds < 0.8 * without.seconds


def test_one_worker_in_twenty_that_is_always_slow_costs_little():
    """Work is given out as it is asked for, so a slow machine gets less of it."""
    calm = replace(CALM, spread=0.3)
    same = simulate(50, Generation(64, 16, 1), cluster=calm)
    slow = simulate(50, Generation(64, 16, 1), cluster=replace(calm, slow_share=0.05))
    assert slow.seconds < 1.2 * same.seconds


def test_ten_thousand_workers_are_served_in_seconds():
    schedule = Schedule()
    schedule.add(Job(str(n), 8, f"context {n // 100}") for n in range(20_000))
    begin = time.process_time()
    for n in range(10_000):
        schedule.join(str(n))
    now, running = 0.0, schedule.assign(0.0)
    while running:
        now += 1.0
        for lease in running:
            schedule.finished(lease.id, lease.pieces[0], None, now)
        schedule.results()
        running = schedule.assign(now)
    assert schedule.done
    assert time.process_time() - begin < 20  # 0.5 s on an idle core; a search through everything would take an hour


def test_nothing_to_simulate_is_an_error():
    with pytest.raises(EvomemError, match="at least 1"):
        simulate(0, Generation())
