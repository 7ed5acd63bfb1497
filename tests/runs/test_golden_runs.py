"""Runs that the code of commit 1ffdb50 began, and were killed, end as they would have, or are refused.

tests/data/golden/make_runs.py wrote them: Words and bench are the same here as there.
"""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch

from evomem.errors import RunError
from evomem.evaluation import Evaluator
from evomem.models import LoadedModel
from evomem.runs import Bench, open_run, parse_experiment, search
from evomem.tasks.base import Sample
from evomem.testing.models import tiny, tiny_tokenizer
from tests.support.golden import same_numbers, told, unpacked

RUNS = told("runs")
REFUSED: dict[str, str] = {}
"""Runs by name that later code cannot go on with, and a pattern of the sentence that says why; none so far."""


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


@pytest.mark.parametrize("name", RUNS["runs"])
def test_a_run_of_before_goes_on_to_the_same_end_or_is_refused(name, tmp_path):
    """To the bit on the kind of processor that it began on: every generation's fitness, and the winner."""
    before, folder = RUNS["runs"][name], unpacked("runs", tmp_path) / name
    lines = (folder / "journal.jsonl").read_bytes()
    assert before["killed_after"] == lines.count(b"\n") < before["of_lines"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if name in REFUSED:
            with pytest.raises(RunError, match=REFUSED[name]):
                search(parse_experiment(before["experiment"]), folder, bench, resume=True)
            return
        search(parse_experiment(before["experiment"]), folder, bench, resume=True)
    finally:
        torch.set_num_threads(threads)
    run = open_run(folder)
    assert (folder / "journal.jsonl").read_bytes().startswith(lines)  # it went on, and did not begin anew
    for generation, fitness in zip(run.generations(), before["fitness"], strict=True):
        assert same_numbers([float(value) for value in generation.fitness], fitness, RUNS["made_with"])
    assert same_numbers(run.winner_vector, np.array(before["winner"]), RUNS["made_with"])
