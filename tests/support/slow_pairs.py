"""A pair memory as lists of Python, token by token: what `evomem.memory.explicit.PairMemory` must equal."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Slot:
    """One pair, and all reads that it has received: (token, weight)."""

    token: int
    name: int
    mark: int
    key: list
    value: list
    error: float
    received: list = field(default_factory=list)
    decay: float = 0.0


class SlowPairs:
    """The pairs of one head of one row."""

    def __init__(self, beta=None):
        self.beta, self.slots, self.seen, self.queries = beta, [], 0, []

    def feed(self, key, value, name, mark, reads, writes, absent):
        """Read, then write; returns (mark that was read or None, values that were read)."""
        named = [slot for slot in self.slots if slot.name == name]
        newest = named[-1] if named else None
        if self.beta is None:
            weights = {} if newest is None else {newest.token: 1.0}
        else:
            logits = [self.beta * dot(key, slot.key) + slot.decay for slot in self.slots]
            total = sum(math.exp(x) for x in logits)
            weights = {slot.token: math.exp(x) / total for slot, x in zip(self.slots, logits, strict=True)}
        predicted = [sum(weights.get(s.token, 0.0) * s.value[i] for s in self.slots) for i in range(len(value))]
        if not reads:
            weights = {}
        for slot in self.slots:
            if slot.token in weights:
                slot.received.append((self.seen, weights[slot.token]))
        if writes and not (absent and newest is not None and newest.mark == mark):
            error = norm([a - b for a, b in zip(value, predicted, strict=True)]) / norm(value)
            self.slots.append(Slot(self.seen, name, mark, key, value, error))
        self.queries.append(key if reads else [0.0] * len(key))
        self.seen += 1
        read = predicted if reads else [0.0] * len(value)
        return (newest.mark if reads and newest is not None else None), read

    def keep(self, tokens):
        """Evict all slots but those written at these tokens."""
        self.slots = [slot for slot in self.slots if slot.token in tokens]

    def observed(self, half_life, width):
        """Return what is observed of every slot, by the observations' names."""
        last = self.seen - 1
        rows = {
            "frequency": [sum(w for _, w in s.received) for s in self.slots],
            f"frequency_decayed:{half_life}": [
                sum(w * 2 ** (-(last - t) / half_life) for t, w in s.received) for s in self.slots
            ],
            "recency": [last - max([t for t, w in s.received if w >= 1 / 64], default=s.token) for s in self.slots],
            "surprise": [s.error for s in self.slots],
        }
        newest = [query for query in self.queries[-width:] if any(query)]
        rows[f"relevance:{width}"] = [sum(cosine(q, s.key) for q in newest) / max(len(newest), 1) for s in self.slots]
        return rows


def dot(a, b):
    """Return a · b."""
    return sum(x * y for x, y in zip(a, b, strict=True))


def norm(a):
    """Return the Euclidean norm."""
    return math.sqrt(dot(a, a))


def cosine(a, b):
    """Return the cosine, 0 where one of them is 0."""
    return dot(a, b) / (norm(a) * norm(b)) if norm(a) and norm(b) else 0.0
