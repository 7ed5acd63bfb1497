"""The scheduling core under any order of events: nothing lost, nothing twice, against plain bookkeeping."""

from __future__ import annotations

import random

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from evomem.workers.schedule import Job, Piece, Policy, Quarantined, Schedule

AFFINITIES = ["", "a", "b", "c"]
NUMBER = st.integers(0, 1000)
POLICIES = {
    "attempts": st.integers(1, 3),
    "deaths": st.integers(1, 2),
    "straggler": st.sampled_from([0.0, 2.0]),
    "copies": st.integers(1, 3),
    "batch": st.sampled_from([0.1, 50.0]),
}


def pick(of, number):
    return of[number % len(of)]


class Ledger(RuleBasedStateMachine):
    """Random events against bookkeeping of the test's own: plain sets of what was given out and what came of it.

    A job's whole value is ``(serial, "whole")``, a candidate's ``(serial, place)``; serial numbers tell jobs apart that
    use the same key one after the other.
    """

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.names = self.serials = 0
        self.alive = {}  # worker -> its lease or None
        self.left = {}  # id of a lease that runs -> pieces whose message has not come
        self.given = {}  # lease id -> the lease
        self.serial = {}  # key -> serial of the job that is open under it
        self.jobs = {}  # serial -> job
        self.of_lease = {}  # (lease id, key) -> serial
        self.deaths, self.tries = {}, {}  # (serial, place) -> deaths alone, failures that count
        self.results = {}  # serial -> result
        self.must_fail = set()
        self.taken_apart = set()

    # straggler 0: a second copy whenever somebody idles; batch_seconds 50: everything is short
    @initialize(**POLICIES)
    def start(self, attempts, deaths, straggler, copies, batch):
        self.policy = Policy(
            attempts, deaths, straggler, copies, hang=4, hang_floor=20, hang_first=50, batch_seconds=batch
        )
        self.schedule = Schedule(self.policy)

    # ---- the bookkeeping ----

    def open_pieces(self):
        """What must wait or run: the pieces of jobs without a result."""
        for key, serial in self.serial.items():
            if serial not in self.taken_apart:
                yield Piece(key)
            else:
                for place in range(self.jobs[serial].candidates):
                    if (serial, place) not in self.decided:
                        yield Piece(key, place)

    @property
    def decided(self):
        return self._decided

    _decided: dict

    def collect(self):
        for result in self.schedule.results():
            serial = self.serial.pop(result.key)  # KeyError: a second result, or one that nobody asked for
            self.check(serial, result)
            self.results[serial] = result

    def check(self, serial, result):
        job = self.jobs[serial]
        assert (result.error is not None) == (serial in self.must_fail)
        if result.error is not None:
            assert result.value is None
        elif not result.isolated:
            assert result.value == (serial, "whole")
        else:
            assert serial in self.taken_apart
            assert len(result.value) == job.candidates
            for place, value in enumerate(result.value):
                if isinstance(value, Quarantined):
                    assert (value.candidate, value.deaths) == (place, self.policy.deaths)
                    assert self.deaths[serial, place] == self.policy.deaths
                    assert value.reason == f"reason {place}"
                else:
                    assert value == (serial, place)

    def assign(self):
        for lease in self.schedule.assign(self.now):
            assert lease.id not in self.given
            assert self.alive[lease.worker] is None
            assert lease.pieces
            self.alive[lease.worker] = lease
            self.given[lease.id] = lease
            self.left[lease.id] = list(lease.pieces)
            for piece in lease.pieces:
                serial = self.of_lease[lease.id, piece.key] = self.serial[piece.key]
                assert piece in set(self.open_pieces())
                assert self.running(piece) <= self.policy.copies
                assert lease.duplicate == (self.running(piece) > 1)
                assert (piece.candidate is not None) == (serial in self.taken_apart)
                if piece.candidate is not None or self.suspect(serial):
                    assert len(lease.pieces) == 1

    def suspect(self, serial):
        return self.deaths.get((serial, None), 0) > 0

    def running(self, piece):
        """How many leases of the piece, of the job that is now open under its key, run."""
        serial = self.serial.get(piece.key)
        return sum(piece in pieces and self.of_lease[lease, piece.key] == serial for lease, pieces in self.left.items())

    def is_open(self, lease, piece):
        serial = self.of_lease[lease, piece.key]
        return self.serial.get(piece.key) == serial and (
            piece.candidate is None or (serial, piece.candidate) not in self._decided
        )

    def message(self, lease, piece):
        """A piece's message has come; return whether it was awaited."""
        if piece not in self.left.get(lease, ()):
            return False
        self.left[lease].remove(piece)
        if not self.left[lease]:
            del self.left[lease]
            self.alive[self.given[lease].worker] = None
        return True

    def leases(self):
        return [lease for lease in self.alive.values() if lease is not None]

    def finish(self, lease, piece):
        serial = self.of_lease[lease, piece.key]
        self.message(lease, piece)
        if self.is_open(lease, piece) and piece.candidate is not None:
            self._decided.add((serial, piece.candidate))
        value = (serial, "whole" if piece.candidate is None else piece.candidate)
        self.schedule.finished(lease, piece, value, self.now)

    def die(self, worker, blame):
        lease = self.alive.pop(worker)
        reason = ""
        if lease is not None:
            left = self.left.pop(lease.id)
            reason = f"reason {left[0].candidate}"
            if blame and len(lease.pieces) == 1 and self.is_open(lease.id, left[0]):
                serial, place = self.of_lease[lease.id, left[0].key], left[0].candidate
                if place is not None or serial not in self.taken_apart:
                    self.deaths[serial, place] = self.deaths.get((serial, place), 0) + 1
                    if self.deaths[serial, place] == self.policy.deaths:
                        if place is None:
                            self.taken_apart.add(serial)
                        else:
                            self._decided.add((serial, place))
        self.schedule.leave(worker, self.now, blame=blame, reason=reason)

    def fail(self, lease, piece, final):
        serial = self.of_lease[lease, piece.key]
        was_open = self.is_open(lease, piece) and not (piece.candidate is None and serial in self.taken_apart)
        if self.message(lease, piece) and was_open and not self.running(piece):
            self.tries[serial, piece.candidate] = self.tries.get((serial, piece.candidate), 0) + 1
            if final or self.tries[serial, piece.candidate] == self.policy.attempts:
                self.must_fail.add(serial)
        self.schedule.failed(lease, piece, RuntimeError(f"{serial}"), self.now, final=final)

    # ---- events ----

    @initialize()
    def empty(self):
        self._decided = set()

    @rule(count=st.integers(1, 6), candidates=st.integers(1, 3), affinity=st.sampled_from(AFFINITIES))
    def add(self, count, candidates, affinity):
        jobs = []
        for key in [key for key in map(str, range(12)) if key not in self.serial][:count]:
            jobs.append(Job(key, candidates, affinity))
            self.serial[key] = self.serials
            self.jobs[self.serials] = jobs[-1]
            self.serials += 1
        self.schedule.add(jobs)

    @rule(count=st.integers(1, 6), node=st.sampled_from(["", "n", "m"]))
    def join(self, count, node):
        for _ in range(count):
            self.schedule.join(f"w{self.names}", node)
            self.alive[f"w{self.names}"] = None
            self.names += 1

    @rule(what=st.sampled_from(["finish", "finish", "fail", "final", "die", "die", "vanish"]), n=NUMBER, m=NUMBER)
    def happens(self, what, n, m):
        if not self.leases():
            return
        lease = pick(self.leases(), n)
        piece = pick(self.left[lease.id], m)
        if what == "finish":
            self.finish(lease.id, piece)
        elif what in ("fail", "final"):
            self.fail(lease.id, piece, what == "final")
        else:
            self.die(lease.worker, blame=what == "die")
        self.collect()

    @rule(good=st.booleans(), n=NUMBER, m=NUMBER)
    def late_or_repeated(self, good, n, m):
        if not self.given:
            return
        lease = pick(sorted(self.given)[-12:], n)
        piece = pick(self.given[lease].pieces, m)
        if good:
            self.finish(lease, piece)
        elif piece not in self.left.get(lease, ()):
            self.fail(lease, piece, True)
        self.collect()

    @rule()
    def nonsense(self):
        self.schedule.finished(100_000, Piece("0"), "nonsense", self.now)
        self.schedule.failed(100_000, Piece("0"), RuntimeError("nonsense"), self.now)
        self.schedule.leave("nobody", self.now, blame=True)

    @rule(n=NUMBER, blame=st.booleans())
    def leaves(self, n, blame):
        if self.alive:
            self.die(pick(sorted(self.alive), n), blame)
            self.collect()

    @rule(affinity=st.sampled_from(AFFINITIES))
    def read(self, affinity):
        self.schedule.read(affinity)

    @rule(seconds=st.floats(0.001, 30))
    def time_passes(self, seconds):
        self.now += seconds
        check = self.schedule.next_check(self.now)
        assert check is None or check >= 0
        for worker in self.schedule.expired(self.now):
            assert self.now - self.alive[worker].since >= self.policy.hang_floor
            self.die(worker, True)
        self.collect()

    # ---- always ----

    @invariant()
    def every_open_piece_waits_or_runs(self):
        waiting = [piece for piece in self.open_pieces() if not self.running(piece)]
        assert self.schedule.pending == len(waiting)
        assert self.schedule.idle == sum(lease is None for lease in self.alive.values())
        assert self.schedule.running == len(self.leases())
        assert self.schedule.done == (not self.serial)

    @invariant()
    def idle_workers_have_nothing_to_do_after_assign(self):
        self.assign()
        assert not (self.schedule.pending and self.schedule.idle)

    def teardown(self):
        """Everybody leaves, and one good worker works everything off."""
        if not hasattr(self, "schedule"):
            return
        for worker in list(self.alive):
            self.die(worker, False)
        self.join(1, "")
        for _ in range(1000):
            self.assign()
            for lease in self.leases():
                for piece in list(lease.pieces):
                    self.finish(lease.id, piece)
            self.collect()
        assert self.schedule.done
        assert not self.schedule.assign(self.now)
        assert self.results.keys() == self.jobs.keys()
        assert self.schedule.stats.quarantined == sum(
            isinstance(value, Quarantined)
            for result in self.results.values()
            if result.isolated and result.error is None
            for value in result.value
        )


