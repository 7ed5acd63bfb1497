"""The scheduling core: nothing lost, nothing twice, whatever happens in whatever order; and who is given what."""

from __future__ import annotations

import random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from evomem.errors import EvomemError
from evomem.workers.failed_starts import FailedStarts
from evomem.workers.records import Work
from evomem.workers.schedule import Job, Lease, Piece, Policy, Quarantined, Schedule
from evomem.workers.waiting_queue import Queue

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


# ---- who is given what: against a search through everything that waits -----------------------------------------------


class SlowQueue:
    """The same rules by looking at every waiting piece."""

    def __init__(self):
        self.returned, self.waiting, self.reads, self.readers = [], [], {""}, {}

    def first(self, known):
        if self.returned:
            return self.returned[0]

        def rule_of(work):
            if work.affinity in self.reads or work.affinity in known:
                return 0
            return 2 if self.readers.get(work.affinity, 0) else 1

        return min(self.waiting, key=rule_of, default=None)  # min takes the first among equals

    def remove(self, work):
        for works in (self.returned, self.waiting):
            if work in works:
                works.remove(work)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["append", "insert", "take", "take", "take", "give_back", "forget", "read", "reading"]),
        st.sampled_from([*AFFINITIES, "d", "e"]),
        st.integers(0, 5),
    ),
    max_size=60,
)


@given(steps=STEPS, known=st.lists(st.sampled_from(AFFINITIES), max_size=2))
@settings(max_examples=300, deadline=None)
def test_the_queue_gives_what_a_search_through_all_would_give(steps, known):
    fast, slow, taken, made = Queue(), SlowQueue(), [], 0
    for what, affinity, number in steps:
        if what == "append":
            work = Work(Piece(str(made)), affinity)
            fast.append(work)
            slow.waiting.append(work)
            made += 1
        elif what == "insert":
            works = [Work(Piece(str(made), place), affinity) for place in range(number)]
            fast.insert(works)
            slow.waiting[:0] = works
            made += 1
        elif what == "take":
            work = fast.first(known)
            assert work is slow.first(known)
            if work is not None:
                fast.remove(work)
                slow.remove(work)
                taken.append(work)
        elif what == "give_back" and taken:
            work = taken.pop(number % len(taken))
            fast.give_back(work)
            slow.returned.append(work)
        elif what == "forget" and slow.waiting:
            work = slow.waiting[number % len(slow.waiting)]
            fast.remove(work)
            slow.remove(work)
        elif what == "read":
            fast.read(affinity)
            slow.reads.add(affinity)
        elif what == "reading":
            change = -1 if slow.readers.get(affinity, 0) and number % 2 else 1
            fast.reading(affinity, change)
            slow.readers[affinity] = slow.readers.get(affinity, 0) + change
        assert len(fast) == len(slow.waiting) + len(slow.returned)


# ---- single rules ----------------------------------------------------------------------------------------------------


def started(jobs, workers, policy=None):
    schedule = Schedule(policy or Policy())
    schedule.add(jobs)
    for name in workers:
        schedule.join(name)
    return schedule, schedule.assign(0.0)


def test_two_workers_do_not_read_the_same_context_and_each_stays_with_its_own():
    jobs = [Job(f"{affinity}{n}", 8, affinity) for affinity in "ab" for n in range(3)]
    schedule, leases = started(jobs, ["x", "y"])
    assert [lease.pieces[0].key for lease in leases] == ["a0", "b0"]
    order = {lease.worker: [] for lease in leases}
    now = 0.0
    while leases:
        lease = leases.pop(0)
        order[lease.worker].append(lease.pieces[0].key)
        now += 1
        schedule.finished(lease.id, lease.pieces[0], None, now)
        leases += schedule.assign(now)
    assert order == {"x": ["a0", "a1", "a2"], "y": ["b0", "b1", "b2"]}


def test_a_context_whose_reader_failed_is_read_by_nobody():
    schedule, leases = started([Job(key, 1, key[0]) for key in ("a0", "b0", "b1", "a1")], ["x", "y"])
    schedule.failed(leases[0].id, Piece("a0"), RuntimeError("no"), 1.0, final=True)
    assert [lease.pieces[0].key for lease in schedule.assign(1.0)] == ["a1"]


def test_what_was_lost_goes_first():
    jobs = [Job(str(n), 1, "") for n in range(6)]
    schedule, (lease, other) = started(jobs, ["x", "y"])
    schedule.leave("x", 1.0, blame=False)
    schedule.finished(other.id, other.pieces[0], None, 1.0)
    (again,) = schedule.assign(1.0)
    assert again.pieces == lease.pieces


