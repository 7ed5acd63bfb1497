"""Workers: a schedule's own records of work, jobs, leases and workers; they change as things happen."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from evomem.workers.messages import Job, Lease, Piece

_AFFINITIES = 4
"""Contexts that a worker is expected to hold: the last ones that it used."""


@dataclass(eq=False, slots=True)
class Work:
    """A piece and what has happened to it; unless it is closed, it waits or runs.

    Attributes
    ----------
    piece, affinity : what, and which context it reads.
    alone : it is never sent together with others, so that a death has one suspect.
    deaths : of its workers, while it ran alone.
    tries : how often it raised.
    leases : ids of the leases under which it runs now.
    waiting : it is in the queue.
    closed : nothing more is to be done for it.
    rank : its place in the queue.
    """

    piece: Piece
    affinity: str
    alone: bool = False
    deaths: int = 0
    tries: int = 0
    leases: set[int] = field(default_factory=set)
    waiting: bool = False
    closed: bool = False
    rank: int = 0


@dataclass(eq=False, slots=True)
class State:
    """A job that is not over: the whole, and its candidates once it is taken apart."""

    job: Job
    whole: Work
    first_lease: int
    parts: list[Work] | None = None
    values: dict[int, Any] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Running:
    """A lease, what is left of it, the contexts that are read for it, and when it was last heard of (seconds)."""

    lease: Lease
    left: dict[Piece, Work]
    reads: set[str]
    heard: float


@dataclass(eq=False, slots=True)
class Worker:
    """A worker: where it is, what it does, and the affinities whose contexts it holds."""

    node: str
    lease: Running | None = None
    known: deque[str] = field(default_factory=lambda: deque(maxlen=_AFFINITIES))

    def holds(self, affinity: str) -> None:
        """Take note that it has just used a context."""
        if affinity in self.known:
            self.known.remove(affinity)
        self.known.append(affinity)
