"""The conformance kit on pair memories, with every kind of manager; and memories that are wrong are found out."""

from __future__ import annotations

import pytest
import torch

from evomem.errors import ConfigError
from evomem.managers import build
from evomem.memory.explicit import ExplicitCache, PairMemory
from evomem.testing.comparing import ConformanceError
from evomem.testing.memories import CHECKS, Subject

ROWS, HEADS, TOKENS, DIM, NAMES = 3, 2, 30, 6, 20

MANAGERS = (
    "random",
    "streaming_llm",
    "knorm",
    "h2o",
    "lru(allocation=by_distinct_rate(window=4))",
    "snapkv(window=4)",
    "tova",
    "keydiff",
    "feature_scorer(features=['recency','frequency','frequency_decayed:8','relevance:4','novelty','surprise'],sinks=0)",
    "feature_scorer(features=['recency', 'age'], allocation=across_heads, sinks=0, recent=1)",
    "kv_policy(features=['ghost_frequency', 'backward_distance:16'], allocation=across_heads, recent=1)",
    "lava(window=4)",
    "kv_policy(features=['recency', 'relevance:4'])",
)


def text():
    """Return what every row reads."""
    draw = torch.Generator().manual_seed(0)
    table = torch.randn(NAMES, DIM, generator=draw)
    names = torch.randint(0, NAMES, (ROWS, HEADS, TOKENS), generator=draw)
    values = torch.randn(ROWS, HEADS, TOKENS, DIM, generator=draw)
    return {"keys": table[names], "values": values, "names": names}


TEXT = text()


def subject(memory=PairMemory, **options):
    def make(policy):
        return ExplicitCache([memory(observes=policy.observes, **options)], policy)

    def feed(cache, rows, begin, end):
        part = {name: tensor[list(rows), :, begin:end] for name, tensor in TEXT.items()}
        cache.layers[0].feed(**part, absent=cache.layers[0].beta is None)

    return Subject(make, feed, ROWS, TOKENS)


BY_NAME = "ghost_frequency"
"""Observed only where keys have names, by which they are read."""
BY_SOFTMAX = ("snapkv(window=4)", "tova", "lava(window=4)")
"""Managers that look at the attention of the last queries, which there is where reads are a softmax."""


@pytest.mark.parametrize("spec", MANAGERS, ids=[spec.partition("(")[0] for spec in MANAGERS])
@pytest.mark.parametrize("beta", [None, 2.0], ids=["by name", "softmax"])
def test_a_pair_memory_conforms(beta, spec):
    if beta is None and spec in BY_SOFTMAX:
        with pytest.raises(ConfigError, match="needs reads that are one softmax over all slots"):
            subject().make(build(spec, budget=6))
        return
    if beta is not None and BY_NAME in spec:
        with pytest.raises(ConfigError, match="needs reads by name"):
            subject(beta=beta).make(build(spec, budget=6))
        return
    for check in CHECKS.values():
        check(subject(beta=beta), build(spec, budget=6))


class Forgetful(PairMemory):
    """Keeps the right slots, and what was observed of others."""

    def keep(self, mask):
        super().keep(mask)
        self.recorder.slotwise = {n: t.flip(2) for n, t in self.recorder.slotwise.items()}
        self.recorder.flat = {n: t.flip(0) for n, t in self.recorder.flat.items()}


class Impatient(PairMemory):
    """Lets a token read its own pair where tokens come in pieces."""

    def feed(self, keys, values, names, **options):
        read = super().feed(keys, values, names, **options)
        if names.shape[2] > 1:
            self.recorder.slotwise = {n: t + 1 for n, t in self.recorder.slotwise.items()}
        return read


class Shared(PairMemory):
    """Copies of it share what they count."""

    def clone(self):
        other = super().clone()
        other.recorder = self.recorder
        return other


@pytest.mark.parametrize(("memory", "check"), [(Forgetful, "keep"), (Impatient, "pieces"), (Shared, "state")])
def test_a_wrong_memory_is_found_out(memory, check):
    manager = build("feature_scorer(features=['recency', 'frequency'], sinks=0, recent=1)", budget=6)
    with pytest.raises(ConformanceError):
        CHECKS[check](subject(memory), manager)
