"""Workers: who does what next, and what counts; pure: events in, assignments out, the time is an argument.

`Schedule` knows neither Ray nor threads nor clocks nor chance. Whoever holds it tells it what happened (`join`,
`leave`, `finished`, `failed`), asks it what to do (`assign`, `expired`, `next_check`), and collects `results`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from itertools import islice
from typing import Any

from evomem.errors import EvomemError
from evomem.workers.durations import Durations
from evomem.workers.messages import Job, Lease, Piece, Policy, Quarantined, Result, Stats
from evomem.workers.records import Running, State, Work, Worker
from evomem.workers.stragglers import Stragglers
from evomem.workers.waiting_queue import Queue

__all__ = ["Job", "Lease", "Piece", "Policy", "Quarantined", "Result", "Schedule", "Stats"]

_LOOKED_AT = 32
"""Idle workers among which one on another node is looked for."""


class Schedule:
    """The ledger of what waits, runs and is done.

    Parameters
    ----------
    policy : when to try again, to duplicate, to give up.

    Raises
    ------
    EvomemError : a number of the policy is out of range.
    """

    def __init__(self, policy: Policy = Policy()) -> None:  # noqa: B008 (frozen)
        if min(policy.attempts, policy.deaths, policy.copies) < 1:
            raise EvomemError(f"attempts, deaths and copies must be at least 1: {policy}")
        self.policy = policy
        self._jobs: dict[str, State] = {}
        self._results: dict[str, Result] = {}
        self._queue = Queue()
        self._workers: dict[str, Worker] = {}
        self._names: set[str] = set()
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._leases: OrderedDict[int, Running] = OrderedDict()  # the oldest first
        self._next = 0
        self._durations = Durations()
        self._stragglers = Stragglers(policy, self._leases, self._durations)
        self._finished = self._dropped = self._deaths = self._requeued = self._duplicates = self._quarantined = 0
        self._wasted = 0.0

    # ---- what happened ----------------------------------------------------------------------------------------------

    def add(self, jobs: Iterable[Job]) -> None:
        """Add work, at any time.

        Raises
        ------
        EvomemError : a key is taken, or a job has no candidate.
        """
        for job in jobs:
            if job.key in self._jobs or job.key in self._results:
                raise EvomemError(f"job {job.key!r} was added already and its result is not collected yet")
            if job.candidates < 1:
                raise EvomemError(f"job {job.key!r} has {job.candidates} candidates; at least 1 is needed")
            whole = Work(Piece(job.key), job.affinity)
            self._jobs[job.key] = State(job, whole, self._next)
            self._queue.append(whole)

    def join(self, worker: str, node: str = "") -> None:
        """Add an idle worker.

        Raises
        ------
        EvomemError : a worker of that name is or was there.
        """
        if worker in self._names:
            raise EvomemError(f"worker {worker!r} is or was there already; a worker that comes back needs a new name")
        self._names.add(worker)
        self._workers[worker] = Worker(node)
        self._idle[worker] = None

    def leave(self, worker: str, now: float, *, blame: bool, reason: str = "") -> None:
        """Take note that a worker died or left: what it did goes to the front. Unknown workers are ignored.

        Parameters
        ----------
        worker : its name.
        now : seconds.
        blame : a death for what it did, if that was one piece; False: its node vanished, it was retired.
        reason : what is known of the death.
        """
        gone = self._workers.pop(worker, None)
        if gone is None:
            return
        self._idle.pop(worker, None)
        self._deaths += blame
        running = gone.lease
        if running is None:
            return
        self._wasted += now - running.heard
        works = list(running.left.values())
        for work in works:
            self._end_copy(running, work)
        del self._leases[running.lease.id]
        alone = len(running.lease.pieces) == 1
        for work in works:
            if blame and not work.closed:
                work.deaths += alone
                work.alone = True
                if work.deaths >= self.policy.deaths:
                    self._give_up(work, reason)
            self._requeue(work)

    def finished(self, lease: int, piece: Piece, value: Any, now: float, seconds: float | None = None) -> None:
        """Take the result of a piece. The first one wins; a late one of a lease that has ended counts as well.

        Parameters
        ----------
        lease, piece : which; what was never given out is ignored.
        value : the result.
        now : seconds.
        seconds : how long it took; None: since the lease was last heard of.
        """
        if not 0 <= lease < self._next:
            return
        running = self._leases.get(lease)
        spent = None
        if running is not None and piece in running.left:
            spent = now - running.heard if seconds is None else seconds
            self._durations.add(spent)
            self._workers[running.lease.worker].holds(running.left[piece].affinity)
            self._close(running, piece, now)
        state = self._jobs.get(piece.key)
        work = self._work(state, piece)
        # A key may be used again: what an earlier job of that name still sends must not count.
        if state is None or work is None or lease < state.first_lease or (piece.candidate is not None and work.closed):
            self._dropped += 1
            self._wasted += spent or 0.0
            return
        self._finished += 1
        if piece.candidate is None:
            self._over(state, value, None)
        else:
            self._part(state, piece.candidate, value)

    def failed(self, lease: int, piece: Piece, error: Exception, now: float, *, final: bool = False) -> None:
        """Take note that a piece raised: it is tried again, or its job ends with this error.

        While another copy runs a failure does not count; nor does one of a lease that has ended.

        Parameters
        ----------
        lease, piece : which.
        error : what was raised.
        now : seconds.
        final : do not try again.
        """
        running = self._leases.get(lease)
        if running is None or piece not in running.left:
            return
        work = running.left[piece]
        self._wasted += now - running.heard
        self._close(running, piece, now)
        if work.closed or work.leases:
            return
        work.tries += 1
        if final or work.tries >= self.policy.attempts:
            self._over(self._jobs[piece.key], None, error, isolated=piece.candidate is not None)
        else:
            self._requeue(work)

    def read(self, affinity: str) -> None:
        """Take note that the context of an affinity is there for everybody from now on."""
        self._queue.read(affinity)

    # ---- what to do -------------------------------------------------------------------------------------------------

    def assign(self, now: float) -> list[Lease]:
        """Give work to idle workers.

        Parameters
        ----------
        now : seconds.
        """
        given = []
        while self._idle and len(self._queue):
            name = next(iter(self._idle))
            given.append(self._lease(name, self._batch(self._workers[name]), now, duplicate=False))
        while self._idle and not len(self._queue):
            late = self._stragglers.next()
            if late is None or now < late[0]:
                break
            _, running, work = late
            name = self._idle_elsewhere(self._workers[running.lease.worker].node)
            given.append(self._lease(name, [work], now, duplicate=True))
        return given

    def expired(self, now: float) -> list[str]:
        """Return the workers that hang. The caller kills them and says ``leave(…, blame=True)``.

        Parameters
        ----------
        now : seconds.
        """
        limit = self._stragglers.hang_limit
        late = []
        for running in self._leases.values():
            if now < running.lease.since + limit:
                break
            if now >= running.lease.since + limit * len(running.lease.pieces):
                late.append(running.lease.worker)
        return late

    def next_check(self, now: float) -> float | None:
        """Return in how many seconds `expired` or `assign` may have something new to say; None: only after an event.

        Parameters
        ----------
        now : seconds.
        """
        limit, due = self._stragglers.hang_limit, math.inf
        for running in self._leases.values():
            if running.lease.since + limit >= due:
                break
            due = min(due, running.lease.since + limit * len(running.lease.pieces))
        if self._idle and not len(self._queue):
            late = self._stragglers.next()
            due = due if late is None else min(due, late[0])
        if due <= now:
            return 0.0
        # At least a millisecond: rounding must not make a caller spin.
        return None if due == math.inf else max(due - now, 1e-3)

    def results(self) -> list[Result]:
        """Return the results that became final since the last call, in the order in which they did."""
        collected = list(self._results.values())
        self._results.clear()
        return collected

    @property
    def pending(self) -> int:
        """How many pieces wait."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """How many leases run; those whose result is not needed any more included."""
        return len(self._leases)

    @property
    def idle(self) -> int:
        """How many workers have nothing to do."""
        return len(self._idle)

    @property
    def done(self) -> bool:
        """Whether every job that was added has its result and all results were collected; copies may still run."""
        return not self._jobs and not self._results

    @property
    def stats(self) -> Stats:
        """What was counted so far."""
        counts = self._finished, self._dropped, self._deaths, self._requeued, self._duplicates, self._quarantined
        return Stats(*counts, self._wasted)

    # ---- leases -----------------------------------------------------------------------------------------------------

    def _batch(self, worker: Worker) -> list[Work]:
        median = self._durations.median
        count = 1
        if median is not None and median < self.policy.batch_seconds:
            count = math.ceil(len(self._queue) / len(self._workers))
            if count * median > self.policy.batch_seconds:  # or else nobody waits long for the last one
                count = math.ceil(count / 2)
            if median > 0:
                count = max(1, min(count, int(self.policy.batch_seconds / median)))
        works: list[Work] = []
        while len(works) < count and not (works and works[0].alone):
            work = self._queue.first(worker.known)
            if work is None or (works and work.alone):
                break
            self._queue.remove(work)
            works.append(work)
        return works

    def _lease(self, name: str, works: list[Work], now: float, *, duplicate: bool) -> Lease:
        worker = self._workers[name]
        lease = Lease(self._next, name, tuple(work.piece for work in works), now, duplicate)
        self._next += 1
        left = {work.piece: work for work in works}
        reads = {work.affinity for work in works if not self._queue.is_read(work.affinity)} - set(worker.known)
        running = worker.lease = self._leases[lease.id] = Running(lease, left, reads, now)
        del self._idle[name]
        for affinity in reads:
            self._queue.reading(affinity, 1)
        for work in works:
            work.leases.add(lease.id)
        self._duplicates += duplicate
        self._stragglers.add(running)
        return lease

    def _idle_elsewhere(self, node: str) -> str:
        """Return an idle worker, on another node if one of the first few is: a straggler's node may be what is slow."""
        names = list(islice(self._idle, _LOOKED_AT))
        return next((name for name in names if self._workers[name].node != node), names[0])

    def _close(self, running: Running, piece: Piece, now: float) -> None:
        """End a piece of a lease, and with its last one the lease."""
        self._end_copy(running, running.left.pop(piece))
        running.heard = now
        if not running.left:
            del self._leases[running.lease.id]
            self._workers[running.lease.worker].lease = None
            self._idle[running.lease.worker] = None

    def _end_copy(self, running: Running, work: Work) -> None:
        work.leases.discard(running.lease.id)
        if work.affinity in running.reads:
            running.reads.discard(work.affinity)
            self._queue.reading(work.affinity, -1)
        if work.leases:  # the copy that is left may be duplicated again
            self._stragglers.add(self._leases[max(work.leases)])

    # ---- jobs -------------------------------------------------------------------------------------------------------

    def _work(self, state: State | None, piece: Piece) -> Work | None:
        if state is None:
            return None
        if piece.candidate is None:
            return state.whole
        return state.parts[piece.candidate] if state.parts and 0 <= piece.candidate < len(state.parts) else None

    def _requeue(self, work: Work) -> None:
        if not (work.closed or work.leases):
            self._requeued += 1
            self._queue.give_back(work)

    def _give_up(self, work: Work, reason: str) -> None:
        """Take a job apart, or quarantine a candidate."""
        state = self._jobs[work.piece.key]
        if work.piece.candidate is not None:
            self._part(state, work.piece.candidate, Quarantined(work.piece.candidate, work.deaths, reason))
            return
        work.closed = True
        self._requeued += 1
        pieces = (Piece(state.job.key, candidate) for candidate in range(state.job.candidates))
        state.parts = [Work(piece, work.affinity, alone=True) for piece in pieces]
        self._queue.insert(state.parts)

    def _part(self, state: State, candidate: int, value: Any) -> None:
        parts = state.parts or []
        self._shut(parts[candidate])
        state.values[candidate] = value
        if len(state.values) == len(parts):
            values = [state.values[index] for index in range(len(parts))]
            self._quarantined += sum(isinstance(value, Quarantined) for value in values)
            self._over(state, values, None, isolated=True)

    def _over(self, state: State, value: Any, error: Exception | None, *, isolated: bool = False) -> None:
        for work in (state.whole, *(state.parts or ())):
            self._shut(work)
        del self._jobs[state.job.key]
        self._results[state.job.key] = Result(state.job.key, value, error, isolated)

    def _shut(self, work: Work) -> None:
        work.closed = True
        self._queue.remove(work)
