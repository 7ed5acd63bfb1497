"""The scheduling core: who is given what, and its rules one by one; test_schedule_histories.py has whole histories."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from evomem.errors import EvomemError
from evomem.workers.failed_starts import FailedStarts
from evomem.workers.records import Work
from evomem.workers.schedule import Job, Lease, Piece, Policy, Quarantined, Schedule
from evomem.workers.waiting_queue import Queue
from tests.workers.test_schedule_histories import AFFINITIES

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
