"""Runs that the code of commit 1ffdb50 began, and were killed, end as they would have, or are refused.

tests/data/golden/make_runs.py wrote them, under the task and the bench of make_bench.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evomem.errors import RunError
from evomem.runs import open_run, parse_experiment, search
from tests.data.golden.make_bench import bench
from tests.support.golden import same_numbers, told, unpacked

RUNS = told("runs")
REFUSED: dict[str, str] = {}
"""Runs by name that later code cannot go on with, and a pattern of the sentence that says why; none so far."""


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
