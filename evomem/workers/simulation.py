"""Workers: a cluster that is not there: virtual workers and a virtual clock around the real scheduling core.

`simulate` drives `Schedule` exactly as a pool does, with a heap of events instead of processes, so that its decisions
can be judged for more workers than anybody has at hand.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from evomem.errors import EvomemError
from evomem.workers.schedule import Job, Lease, Piece, Policy, Quarantined, Schedule, Stats


@dataclass(frozen=True)
class Cluster:
    """What the workers and the driver are like. The defaults are a guess at one large model per GPU.

    Attributes
    ----------
    reading_seconds : of reading a sample's context (thousands of tokens), once per worker and sample unless the context
        is shared: it is shared as soon as the first result with it has come.
    unit_seconds : of every unit, whatever its size: fetching the context, the question.
    candidate_seconds : of every candidate of a unit. With the others: 10 s for a unit of 32 on a context that was read.
    spread : standard deviation of the logarithm of a unit's time; its mean is not changed by it.
    straggler_share, straggler_factor : so many evaluations of units, anywhere, take so many times longer.
    slow_share : so many workers are always slower, by the same factor.
    failures_per_hour : share of the workers that die; each is back, under a new name, after `back_seconds`, and noticed
        after `notice_seconds`.
    turnover_per_hour : share of the workers that leave, and share that joins.
    message_seconds : of the driver, which does one thing at a time, for giving out a lease and taking a result.
    step_seconds : of `tell` and `ask` between two generations.
    """

    reading_seconds: float = 3.0
    unit_seconds: float = 0.4
    candidate_seconds: float = 0.3
    spread: float = 0.3
    straggler_share: float = 0.05
    straggler_factor: float = 10.0
    slow_share: float = 0.0
    failures_per_hour: float = 0.01
    back_seconds: float = 60.0
    notice_seconds: float = 1.0
    turnover_per_hour: float = 0.05
    message_seconds: float = 0.0005
    step_seconds: float = 0.05


@dataclass(frozen=True)
class Generation:
    """What a generation evaluates: every candidate on every sample, in units of `chunk` candidates on a sample.

    Every generation has samples of its own, whose contexts have to be read.
    """

    population: int = 256
    samples: int = 64
    chunk: int = 32

    def jobs(self, number: int) -> Iterator[Job]:
        """Yield the jobs of a generation, sample after sample."""
        for sample in range(self.samples):
            for begin in range(0, self.population, self.chunk):
                size = min(self.chunk, self.population - begin)
                yield Job(f"{number}/{sample}/{begin}", size, f"{number}/{sample}")

    @property
    def units(self) -> int:
        """How many jobs a generation has."""
        return self.samples * math.ceil(self.population / self.chunk)


@dataclass(frozen=True)
class Report:
    """What came out.

    Attributes
    ----------
    workers : at the beginning, and about as many ever after.
    generation : what was evaluated.
    generations : how many were run.
    results : how many jobs had a result.
    seconds : virtual time per generation, `tell` and `ask` included.
    utilisation : worker-seconds spent on results that were used, a straggler's in full, over all worker-seconds.
    efficiency : what one undisturbed worker would need that reads every context once and has the whole population as
        one unit per sample, over all worker-seconds: what comparisons between chunks are for.
    wasted : share of all worker-seconds that went into copies that were not used, and into lost work.
    driver : share of the time during which the driver was busy with messages.
    stats : the schedule's.
    """

    workers: int
    generation: Generation
    generations: int
    results: int
    seconds: float
    utilisation: float
    efficiency: float
    wasted: float
    driver: float
    stats: Stats

    @property
    def units_per_worker(self) -> float:
        """Of a generation."""
        return self.generation.units / self.workers

    @property
    def bound(self) -> str:
        """What keeps utilisation below 0.95: the driver (busy for two thirds), too few units, or the last ones."""
        if self.utilisation >= 0.95:
            return ""
        if self.driver > 2 / 3:
            return "driver"
        return "few units" if self.units_per_worker < 8 else "last units"


def simulate(
    workers: int,
    generation: Generation,
    *,
    generations: int = 5,
    cluster: Cluster = Cluster(),
    policy: Policy = Policy(),  # noqa: B008 (frozen)
    seed: int = 0,
) -> Report:
    """Run generations, one after the other, on virtual workers; the same arguments always give the same report.

    Parameters
    ----------
    workers : how many there are in the beginning.
    generation : what every generation evaluates.
    generations : how many.
    cluster : what the workers are like.
    policy : the schedule's.
    seed : of all chance.

    Raises
    ------
    EvomemError : there are no workers or no generations; or the simulation has come to a standstill.
    """
    if workers < 1 or generations < 1:
        raise EvomemError(f"{workers} workers, {generations} generations: both must be at least 1")
    return _Simulation(workers, generation, generations, cluster, policy, seed).run()


@dataclass(eq=False, slots=True)
class _Worker:
    joined: float
    slowness: float = 1.0
    left: float | None = None
    busy: float = 0.0
    since: float | None = None
    holds: list[str] = field(default_factory=list)


class _Simulation:
    def __init__(
        self, workers: int, generation: Generation, generations: int, cluster: Cluster, policy: Policy, seed: int
    ) -> None:
        self._count, self._generation, self._generations, self._cluster = workers, generation, generations, cluster
        self._schedule = Schedule(policy)
        self._random = random.Random(seed)
        self._events: list[tuple[float, int, str, Any]] = []
        self._sequence = self._names = 0
        self._workers: dict[str, _Worker] = {}
        self._now = 0.0  # the driver's clock: when it is free
        self._driver = 0.0
        self._check = math.inf
        self._sizes: dict[str, int] = {}
        self._shared: set[str] = set()
        self._used = 0.0
        self._results = 0

    def run(self) -> Report:
        for _ in range(self._count):
            self._join()
        if self._cluster.turnover_per_hour:
            self._newcomer()
        for number in range(self._generations):
            jobs = list(self._generation.jobs(number))
            self._sizes = {job.key: job.candidates for job in jobs}
            self._schedule.add(jobs)
            self._now += self._cluster.step_seconds
            self._give()
            while not self._schedule.done:
                if not self._events:
                    raise EvomemError(f"nothing happens any more with {self._schedule.pending} pieces waiting")
                self._step()
        return self._report()

    def _report(self) -> Report:
        end = self._now
        alive = sum((end if worker.left is None else worker.left) - worker.joined for worker in self._workers.values())
        busy = sum(
            worker.busy + (end - worker.since if worker.since is not None else 0.0) for worker in self._workers.values()
        )
        generation = self._generation
        once = self._cluster.reading_seconds + self._cost(generation.population)
        plain = self._generations * generation.samples * once
        return Report(
            self._count, generation, self._generations, self._results, end / self._generations,
            self._used / alive, plain / alive, (busy - self._used) / alive, self._driver / end,
            self._schedule.stats,
        )  # fmt: skip

    # ---- events -----------------------------------------------------------------------------------------------------

    def _at(self, time: float, kind: str, what: Any = None) -> None:
        heapq.heappush(self._events, (time, self._sequence, kind, what))
        self._sequence += 1

    def _step(self) -> None:
        time, _, kind, what = heapq.heappop(self._events)
        self._now = max(self._now, time)
        getattr(self, f"_on_{kind}")(time, what)
        for result in self._schedule.results():
            self._results += 1
            self._use(result.value)
        self._give()

    def _on_result(self, time: float, what: tuple[str, Lease, Piece, float]) -> None:
        name, lease, piece, seconds = what
        worker = self._workers[name]
        if worker.left is not None:
            return
        if piece == lease.pieces[-1]:
            worker.busy += time - (worker.since or 0.0)
            worker.since = None
        self._message()
        self._schedule.finished(lease.id, piece, seconds, self._now, seconds)
        sample = piece.key.rpartition("/")[0]
        if sample not in self._shared:
            self._shared.add(sample)
            self._schedule.read(sample)

    def _on_gone(self, time: float, what: tuple[str, bool]) -> None:
        name, blame = what
        worker = self._workers[name]
        worker.left = time
        if worker.since is not None:
            worker.busy += max(0.0, time - worker.since)  # it may die before the driver's message has come
            worker.since = None
        self._at(time + self._cluster.notice_seconds, "noticed", what)
        if blame:
            self._at(time + self._cluster.back_seconds, "join")

    def _on_noticed(self, time: float, what: tuple[str, bool]) -> None:
        name, blame = what
        self._schedule.leave(name, self._now, blame=blame, reason="died")

    def _on_join(self, time: float, what: None) -> None:
        self._join()

    def _on_newcomer(self, time: float, what: None) -> None:
        self._join()
        self._newcomer()

    def _on_check(self, time: float, what: None) -> None:
        if time != self._check:
            return  # an earlier one was asked for meanwhile
        self._check = math.inf
        for name in self._schedule.expired(self._now):
            self._on_gone(self._now, (name, True))

    def _newcomer(self) -> None:
        per_second = self._count * self._cluster.turnover_per_hour / 3600
        self._at(self._now + self._random.expovariate(per_second), "newcomer")

    def _join(self) -> None:
        name = f"worker {self._names}"
        self._names += 1
        slow = self._cluster.slow_share and self._random.random() < self._cluster.slow_share
        self._workers[name] = _Worker(self._now, self._cluster.straggler_factor if slow else 1.0)
        self._schedule.join(name)
        fail, leave = self._cluster.failures_per_hour / 3600, self._cluster.turnover_per_hour / 3600
        if fail + leave:
            blame = self._random.random() < fail / (fail + leave)
            self._at(self._now + self._random.expovariate(fail + leave), "gone", (name, blame))

    # ---- work -------------------------------------------------------------------------------------------------------

    def _give(self) -> None:
        for lease in self._schedule.assign(self._now):
            self._message()
            worker = self._workers[lease.worker]
            if worker.left is not None:
                continue  # dead, and not noticed yet: the message is lost
            worker.since = end = self._now
            for piece in lease.pieces:
                seconds = self._seconds(worker, piece)
                end += seconds
                self._at(end, "result", (lease.worker, lease, piece, seconds))
        check = self._schedule.next_check(self._now)
        if check is not None and self._now + check < self._check:
            self._check = self._now + check
            self._at(self._check, "check")

    def _message(self) -> None:
        self._now += self._cluster.message_seconds / 2
        self._driver += self._cluster.message_seconds / 2

    def _seconds(self, worker: _Worker, piece: Piece) -> float:
        cluster = self._cluster
        sample = piece.key.rpartition("/")[0]
        mean = self._cost(1 if piece.candidate is not None else self._sizes[piece.key])
        if sample not in self._shared and sample not in worker.holds:
            mean += cluster.reading_seconds
            worker.holds = [*worker.holds[-3:], sample]
        seconds = worker.slowness * mean * self._random.lognormvariate(-(cluster.spread**2) / 2, cluster.spread)
        return seconds * (cluster.straggler_factor if self._random.random() < cluster.straggler_share else 1.0)

    def _cost(self, candidates: int) -> float:
        return self._cluster.unit_seconds + candidates * self._cluster.candidate_seconds

    def _use(self, value: Any) -> None:
        parts = value if isinstance(value, list) else [value]
        for part in parts:
            if not isinstance(part, Quarantined):
                self._used += part
