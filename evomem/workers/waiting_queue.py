"""Workers: the pieces of work that wait for a worker, found by what has to be read for them."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Iterable

from evomem.workers.records import Work


class _Group:
    """The waiting pieces of one affinity, in order of rank, and how many workers read its context now."""

    __slots__ = ("readers", "works")

    def __init__(self) -> None:
        self.works: deque[Work] = deque()
        self.readers = 0

    def head(self) -> Work | None:
        while self.works and not self.works[0].waiting:  # closed while they waited
            self.works.popleft()
        return self.works[0] if self.works else None


class Queue:
    """Waiting pieces. Every operation takes O(log n) steps, amortised, whatever the number of pieces and workers.

    What comes back goes before everything else. Then a worker is given what it can begin without reading (rule 1), then
    what nobody is reading (2), then anything (3); among equals in order of adding.

    The groups of rules 1 to 3 lie in three heaps by the rank of their first piece. An entry is true as long as the
    group is still of that rule and the piece still its first; others are thrown away when they come up.
    """

    def __init__(self) -> None:
        self._back = itertools.count()
        self._front = itertools.count(-1, -1)
        self._returned: deque[Work] = deque()
        self._groups: dict[str, _Group] = {}
        self._read = {""}
        self._heaps: tuple[list[tuple[int, str]], ...] = ([], [], [])
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, work: Work) -> None:
        """Add new work behind all other."""
        work.rank = next(self._back)
        self._count += 1
        work.waiting = True
        self._groups.setdefault(work.affinity, _Group()).works.append(work)
        self._index(work.affinity)

    def insert(self, works: Iterable[Work]) -> None:
        """Add new work, in this order, before all of its affinity."""
        for work in reversed(list(works)):
            work.rank = next(self._front)
            self._count += 1
            work.waiting = True
            self._groups.setdefault(work.affinity, _Group()).works.appendleft(work)
            self._index(work.affinity)

    def give_back(self, work: Work) -> None:
        """Add work that had begun already: it goes before everything else."""
        self._count += 1
        work.waiting = True
        self._returned.append(work)

    def remove(self, work: Work) -> None:
        """Take or forget waiting work; work that does not wait is left alone."""
        if work.waiting:
            work.waiting = False
            self._count -= 1
            self._clear()
            self._index(work.affinity)

    def first(self, known: Iterable[str]) -> Work | None:
        """Return what a worker should do next, without taking it; None: nothing waits.

        Parameters
        ----------
        known : affinities that the worker has read itself.
        """
        self._clear()
        if self._returned:
            return self._returned[0]
        own = (self._groups[affinity].head() for affinity in known if affinity in self._groups)
        ready = [work for work in (*own, self._top(0)) if work is not None]
        if ready:
            return min(ready, key=lambda work: work.rank)
        return self._top(1) or self._top(2)

    def is_read(self, affinity: str) -> bool:
        """Say whether an affinity's context is there for everybody."""
        return affinity in self._read

    def read(self, affinity: str) -> None:
        """Take note that a context is there for everybody."""
        self._read.add(affinity)
        self._index(affinity)

    def reading(self, affinity: str, change: int) -> None:
        """Take note that one worker more (1) or less (-1) reads a context now."""
        self._groups.setdefault(affinity, _Group()).readers += change
        self._index(affinity)

    def _clear(self) -> None:
        while self._returned and not self._returned[0].waiting:
            self._returned.popleft()

    def _index(self, affinity: str) -> None:
        group = self._groups.get(affinity)
        if group is None:
            return
        head = group.head()
        if head is not None:
            heapq.heappush(self._heaps[self._rule(affinity)], (head.rank, affinity))
        elif not group.readers:
            del self._groups[affinity]

    def _rule(self, affinity: str) -> int:
        if affinity in self._read:
            return 0
        return 2 if self._groups[affinity].readers else 1

    def _top(self, rule: int) -> Work | None:
        heap = self._heaps[rule]
        while heap:
            rank, affinity = heap[0]
            group = self._groups.get(affinity)
            head = group.head() if group else None
            if head is not None and head.rank == rank and self._rule(affinity) == rule:
                return head
            heapq.heappop(heap)
        return None
