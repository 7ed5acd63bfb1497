"""A memory matrix in plain loops over rows, heads, slots and numbers: the slow path of the fast one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


def dot(one, two):
    return sum(a * b for a, b in zip(one, two, strict=True))


def softmax(scores):
    highest = max(scores)
    shares = [math.exp(score - highest) for score in scores]
    return [share / sum(shares) for share in shares]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@dataclass
class SlowMatrix:
    """One row's and one head's matrix: lists of numbers."""

    rows: list
    rule: str
    decay: list
    frequency: list = field(default_factory=list)

    def weights(self, write):
        scores = [dot(row, write["key"]) for row in self.rows]
        if self.rule == "gated":
            return [write["store"] * sigmoid(score + write["input_bias"]) for score in scores]
        return [write["store"] * share for share in softmax(scores)]

    def write(self, write):
        weights, old = self.weights(write), [list(row) for row in self.rows]
        forgets = None
        if self.rule == "gated":
            forgets = [sigmoid(dot(row, write["forget_key"]) + write["forget_bias"]) for row in old]
        for i, row in enumerate(old):
            for d, number in enumerate(row):
                kept, share, value = self.decay[i] * number, weights[i], write["value"][d]
                match self.rule:
                    case "leaky":
                        new = kept + share * value
                    case "ema":
                        new = kept + (1 - self.decay[i]) * share * value
                    case "erase_add":
                        new = kept * (1 - share * write["erase"][d]) + share * value
                    case "gated":
                        new = kept * forgets[i] + share * math.tanh(value)
                self.rows[i][d] = new
        return weights

    def read(self, key):
        weights = softmax([dot(row, key) for row in self.rows])
        return [dot(weights, [row[d] for row in self.rows]) for d in range(len(key))], weights
