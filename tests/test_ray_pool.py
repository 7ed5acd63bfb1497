"""Workers: any number of them gives the results of one process, to the bit."""

from __future__ import annotations

import pytest
from faulty_search import SETTINGS
from synthetic_search import ToyEvaluator, experiment, factory
from test_runs import outcome, same

from evomem.runs import search
from evomem.workers import WorkerOptions

pytestmark = pytest.mark.usefixtures("ray_here")


def test_the_toy_search_is_the_same_with_any_number_of_workers(tmp_path):
    search(experiment(*SETTINGS), tmp_path / "0", factory(ToyEvaluator()))
    for count in (1, 2, 3):
        options = WorkerOptions(count, cpus=0.5)
        search(experiment(*SETTINGS), tmp_path / str(count), factory(ToyEvaluator()), workers=options)
        same(outcome(tmp_path / str(count)), outcome(tmp_path / "0"))
