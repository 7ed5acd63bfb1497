"""Workers: what a schedule is told and says: jobs, leases, results, and the policy that it follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Job:
    """One unit of work.

    Attributes
    ----------
    key : unique among the jobs whose results have not been collected.
    candidates : how many candidates it evaluates, at least 1.
    affinity : jobs of equal affinity read the same context; "": nothing is shared.
    """

    key: str
    candidates: int
    affinity: str


@dataclass(frozen=True)
class Piece:
    """What is sent to a worker.

    Attributes
    ----------
    key : the job's.
    candidate : None: the whole job; i: its candidate i alone.
    """

    key: str
    candidate: int | None = None


@dataclass(frozen=True)
class Lease:
    """Pieces given to a worker.

    Attributes
    ----------
    id : counted from 0.
    worker : its name.
    pieces : usually one; several where they are short.
    since : seconds; the `now` at which it was given.
    duplicate : it is a straggler's second copy.
    """

    id: int
    worker: str
    pieces: tuple[Piece, ...]
    since: float
    duplicate: bool


@dataclass(frozen=True)
class Policy:
    """When to try again, to duplicate, to give up.

    Attributes
    ----------
    attempts : how often a piece that raises is tried.
    deaths : deaths of its workers after which a job is taken apart into its candidates, and after which one of these,
        alone, is quarantined. A job of one candidate goes the same way.
    straggler : the lease that has waited longest for a copy is duplicated when it has run longer than this times the
        median duration of finished pieces, a worker idles, nothing waits, and at least as many pieces have finished as
        leases run (the first to finish are the short ones: their median says little).
    copies : at most so many leases of a piece at a time. Every further copy waits as long as the second: copies
        straggle, too, and a generation waits for the last of its thousands of pieces.
    hang : a lease that has run longer than this times the longest duration so far is given up.
    hang_floor : but not before so many seconds.
    hang_first : the same limit in seconds as long as nothing has finished.
    batch_seconds : pieces shorter than this are sent several at a time: as many as fill it by the median duration, but
        at most half of a worker's even share of what waits, or the whole share if it takes no longer than this.
    """

    attempts: int = 2
    deaths: int = 3
    straggler: float = 1.5
    copies: int = 4
    hang: float = 20.0
    hang_floor: float = 120.0
    hang_first: float = 3600.0
    batch_seconds: float = 0.1


@dataclass(frozen=True)
class Quarantined:
    """A candidate that killed its worker too often.

    Attributes
    ----------
    candidate : its index in the job.
    deaths : of its workers, while it ran alone.
    reason : the last one.
    """

    candidate: int
    deaths: int
    reason: str


@dataclass(frozen=True)
class Result:
    """The final word on a job.

    Attributes
    ----------
    key : the job's.
    value : what `Schedule.finished` was given; of a job that was taken apart: a list with one entry per candidate, its
        value or a `Quarantined`; None if there is an error.
    error : the last one, after all attempts.
    isolated : whether the job was taken apart and `value` or `error` comes from its candidates (the whole job's result,
        if it comes late but before theirs, is as good as ever).
    """

    key: str
    value: Any
    error: Exception | None
    isolated: bool


@dataclass(frozen=True)
class Stats:
    """What was counted so far.

    Attributes
    ----------
    finished : pieces whose result was taken.
    dropped : results that came when there was one already, or when the job was over.
    deaths : workers that left with blame.
    requeued : pieces that had begun and had to wait again, or were taken apart.
    duplicates : leases that were second copies.
    quarantined : candidates, in final results.
    wasted_seconds : of leases whose result was dropped, that raised, or that died (even if their result came late).
    """

    finished: int = 0
    dropped: int = 0
    deaths: int = 0
    requeued: int = 0
    duplicates: int = 0
    quarantined: int = 0
    wasted_seconds: float = 0.0