def test_a_straggler_is_duplicated_when_somebody_idles_and_the_first_result_wins():
    jobs = [Job(str(n), 1, "") for n in range(4)]
    schedule, leases = started(jobs, "abcd", Policy(straggler=2.0, copies=3))
    for lease in leases[1:]:
        schedule.finished(lease.id, lease.pieces[0], lease.pieces[0].key, 1.0)
    assert schedule.assign(1.9) == []
    assert schedule.next_check(1.9) == pytest.approx(0.1)
    (copy,) = schedule.assign(2.0)
    assert schedule.assign(3.9) == []  # the copy has its time, too
    (further,) = schedule.assign(4.0)
    assert schedule.assign(60.0) == []  # never more copies than that
    for lease in (copy, further):
        assert lease.duplicate
        assert lease.pieces == leases[0].pieces
    schedule.finished(copy.id, copy.pieces[0], "copy", 61.0)
    schedule.finished(leases[0].id, leases[0].pieces[0], "first", 64.0)
    assert {result.key: result.value for result in schedule.results()} == {"0": "copy", "1": "1", "2": "2", "3": "3"}
    assert (schedule.stats.dropped, schedule.stats.wasted_seconds, schedule.done) == (1, 64.0, True)


def test_when_a_copy_dies_the_straggler_gets_another():
    schedule, leases = started([Job(str(n), 1, "") for n in range(3)], "abc", Policy(straggler=2.0, copies=2))
    for lease in leases[1:]:
        schedule.finished(lease.id, lease.pieces[0], None, 1.0)
    (copy,) = schedule.assign(2.0)
    schedule.leave(copy.worker, 3.0, blame=True)
    assert schedule.pending == 0
    (again,) = schedule.assign(3.0)
    assert again.pieces == leases[0].pieces


def test_a_quarantine_is_final_even_if_a_copy_answers_late():
    schedule, (lease,) = started([Job("a", 2, "")], ["x"], Policy(deaths=1))
    schedule.leave("x", 1.0, blame=True)
    schedule.join("y")
    (part,) = schedule.assign(1.0)
    schedule.leave("y", 2.0, blame=True, reason="killed")
    schedule.finished(part.id, part.pieces[0], "late", 3.0)
    schedule.join("z")
    (other,) = schedule.assign(3.0)
    schedule.finished(other.id, other.pieces[0], "other", 4.0)
    (result,) = schedule.results()
    assert result.value == [Quarantined(0, 1, "killed"), "other"]
    assert lease.id != part.id


def test_the_second_copy_goes_to_another_node():
    schedule = Schedule()
    schedule.add([Job(str(n), 1, "") for n in range(3)])
    for name, node in (("slow", "n"), ("near", "n"), ("far", "m")):
        schedule.join(name, node)
    first, *others = schedule.assign(0.0)
    for lease in others:
        schedule.finished(lease.id, lease.pieces[0], None, 1.0)
    assert (first.worker, [lease.worker for lease in schedule.assign(5.0)]) == ("slow", ["far"])


def test_the_first_to_finish_do_not_make_stragglers_of_the_others():
    schedule, leases = started([Job(str(n), 1, "") for n in range(10)], [str(n) for n in range(10)])
    schedule.finished(leases[0].id, leases[0].pieces[0], None, 0.1)
    assert schedule.assign(5.0) == []


def test_a_hanging_worker_is_given_up():
    policy = Policy(hang=4, hang_floor=10, hang_first=100)
    schedule, (lease,) = started([Job("a", 1, ""), Job("b", 1, "")], ["x"], policy)
    assert (schedule.expired(99.9), schedule.expired(100.0), schedule.next_check(40.0)) == ([], ["x"], 60.0)
    schedule.finished(lease.id, lease.pieces[0], None, 5.0)
    schedule.assign(5.0)
    assert (schedule.expired(24.9), schedule.expired(25.0), schedule.next_check(20.0)) == ([], ["x"], 5.0)


