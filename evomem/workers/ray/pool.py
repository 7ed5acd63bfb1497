"""Workers: the pool that evaluates in Ray's worker processes, on this machine or on a cluster.

`Schedule` decides who does what; this file carries its decisions out and tells it what happened. Ray restarts nothing
and retries nothing by itself: the ledger is here, so that every unit counts once, whatever dies.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from evomem.errors import EvomemError, WorkerError
from evomem.workers.context_exchange import Directory
from evomem.workers.failed_starts import FailedStarts
from evomem.workers.quarantine import OpenUnits, PieceWithdrawnError, affinity
from evomem.workers.ray.cluster import Connection
from evomem.workers.ray.worker import Answer, Order, RayWorker, pickled
from evomem.workers.schedule import Lease, Piece, Policy, Schedule
from evomem.workers.units import Outcome, Recipe, Unit, WorkerOptions

STARTS = 3
"""Workers that may fail to start one after the other before the pool gives up."""
KILLED_STARTS = 12
"""Workers that may be killed one after the other while they start: not their fault, but no run waits for ever."""
PAUSES = (0.0, 0.0, 0.0, 0.5, 1.0, 2.0, 4.0)
"""Seconds before another one is started, by how many were killed; the last holds for all others."""
STARVED = 600.0
"""Seconds without any worker after which the pool gives up."""
QUICK = 0.05
"""Seconds: a worker that is found dead so soon after work was sent to it had died before."""


@dataclass
class Member:
    """A worker process: its actor, the reference that says that it is ready, and where it is."""

    actor: Any
    ready: Any
    node: str = ""
    pid: int = 0
    host: str = ""


@dataclass
class Running:
    """A lease, what was sent of it, and references to the answers and to the readings that come with them."""

    lease: Lease
    pieces: tuple[Piece, ...]
    answers: Any
    read: Any


class RayPool:
    """Evaluates units in worker processes; the results are those of `LocalPool`, to the bit.

    Parameters
    ----------
    recipe : how a worker makes its evaluator.
    options : how many workers, and where.
    attempts : how often a unit that raises is tried.
    store_bytes : contexts that were read and are shared between workers, at most.
    report : told, in a sentence, what happens to workers.
    quarantined : candidates that are not to be evaluated (`evomem.workers.quarantine.candidate_digest`).
    policy : for tests; otherwise made from the options.

    Raises
    ------
    WorkerError : Ray cannot be started or reached, or has not the resources; no worker can start.
    """

    def __init__(
        self,
        recipe: Recipe,
        options: WorkerOptions,
        *,
        attempts: int = 1,
        store_bytes: int = 1 << 30,
        report: Callable[[str], None] = lambda message: None,
        quarantined: Iterable[str] = (),
        policy: Policy | None = None,
    ) -> None:
        self._options, self._report, self._threads = options, report, recipe.threads
        self._connection = Connection(options, recipe.threads, store_bytes + _nbytes(recipe.parts), report)
        self._ray = self._connection.ray
        self._schedule = Schedule(policy or _policy(attempts, options.timeout))
        self._directory = Directory(store_bytes)
        self._members: dict[str, Member] = {}
        self._joined: set[str] = set()
        self._running: dict[int, Running] = {}
        self._units = OpenUnits(quarantined)
        self._doubts: dict[str, int] = {}
        self._started = 0
        self._failed_starts = FailedStarts(STARTS, KILLED_STARTS, PAUSES)
        self._starved_since: float | None = None
        try:
            self._build = pickled(recipe)
            with self._ray_errors():
                self._parts = self._ray.put(dict(recipe.parts))
                remote = self._ray.remote(
                    num_cpus=self._connection.cpus, num_gpus=self._connection.gpus, max_restarts=0, max_task_retries=0
                )
                self._actor = remote(RayWorker)
                for _ in range(self._connection.count):
                    self._start()
                while not self._joined:
                    self._wait()
        except BaseException:
            self.close()
            raise

    # ---- what a search calls ----------------------------------------------------------------------------------------

    def evaluate(self, units: Sequence[Unit]) -> Iterator[Outcome]:
        """Yield an outcome per failed attempt, and in the end one per unit that is no more tried ``again``.

        Raises
        ------
        WorkerError : Ray has failed as a whole, or no worker can be started.
        """
        with self._ray_errors():
            yield from self._evaluate(units)

    def _evaluate(self, units: Sequence[Unit]) -> Iterator[Outcome]:
        self._units.clear()  # what an earlier call, broken off, has left
        self._schedule.add(self._units.add(units))
        while len(self._units):
            self._send()
            raised = [(key, answer.error) for key, answer in self._wait() if answer.error is not None]
            results = self._schedule.results()
            errors = {result.key: result.error for result in results}
            for key, error in raised:
                unit, seconds = self._units.add_seconds(key)
                if unit is not None and errors.get(key) is not error:
                    yield Outcome(unit, [], seconds, error, again=True)
            for result in results:
                outcome, jobs = self._units.close(result)
                self._schedule.add(jobs)
                if outcome is not None:
                    yield outcome

    @contextlib.contextmanager
    def _ray_errors(self) -> Iterator[None]:
        """Tell in a sentence that Ray itself has failed."""
        try:
            yield
        except self._ray.exceptions.RayError as error:
            raise WorkerError(f"Ray has failed: {_reason(error)}. What is finished is kept: resume the run") from error

    def close(self) -> None:
        """End the workers, and Ray if this pool has started it."""
        for member in self._members.values() if not self._connection.own else ():  # they end with a Ray of our own
            with contextlib.suppress(Exception):
                self._ray.kill(member.actor, no_restart=True)
        self._members.clear()
        self._joined.clear()
        self._running.clear()
        self._directory = Directory(0)  # with the last references the shared memory is free
        self._parts = None
        self._connection.close()

    @property
    def stats(self) -> dict[str, Any]:
        """What happened so far: see `evomem.workers.messages.Stats`; and how many workers were started."""
        return {**asdict(self._schedule.stats), "workers_started": self._started}

    def workers(self) -> list[dict[str, Any]]:
        """Return name, process and machine of every worker that is ready."""
        joined = [(name, member) for name, member in list(self._members.items()) if name in self._joined]
        return [{"name": name, "pid": m.pid, "node": m.node, "host": m.host} for name, m in joined]

    def memory(self) -> list[dict[str, int]]:
        """Return what `RayWorker.memory` says for every worker; only between calls of `evaluate`."""
        sizes: list[dict[str, int]] = self._ray.get([self._members[n].actor.memory.remote() for n in self._joined])
        return sizes

    # ---- sending ----------------------------------------------------------------------------------------------------

    def _send(self) -> None:
        while leases := self._schedule.assign(time.monotonic()):
            for lease in leases:
                self._send_lease(lease)

    def _send_lease(self, lease: Lease) -> None:
        sent, orders = [], []
        for piece in lease.pieces:
            try:
                unit, candidate = self._units.order(piece)
            except PieceWithdrawnError as error:
                self._schedule.failed(lease.id, piece, error, time.monotonic(), final=True)
                continue
            sent.append(piece)
            orders.append(Order(unit, candidate, self._directory.offers(affinity(unit))))
        if orders:
            actor = self._members[lease.worker].actor
            answers, read = actor.evaluate.options(num_returns=2).remote(orders)
            self._running[lease.id] = Running(lease, tuple(sent), answers, read)

    # ---- waiting ----------------------------------------------------------------------------------------------------

    def _wait(self) -> list[tuple[str, Answer]]:
        """Wait until something happens; take it in. Return the answers that came, with their units' keys."""
        leases = {running.answers: running for running in self._running.values()}
        starting = {m.ready: name for name, m in self._members.items() if name not in self._joined}
        for _ in range(self._failed_starts.take(time.monotonic())):
            self._start()
        due = self._schedule.next_check(time.monotonic())
        timeout = min(1.0, due) if due is not None else 1.0
        waiting = [*leases, *starting]
        ready: list[Any] = []
        if waiting:
            ready, _ = self._ray.wait(waiting, num_returns=1, timeout=timeout, fetch_local=False)
            if ready:  # and all the others that are there already
                ready, _ = self._ray.wait(waiting, num_returns=len(waiting), timeout=0, fetch_local=False)
        else:
            time.sleep(timeout)
        answers: list[tuple[str, Answer]] = []
        for reference in ready:
            if reference in starting:
                self._joins(starting[reference])
            elif reference in leases and leases[reference].lease.id in self._running:
                answers.extend(self._take(leases[reference]))
        for name in self._schedule.expired(time.monotonic()):
            self._lost(name, "it did not answer in time and was ended", blame=True)
        self._check_starved()
        return answers

    def _take(self, running: Running) -> list[tuple[str, Answer]]:
        """Take in the answers of a lease, or the death of its worker."""
        lease = running.lease
        try:
            answers: list[Answer] = self._ray.get(running.answers)
        except self._ray.exceptions.RayTaskError as error:  # the call itself failed: what was sent cannot be read there
            del self._running[lease.id]
            now = time.monotonic()
            for piece in running.pieces:
                self._schedule.failed(lease.id, piece, error, now)
            return [(piece.key, Answer(None, error, now - lease.since, {})) for piece in running.pieces]
        except self._ray.exceptions.RayError as error:
            self._died(lease, error)
            return []
        del self._running[lease.id]
        now, taken = time.monotonic(), []
        for index, (piece, answer) in enumerate(zip(running.pieces, answers, strict=True)):
            if answer.error is None:
                self._schedule.finished(lease.id, piece, answer.evaluations, now, answer.seconds)
            else:
                self._schedule.failed(lease.id, piece, answer.error, now, final=isinstance(answer.error, EvomemError))
            unit, _ = self._units.add_seconds(piece.key, answer.seconds)
            for key, size in answer.sizes.items() if unit is not None else ():
                # The entry's index is part of what is offered: one object holds the readings of all its orders.
                if unit is not None and self._directory.add(affinity(unit), key, (running.read, index, key), size):
                    self._schedule.read(affinity(unit))
            taken.append((piece.key, answer))
        return taken

    # ---- workers that come and go -----------------------------------------------------------------------------------

    def _start(self) -> None:
        self._started += 1
        actor = self._actor.remote([self._parts], self._build, self._threads)
        self._members[f"w{self._started}"] = Member(actor, actor.where.remote())

    def _joins(self, name: str) -> None:
        """Let a worker that is ready begin, or take note that it could not start."""
        member = self._members[name]
        try:
            facts = self._ray.get(member.ready)
        except self._ray.exceptions.RayError as error:
            del self._members[name]
            self._not_started(name, error)
            return
        self._failed_starts.joined()
        member.node, member.pid, member.host = facts["node"], facts["pid"], facts["host"]
        self._joined.add(name)
        self._schedule.join(name, member.node)

    def _not_started(self, name: str, error: Exception) -> None:
        """Try another one, or go on with the others; without any, give up."""
        cause, reason, now = _cause(error), _reason(error), time.monotonic()
        if self._was_ended(error):
            what, again, tries = "was lost while it started", self._failed_starts.ended(now), self._failed_starts.kills
        else:
            if isinstance(cause, EvomemError) and not self._joined:
                raise cause from error
            what, again, tries = "could not start", self._failed_starts.raised(now), self._failed_starts.errors
        if again:
            self._report(f"worker {name} {what}: {reason}. Another one is started")
        elif left := len(self._members) + self._failed_starts.waiting:
            self._report(f"worker {name} {what}: {reason}. The run goes on with {left}")
        else:
            raise WorkerError(
                f"{tries} workers in a row could not start; the last one: {reason}. What is finished is kept: mend "
                "the cause and resume the run, or resume with --workers 0"
            ) from error

    def _was_ended(self, error: Exception) -> bool:
        """Tell whether a worker's process or machine ended, from whether its own code raised."""
        ways = (
            getattr(self._ray.exceptions, name)
            for name in ("RayActorError", "WorkerCrashedError", "NodeDiedError", "OutOfMemoryError")
        )
        return isinstance(error, tuple(ways)) and not getattr(error, "actor_init_failed", False)

    def _died(self, lease: Lease, error: Exception) -> None:
        """Take note of a worker's death, and decide whether what it did may be the cause."""
        member = self._members[lease.worker]
        reason = _reason(error)
        gone = "node has died" in str(error) or self._connection.node_is_dead(member.node)
        # Found dead at once, or out of reach, as a machine is that has just died: not the work's fault, so far.
        first = self._running[lease.id].pieces[0].key
        unreachable = isinstance(error, self._ray.exceptions.ActorUnavailableError)
        doubtful = unreachable or time.monotonic() - lease.since < QUICK
        if gone and member.node == self._connection.node:
            message = "Ray has ended on this machine. What is finished is kept: resume the run"
            self._report(message)  # now, for Ray will soon end this process without a word
            raise WorkerError(message)
        if doubtful and not gone:
            self._doubts[first] = self._doubts.get(first, 0) + 1
            doubtful = self._doubts[first] <= STARTS
        if gone or unreachable:
            reason = f"its machine {member.host} is {'gone' if gone else 'out of reach'}"
        self._lost(lease.worker, reason, blame=not (gone or doubtful))

    def _lost(self, name: str, reason: str, *, blame: bool) -> None:
        """Drop a worker, give its work to others, and start another one in its place."""
        member = self._members.pop(name)
        self._joined.discard(name)
        with contextlib.suppress(Exception):  # it may live on, out of reach
            self._ray.kill(member.actor, no_restart=True)
        for number in [n for n, running in self._running.items() if running.lease.worker == name]:
            del self._running[number]
        self._schedule.leave(name, time.monotonic(), blame=blame, reason=reason)
        self._report(f"worker {name} (process {member.pid}) is lost: {reason}. Its work is done by another one")
        self._start()

    def _check_starved(self) -> None:
        """Give up if there has been no worker for long: the cluster has no room, or no machine, for any."""
        now = time.monotonic()
        if self._joined:
            self._starved_since = None
            return
        if self._starved_since is None:
            self._starved_since = now
        elif now - self._starved_since > STARVED:
            raise WorkerError(
                f"for {STARVED:.0f} seconds there was no worker, and none could be started: the cluster has no room "
                "for one. What is finished is kept: add machines and resume the run"
            )


def _policy(attempts: int, timeout: float | None) -> Policy:
    if timeout is None:
        return Policy(attempts=attempts)
    return Policy(attempts=attempts, hang=0.0, hang_floor=timeout, hang_first=timeout)


def _cause(error: BaseException) -> BaseException:
    """Return what a worker raised, from inside what Ray makes of it."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def _reason(error: BaseException) -> str:
    """Return Ray's long message in one line: what matters is how the process ended."""
    if type(error).__name__ == "OutOfMemoryError":
        return "the memory of its machine was full, and Ray ended it"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in lines:
        if "connection error code" in line:  # all that Ray knows of a process that ended without a word
            return "its process ended unexpectedly (killed, out of memory, or crashed)"
        if "Worker exit detail:" in line:
            return line.split("Worker exit detail:", 1)[1].split("Some common causes", 1)[0].strip().rstrip(".")
    return lines[-1][:300] if lines else type(error).__name__


def _nbytes(parts: Any) -> int:
    """Bytes of all arrays in nested containers."""
    if isinstance(parts, np.ndarray):
        return parts.nbytes
    if isinstance(parts, dict):
        return sum(map(_nbytes, parts.values()))
    return sum(map(_nbytes, parts)) if isinstance(parts, list | tuple) else 0