Ledger.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestLedger = Ledger.TestCase


@pytest.mark.parametrize("seed", range(10))
def test_long_histories(seed):
    """The same events, many more of them, weighted so that much happens at the same time."""
    rng = random.Random(seed)
    for _ in range(12):
        ledger = Ledger()
        ledger.empty()
        ledger.start(
            rng.randint(1, 3), rng.randint(1, 3), rng.choice([0.0, 2.0]), rng.randint(1, 3), rng.choice([0.1, 50.0])
        )
        kinds = rng.choices(["finish", "fail", "final", "die", "vanish"], [8, 2, 0.2, rng.choice([1, 8]), 1], k=200)
        for kind in kinds:
            ledger.happens(kind, rng.randrange(1000), rng.randrange(1000))
            if rng.random() < 0.3:
                ledger.late_or_repeated(rng.random() < 0.7, rng.randrange(1000), rng.randrange(1000))
            if len(ledger.alive) < 6:
                ledger.join(rng.randint(1, 3), rng.choice(["n", "m"]))
            if rng.random() < 0.2:
                ledger.add(rng.randint(1, 6), rng.randint(1, 3), rng.choice(AFFINITIES))
            ledger.time_passes(rng.choice([0.1, 0.5, 0.5, 8.0]))
            ledger.idle_workers_have_nothing_to_do_after_assign()
            ledger.every_open_piece_waits_or_runs()
        ledger.teardown()
