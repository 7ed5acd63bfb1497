from __future__ import annotations

import pytest

from evomem.runs import search
from tests.support.interrupted_search import SMALL, broken_off
from tests.support.synthetic_search import ToyEvaluator, experiment, factory


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    search(experiment(*SMALL), folder, factory(ToyEvaluator()))
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped") / "run"
    broken_off(folder)
    return folder
