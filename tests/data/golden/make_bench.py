"""The task and the bench of recorded runs: tests go on with a run under what it was recorded under.

It imports nothing that commit 1ffdb50 has not, because make.py copies it there.
"""

from __future__ import annotations

import zlib

import numpy as np

from evomem.evaluation import Evaluator
from evomem.models import LoadedModel
from evomem.runs import Bench
from evomem.tasks.base import Sample
from evomem.testing.models import tiny, tiny_tokenizer

WORDS = (
    "the", "of", "and", "to", "is", "in", "a", "an", "for", "on", "that", "with", "are", "was", "it", "all",
    "one", "some", "1", "2", "3", "4", "5", "6", "7", "8", "9",
)  # fmt: skip


class Words:
    """Texts of the tiny tokenizer's words, drawn by the sample's name."""

    name, uniform_chance, has_exact = "words", 0.0, False

    def samples(self, split, n, seed):
        return [self.sample(f"words/{split.value}/{number}") for number in range(n)]

    def sample(self, name):
        drawn = np.random.default_rng(zlib.crc32(name.encode())).integers(0, len(WORDS), 47)
        said = [WORDS[place] for place in drawn]
        return Sample(name, " ".join(said[:40]), " ".join(said[40:44]), " ".join(said[44:]), ("w",), 0)

    def score(self, sample, output):
        return 0.0

    def describe(self):
        return {}


def bench(config):
    loaded = LoadedModel("tiny", tiny("llama", layers=2), tiny_tokenizer(), "tiny")
    return Bench(Evaluator(loaded, config.protocol), lambda task: Words(), provenance={"model_digest": "tiny"})
