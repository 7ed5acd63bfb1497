"""Task: which reads of a stream a replacement policy answers: the field's policies by a library, and Belady's bound.

The library is libCacheSim (Yang et al., https://libcachesim.com), of whose package nothing but the simulator is used:
``pip install --no-deps libcachesim``. Its licence is the GPL; evomem does not contain it, and only tables and tests
call it. Its policies keep one pair an item, so that a new value takes the old one's place.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Any

import numpy as np

from evomem.errors import TaskError, UnknownNameError
from evomem.installing import require
from evomem.tasks.streams.base import Bools, Ints, Stream

POLICIES: Mapping[str, str] = {
    "fifo": "FIFO",
    "lru": "LRU",
    "lfu": "LFU",
    "arc": "ARC",
    "sieve": "Sieve",
    "s3fifo": "S3FIFO",
    "lirs": "LIRS",
    "2q": "TwoQ",
    "lru2": "LRUK",
    "wtinylfu": "WTinyLFU",
}
"""Policies by name, and what the library calls them. Its random policy is left out: it has no seed."""
SETTINGS: Mapping[str, Mapping[str, float]] = {"wtinylfu": {"window_size": 0.2}}
"""Settings other than the library's. Its window of W-TinyLFU (Einziger et al. 2017) has 1 % of the slots, none of fewer
than 100; of .07, .1, .2 and .5 a window of .2 hits most often on training streams of zipf with 16 to 64 slots."""
READ_ONLY = ("fifo", "lru", "lfu")
"""Policies whose state after a read that stores nothing is beyond doubt."""
FEWEST_SLOTS = {"s3fifo": 20, "wtinylfu": 6}
"""Of policies that divide their slots; with fewer the library answers no read, or ends the process."""
INSTALL = {"libcachesim": "pip install --no-deps libcachesim"}


def hits(stream: Stream, policy: str, slots: int) -> Bools:
    """Return which requests of a stream a policy answers, (requests,) bool; what is no read is False.

    A pair that is there to be stored is always stored. Ties: ``lfu`` evicts, of the items that were asked for least
    often since they were stored, the one that was asked for longest ago.

    Parameters
    ----------
    policy : one of `POLICIES`.
    slots : pairs that are kept, 1 or more.

    Raises
    ------
    MissingPackagesError : the library is not installed.
    UnknownNameError : there is no such policy.
    TaskError : too few slots; or the stream reads without storing, and the policy is none of `READ_ONLY`.
    """
    if policy not in POLICIES:
        raise UnknownNameError("replacement policy", policy, list(POLICIES))
    _check(policy, slots, FEWEST_SLOTS.get(policy, 1))
    if policy not in READ_ONLY and np.any(stream.reads & ~stream.writes):
        raise TaskError(
            f"replacement policy {policy}: the stream reads items that cannot be fetched, which it is not made for; "
            f"take one of {', '.join(READ_ONLY)}"
        )
    require([("libcachesim", f"replacement policy {policy}")], INSTALL)
    import libcachesim

    cache: Any = getattr(libcachesim, POLICIES[policy])(
        cache_size=slots,
        hashpower=slots.bit_length() + 8,  # the library's own table has 2^24 entries, a quarter of a second to set up
        **SETTINGS.get(policy, {}),
    )
    request: Any = libcachesim.Request()
    request.obj_size = 1
    answered = np.zeros(len(stream), bool)
    for number, (item, write) in enumerate(zip(stream.ids.tolist(), stream.writes.tolist(), strict=True)):
        request.obj_id = item
        answered[number] = cache.get(request) if write else cache.find(request, True) is not None
    return answered & stream.reads


def belady_hits(stream: Stream, slots: int, bypass: bool = True) -> Bools:
    """Return which requests the best possible policy answers, that knows the future (Belady 1966), (requests,) bool.

    What is read next the latest leaves, of all pairs in memory and the one that arrives. Keeping a pair up to its next
    read is an interval that gives one hit; of intervals with a limit to how many overlap, dropping the one that ends
    last leaves the most.

    Parameters
    ----------
    slots : pairs that are kept, 1 or more.
    bypass : the pair that arrives need not be stored: the bound for managers that may refuse. False: it is stored.

    Raises
    ------
    TaskError : no slots; or the stream reads without storing, where this rule is not the best.
    """
    _check("Belady's bound", slots)
    if np.any(stream.reads & ~stream.writes):
        raise TaskError("Belady's bound: the stream reads items that cannot be fetched, where his rule is not the best")
    ids, next_read = stream.ids.tolist(), _next_reads(stream).tolist()
    stored: dict[int, int] = {}
    furthest: list[tuple[int, int]] = []
    answered = np.zeros(len(stream), bool)

    def evict() -> None:
        while True:
            when, item = heapq.heappop(furthest)
            if stored.get(item) == -when:
                del stored[item]
                return

    for number, item in enumerate(ids):
        answered[number] = item in stored
        if not bypass and item not in stored and len(stored) == slots:
            evict()
        stored[item] = next_read[number]
        heapq.heappush(furthest, (-next_read[number], item))
        if len(stored) > slots:
            evict()
    return answered & stream.reads


def hit_rate(stream: Stream, answered: Bools) -> float:
    """Return the share of a stream's reads that were answered."""
    return float(answered[stream.reads].mean())


def _next_reads(stream: Stream) -> Ints:
    """Return the next request of the same item, (requests,); their number if it is none, or no read."""
    never = len(stream)
    following = np.full(never, never, np.int64)
    latest: dict[int, int] = {}
    reads = stream.reads.tolist()
    for number in range(never - 1, -1, -1):
        item = int(stream.ids[number])
        after = latest.get(item, never)
        following[number] = after if after < never and reads[after] else never
        latest[item] = number
    return following


def _check(what: str, slots: int, fewest: int = 1) -> None:
    if slots < fewest:
        raise TaskError(f"{what} with {slots} slots; give {fewest} or more")
