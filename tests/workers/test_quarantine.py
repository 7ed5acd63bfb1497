"""Quarantine: whatever dies, a unit is what it is whole; beside a quarantined candidate the others are as if alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomem.errors import WorkerError
from evomem.evaluation.measurement import Evaluation
from evomem.tasks.base import Sample
from evomem.workers import LocalPool, Unit
from evomem.workers.quarantine import OpenUnits, PieceWithdrawnError, candidate_digest
from evomem.workers.ray.worker import alone
from evomem.workers.schedule import Policy, Schedule

DEATHS = 2


def unit(number, names):
    """Candidates are numbers; what is evaluated depends on the company, as in a real batch."""
    vectors = np.array([[float(name)] for name in names])
    sample = Sample(f"s{number}", "c", "q", " a", ("a",), 4)
    return Unit(f"u{number}", "train", 0, "t", sample, vectors, np.arange(len(names), dtype=np.int64))


def evaluate(unit):
    company = float(np.sum(unit.vectors))
    return [
        Evaluation(unit.sample.id, {"loglik": 10 * value + 1e-3 * company}, 1.0, 1.0, 1.0, 5, 0.0)
        for value in unit.vectors[:, 0].tolist()
    ]


def expected(unit, killers):
    """The plain way to what must come out: log-likelihoods by place."""
    names = unit.vectors[:, 0].tolist()
    if not set(names) & killers:
        return [one.loglik for one in evaluate(unit)]
    return [None if name in killers else evaluate(alone(unit, p))[p].loglik for p, name in enumerate(names)]


def carry_out(units, killers, chance, quarantined=()):
    """Two workers, one clock; `chance()` says whether somebody kills a worker just now. Returns outcomes and log."""
    schedule, opened = Schedule(Policy(deaths=DEATHS)), OpenUnits(quarantined)
    schedule.add(opened.add(units))
    for name in ("w0", "w1"):
        schedule.join(name)
    outcomes, log, now, born = {}, [], 0.0, 2
    while len(opened):
        now += 1
        running = []
        while leases := schedule.assign(now):
            for lease in leases:
                for piece in lease.pieces:
                    try:
                        running.append((lease, piece, *opened.order(piece)))
                    except PieceWithdrawnError as error:
                        schedule.failed(lease.id, piece, error, now, final=True)
        dead = set()
        for lease, piece, whole, place in running:
            if lease.worker in dead:
                continue
            sent = alone(whole, place)
            log.append((whole.key, place))
            if set(sent.vectors[:, 0].tolist()) & killers or chance():
                dead.add(lease.worker)
                schedule.leave(lease.worker, now, blame=True, reason="killed")
                schedule.join(f"w{born}")
                born += 1
                continue
            found = evaluate(sent)
            schedule.finished(lease.id, piece, found if place is None else [found[place]], now, 0.5)
            opened.add_seconds(piece.key, 0.5)
        for result in schedule.results():
            outcome, jobs = opened.close(result)
            schedule.add(jobs)
            if outcome is not None:
                assert outcome.unit.key not in outcomes
                outcomes[outcome.unit.key] = outcome
    return outcomes, log


crowds = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True), min_size=1, max_size=6)


@given(crowds=crowds, killers=st.sets(st.integers(0, 9), max_size=3), deaths=st.lists(st.booleans(), max_size=40))
def test_outcomes_depend_on_the_candidates_only(crowds, killers, deaths):
    """Deaths from outside move nothing, unless a candidate is unlucky so often that it looks guilty."""
    units = [unit(number, names) for number, names in enumerate(crowds)]
    killers = set(map(float, killers))
    rest = list(deaths)
    outcomes, _ = carry_out(units, killers, lambda: bool(rest) and rest.pop())
    suspected = {
        value
        for one in units
        for value, evaluation in zip(one.vectors[:, 0].tolist(), outcomes[one.key].evaluations, strict=True)
        if evaluation.loglik is None
    }
    assert killers & {float(name) for names in crowds for name in names} <= suspected
    if not any(deaths):
        assert suspected <= killers
    for one in units:
        outcome = outcomes[one.key]
        assert outcome.error is None
        found = [evaluation.loglik for evaluation in outcome.evaluations]
        guilty = {n for n, value in zip(one.vectors[:, 0].tolist(), found, strict=True) if value is None}
        if guilty or not set(one.vectors[:, 0].tolist()) & suspected:
            assert repr(found) == repr(expected(one, guilty))
        assert len(outcome.quarantined) == len(outcome.digests) == len(guilty)


def test_a_killer_is_tried_in_few_units_and_nobody_dies_when_it_is_known():
    units = [unit(number, [1, 2, 3]) for number in range(20)]
    outcomes, log = carry_out(units, {2.0}, lambda: False)
    deaths = [entry for entry in log if entry[1] in (None, 1)]
    assert len(deaths) <= 2 * 2 * DEATHS  # two workers had one each in hand
    assert {key for key, place in log if place is None} <= {"u0", "u1"}
    digests = {digest for outcome in outcomes.values() for digest in outcome.digests}
    assert digests == {candidate_digest(units[0], 1)}
    again, log = carry_out(units, {2.0}, lambda: False, digests)
    assert all(place in (0, 2) for _, place in log)
    for one in units:
        assert repr(again[one.key].evaluations) == repr(outcomes[one.key].evaluations)
    here = LocalPool(lambda unit: 1 / 0 if 2.0 in unit.vectors else evaluate(unit), quarantined=digests)
    assert repr([o.evaluations for o in here.evaluate(units)]) == repr([again[one.key].evaluations for one in units])


def test_a_batch_that_kills_though_no_candidate_does_gives_what_they_are_alone():
    """Too much memory together, for example: tried whole, apart, whole again, apart again; then that is it."""
    whole = unit(0, [1, 2, 3])
    schedule, opened = Schedule(Policy(deaths=DEATHS, copies=1)), OpenUnits()
    schedule.add(opened.add([whole]))
    wholes, outcome = 0, None
    for number in range(100):
        schedule.join(f"w{number}")
        for lease in schedule.assign(number):
            sent, place = opened.order(lease.pieces[0])
            if place is None:
                wholes += 1
                schedule.leave(lease.worker, number, blame=True, reason="memory")
            else:
                found = evaluate(alone(sent, place))[place]
                schedule.finished(lease.id, lease.pieces[0], [found], number)
        for result in schedule.results():
            outcome, jobs = opened.close(result)
            schedule.add(jobs)
        if outcome is not None:
            break
    assert wholes == 2 * DEATHS
    assert outcome.evaluations == [evaluate(alone(whole, place))[place] for place in range(3)]
    assert outcome.quarantined == ()


def test_without_the_full_cache_nothing_can_be_said():
    whole = Unit("reference/u", "reference", None, "t", unit(0, [1]).sample, None, np.zeros(1, dtype=np.int64))
    schedule, opened = Schedule(Policy(deaths=DEATHS, copies=1)), OpenUnits()
    schedule.add(opened.add([whole]))
    for number in range(2 * DEATHS):
        schedule.join(f"w{number}")
        (lease,) = schedule.assign(number)
        schedule.leave(lease.worker, number, blame=True, reason="killed")
    (result,) = schedule.results()
    outcome, jobs = opened.close(result)
    assert (outcome.evaluations, jobs) == ([], [])
    with pytest.raises(WorkerError, match=r"reference/u: the full cache.*ended its worker 2 times \(killed\)"):
        raise outcome.error
