"""Workers: leases that run for too long: which one is duplicated next, and after how long one is taken for hanging."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from evomem.workers.durations import WINDOW, Durations
from evomem.workers.messages import Policy
from evomem.workers.records import Running, Work


class Stragglers:
    """Compares running leases with how long finished pieces took.

    Parameters
    ----------
    policy : when a lease is duplicated, and when it hangs.
    leases : those that run, by id; the schedule's own, which change.
    durations : of finished pieces.
    """

    def __init__(self, policy: Policy, leases: Mapping[int, Running], durations: Durations) -> None:
        self._policy, self._leases, self._durations = policy, leases, durations
        self._candidates: list[tuple[float, int]] = []  # heap (since, lease); those that may not are thrown away

    def add(self, running: Running) -> None:
        """Take note that a lease may be duplicated from now on."""
        heapq.heappush(self._candidates, (running.lease.since, running.lease.id))

    def next(self) -> tuple[float, Running, Work] | None:
        """Return when (seconds) the next lease is to be duplicated, which, and the piece on which it is stuck."""
        median = self._durations.median
        if median is None or len(self._durations) < min(len(self._leases), WINDOW):
            return None
        while self._candidates:
            since, number = self._candidates[0]
            running = self._leases.get(number)
            if running is not None and (work := self._stuck(running)) is not None:
                return since + self._policy.straggler * median * len(running.lease.pieces), running, work
            heapq.heappop(self._candidates)
        return None

    def _stuck(self, running: Running) -> Work | None:
        """Return the first piece of a lease that may have a further copy, if the lease is the newest that does it."""
        for work in running.left.values():
            if not work.closed and len(work.leases) < self._policy.copies and running.lease.id == max(work.leases):
                return work
        return None

    @property
    def hang_limit(self) -> float:
        """Seconds a piece may take before its worker is taken for hanging."""
        if self._durations.longest is None:
            return self._policy.hang_first
        return max(self._policy.hang_floor, self._policy.hang * self._durations.longest)
