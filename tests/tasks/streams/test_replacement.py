"""Replacement policies of the library equal slow ones; Belady's bound equals the best of all ways, tried out."""

from __future__ import annotations

import numpy as np
import pytest

from evomem.errors import MissingPackagesError, TaskError, UnknownNameError
from evomem.installing import installed
from evomem.tasks import Split, build
from evomem.tasks.streams.base import Stream
from evomem.tasks.streams.replacement import FEWEST_SLOTS, POLICIES, READ_ONLY, belady_hits, hit_rate, hits
from tests.support.slow_replacement import fifo, most_hits, relevance, replay
from tests.support.toy_tokenizer import ToyTokenizer

PACKAGED = {"fifo": "FIFOCache", "lru": "LRUCache", "lfu": "LFUCache"}
needs_library = pytest.mark.skipif(not installed("libcachesim"), reason="pip install --no-deps libcachesim")
SLOW = {"fifo": fifo, "lru": relevance(0, 1), "lfu": relevance(1, 0)}


def stream_of(ids, reads=None, writes=None) -> Stream:
    ids = np.array(ids, np.int64)
    reads, writes = (np.ones(len(ids), bool) if part is None else np.array(part, bool) for part in (reads, writes))
    empty = np.zeros((len(ids), 2), np.float32)
    return Stream(ids, ids, reads, writes, ~reads & ~reads, empty, empty)


def whole(spec, n=2):
    task = build(spec, ToyTokenizer())
    return [task.stream(sample) for sample in task.samples(Split.TRAIN, n, 0)]


def packaged(stream, policy, slots):
    """Which reads the package cachetools answers."""
    cache = getattr(pytest.importorskip("cachetools"), PACKAGED[policy])(slots)
    answered = []
    for item, read, write in zip(stream.ids.tolist(), stream.reads, stream.writes, strict=True):
        answered.append(bool(read) and item in cache)
        if item in cache:
            cache[item]
        elif write:
            cache[item] = 0
    return answered


WHOLE = ["zipf:length=1200", "context_switches:length=1200,filler=0.2", "key_overwrites"]


@pytest.mark.parametrize("library", [packaged, pytest.param(hits, marks=needs_library)])
@pytest.mark.parametrize("spec", WHOLE)
@pytest.mark.parametrize("policy", READ_ONLY)
def test_relevance_of_one_part_is_lfu_and_lru_on_whole_streams(policy, spec, library):
    """R = 1·frequency is LFU and R = 1·recency is LRU, request for request, as two libraries have them."""
    for stream in whole(spec):
        for slots in (1, 8, 32):
            assert list(library(stream, policy, slots)) == replay(stream, SLOW[policy], slots)


@needs_library
@pytest.mark.parametrize("policy", READ_ONLY)
def test_the_librarys_policies_equal_slow_ones(policy):
    """Requests that only read, that only write, and that do both, mixed by chance."""
    for seed in range(60):
        draw = np.random.default_rng(seed)
        what = draw.integers(3, size=60)
        stream = stream_of(draw.integers(10, size=60), what != 0, what != 1)
        slots = int(draw.integers(1, 7))
        assert hits(stream, policy, slots).tolist() == replay(stream, SLOW[policy], slots), seed


@pytest.mark.parametrize("bypass", [False, True])
def test_beladys_bound_is_the_best_of_all_ways(bypass):
    for seed in range(150):
        draw = np.random.default_rng(seed)
        ids, reads = draw.integers(5, size=14), draw.random(14) < draw.random()
        slots = int(draw.integers(1, 4))
        answered = belady_hits(stream_of(ids, reads), slots, bypass)
        assert answered.sum() == most_hits(ids.tolist(), reads.tolist(), slots, bypass), seed


@needs_library
def test_no_policy_is_above_the_bound_and_refusing_helps_the_bound():
    for stream in whole("zipf:length=1500"):
        for slots in (4, 32):
            forced, free = (hit_rate(stream, belady_hits(stream, slots, bypass)) for bypass in (False, True))
            chosen = [policy for policy in POLICIES if slots >= FEWEST_SLOTS.get(policy, 1)]
            rates = {policy: hit_rate(stream, hits(stream, policy, slots)) for policy in chosen}
            assert 0 < min(rates.values()) <= max(rates.values()) < forced < free < 1 - stream.distinct_rate + 1e-9


@needs_library
def test_what_has_no_meaning_is_refused(monkeypatch):
    (stream,) = whole("key_overwrites", 1)
    for policy in set(POLICIES) - set(READ_ONLY):
        with pytest.raises(TaskError, match="take one of fifo, lru, lfu"):
            hits(stream, policy, 32)
    with pytest.raises(TaskError, match="Belady's bound: the stream reads items that cannot be fetched"):
        belady_hits(stream, 8)
    with pytest.raises(TaskError, match="0 slots; give 1 or more"):
        belady_hits(stream, 0)
    for policy, fewest in FEWEST_SLOTS.items():
        assert hits(whole("zipf:length=500", 1)[0], policy, fewest).any()  # the library would say nothing of fewer
        with pytest.raises(TaskError, match=f"{policy} with {fewest - 1} slots; give {fewest} or more"):
            hits(stream, policy, fewest - 1)
    with pytest.raises(UnknownNameError, match="Did you mean 'lru'"):
        hits(stream, "lruu", 8)
    monkeypatch.setattr("evomem.installing.installed", lambda package: False)
    with pytest.raises(MissingPackagesError, match="pip install --no-deps libcachesim"):
        hits(stream, "lru", 8)
