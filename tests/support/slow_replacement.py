"""Replacement in a memory of pairs, one request after another, in plain Python; and the best of all by trying all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache


@dataclass
class Pair:
    """A pair in memory: when it was stored, when it was last asked for or stored, and how often it was asked for."""

    item: int
    stored: int
    used: int
    reads: int = 0


Rank = Callable[[Pair, int], tuple[float, ...]]
"""What a pair is worth at a moment; the lowest leaves."""


def fifo(pair: Pair, now: int) -> tuple[float, ...]:
    return (pair.stored,)


def relevance(frequency: float, recency: float) -> Rank:
    """R = frequency × reads received + recency × (minus the steps since the last use); of equals the staler leaves."""

    def rank(pair: Pair, now: int) -> tuple[float, ...]:
        return (frequency * pair.reads - recency * (now - pair.used), pair.used)

    return rank


def replay(stream, rank: Rank, slots: int) -> list[bool]:
    """Return which requests find their item, where what arrives is always stored and one pair is kept an item."""
    memory: dict[int, Pair] = {}
    answered = []
    for now, (item, read, write) in enumerate(zip(stream.ids, stream.reads, stream.writes, strict=True)):
        pair = memory.get(int(item))
        answered.append(bool(read) and pair is not None)
        if pair is not None:
            pair.reads, pair.used = pair.reads + 1, now
        elif write:
            if len(memory) == slots:
                del memory[min(memory.values(), key=lambda one: rank(one, now)).item]
            memory[int(item)] = Pair(int(item), now, now)
    return answered


def most_hits(ids: list[int], reads: list[bool], slots: int, bypass: bool) -> int:
    """Return the hits of the best of all ways to keep items, by trying all: for short streams."""

    @cache
    def best(now: int, memory: frozenset[int]) -> int:
        if now == len(ids):
            return 0
        item = ids[now]
        hit = int(reads[now] and item in memory)
        choices = [memory] if bypass or item in memory else []
        if item not in memory:
            choices += [memory | {item}] if len(memory) < slots else [memory - {old} | {item} for old in memory]
        return hit + max(best(now + 1, after) for after in choices)

    return best(0, frozenset())