def test_short_pieces_are_sent_together_and_long_ones_alone():
    def sizes(seconds):
        schedule, leases = started([Job(str(n), 1, "") for n in range(40)], ["x", "y"])
        found, now = [], 0.0
        while leases:
            lease = leases.pop(0)
            found.append(len(lease.pieces))
            for piece in lease.pieces:
                now += seconds
                schedule.finished(lease.id, piece, None, now, seconds)
            leases += schedule.assign(now)
        assert sum(found) == 40
        return found

    assert set(sizes(0.2)) == {1}
    assert max(sizes(0.02)) == 5  # fills 0.1 s
    assert sizes(0.009)[2] == 10  # ceil(38 / 4): half of a worker's share
    assert sizes(0.0001)[2] == 19  # 38 / 2: the whole share, which takes less than 0.1 s


def test_nobody_is_blamed_for_a_death_among_several_but_they_run_alone_then():
    policy = Policy(deaths=1, batch_seconds=0.5)
    schedule, (lease,) = started([Job(str(n), 2, "") for n in range(9)], ["x"], policy)
    schedule.finished(lease.id, lease.pieces[0], None, 0.1)
    (several,) = schedule.assign(0.1)
    assert len(several.pieces) == 4
    schedule.leave("x", 0.2, blame=True, reason="killed")
    schedule.join("y")
    for piece in several.pieces:
        (single,) = schedule.assign(0.3)
        assert single.pieces == (piece,)
        schedule.finished(single.id, piece, None, 0.4)
    assert not any(result.isolated for result in schedule.results())


def test_a_candidate_that_kills_is_found_and_the_others_get_their_values():
    schedule = Schedule()
    schedule.add([Job("bad", 4, "a"), Job("good", 4, "a")])
    deaths, now = 0, 0.0
    results = []
    while not schedule.done:
        schedule.join(f"w{deaths}")
        while schedule.idle and (leases := schedule.assign(now)):
            (lease,) = leases
            (piece,) = lease.pieces
            now += 1
            if piece.key == "bad" and piece.candidate in (None, 2):
                deaths += 1
                schedule.leave(lease.worker, now, blame=True, reason=f"signal {deaths}")
            else:
                schedule.finished(lease.id, piece, piece.candidate, now)
        results += schedule.results()
    found = {result.key: result for result in results}
    assert found["bad"].isolated
    assert found["bad"].value == [0, 1, Quarantined(2, 3, "signal 6"), 3]
    assert (found["good"].isolated, found["good"].value) == (False, None)
    assert (schedule.stats.deaths, schedule.stats.quarantined) == (6, 1)


def test_the_whole_jobs_late_result_wins_over_its_candidates():
    schedule, (lease,) = started([Job("a", 2, "")], ["x"], Policy(deaths=1))
    schedule.leave("x", 1.0, blame=True)
    schedule.join("y")
    (part,) = schedule.assign(1.0)
    assert part.pieces == (Piece("a", 0),)
    schedule.finished(lease.id, Piece("a"), "whole", 2.0)
    schedule.finished(part.id, part.pieces[0], "part", 3.0)
    (result,) = schedule.results()
    assert (result.value, result.isolated, schedule.done, schedule.pending) == ("whole", False, True, 0)


def test_errors_are_for_users():
    schedule = Schedule()
    schedule.add([Job("a", 1, "")])
    schedule.join("x")
    schedule.leave("x", 0.0, blame=False)
    with pytest.raises(EvomemError, match="was added already"):
        schedule.add([Job("a", 1, "")])
    with pytest.raises(EvomemError, match="at least 1"):
        schedule.add([Job("b", 0, "")])
    with pytest.raises(EvomemError, match="needs a new name"):
        schedule.join("x")
    with pytest.raises(EvomemError, match="at least 1"):
        Schedule(Policy(copies=0))


def test_leases_are_records():
    _, leases = started([Job("a", 1, "")], ["x"])
    assert leases == [Lease(0, "x", (Piece("a"),), 0.0, False)]


def test_starts_count_in_a_row_and_wait_longer_and_longer():
    starts = FailedStarts(errors=3, kills=5, pauses=(0.0, 1.0, 2.0))
    assert [starts.raised(0.0), starts.ended(0.0), starts.raised(0.0)] == [True] * 3
    assert (starts.waiting, starts.take(0.0), starts.waiting) == (3, 3, 0)
    starts.joined()
    assert [starts.raised(0.0), starts.raised(0.0), starts.raised(0.0)] == [True, True, False]
    starts.joined()
    starts.take(0.0)
    assert [starts.ended(10.0) for _ in range(5)] == [True] * 4 + [False]
    assert [starts.take(now) for now in (9.9, 10.0, 10.9, 11.0, 12.0, 13.0)] == [0, 1, 0, 1, 2, 0]
