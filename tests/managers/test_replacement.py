"""LRU, LFU and FIFO deciding about a memory of pairs answer, read for read, what those caches answer."""

from __future__ import annotations

import pytest
import torch

from evomem.managers import build
from evomem.memory.explicit import ExplicitCache, PairMemory
from evomem.tasks import Split
from evomem.tasks import build as build_task
from tests.support.slow_replacement import fifo, relevance, replay
from tests.support.toy_tokenizer import ToyTokenizer

LENGTH, SLOTS = 250, 12
EQUAL = {
    "fifo": fifo,
    "lru": relevance(0, 1),
    "lfu": relevance(1, 0),
    "slot_relevance(frequency=0, recency=1)": relevance(0, 1),
    "slot_relevance(frequency=1, recency=0)": relevance(1, 0),
    "slot_relevance(frequency=3, recency=0)": relevance(1, 0),
}


@pytest.fixture(scope="module")
def streams():
    specs = [f"zipf:length={LENGTH},keys=60", f"context_switches:length={LENGTH},keys=60,dwell=20"]
    tasks = [build_task(spec, ToyTokenizer()) for spec in specs]
    return [task.stream(task.samples(Split.TRAIN, 1, 0)[0]) for task in tasks]


@pytest.mark.parametrize("spec", EQUAL)
def test_hits_equal_those_of_the_cache(spec, streams):
    """Streams are rows of one memory, which decides after every request; R with one weight is LFU, or LRU."""
    manager = build(spec, budget=SLOTS)
    memory = PairMemory(observes=manager.observes)
    cache = ExplicitCache([memory], manager)
    keys = torch.stack([torch.from_numpy(stream.keys) for stream in streams])[:, None]
    names = torch.stack([torch.from_numpy(stream.ids) for stream in streams])[:, None]
    hits = []
    for step in range(LENGTH):
        one = slice(step, step + 1)
        read = memory.feed(keys[:, :, one], keys[:, :, one], names[:, :, one], absent=True)
        hits.append(read.hit[:, 0, 0])
        cache.decide()
        assert int(memory.counts().max()) <= SLOTS
    for row, stream in zip(torch.stack(hits, 1).tolist(), streams, strict=True):
        assert row == replay(stream, EQUAL[spec], SLOTS)
        assert 0.2 < sum(row) / LENGTH < 0.9
