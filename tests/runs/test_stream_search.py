"""Runs: a search on a memory that reads streams, interrupted and gone on with; its winner, plug-in and comparison."""

from __future__ import annotations

import pytest
import torch

import evomem
from evomem.evaluation.streams import StreamEvaluator
from evomem.runs import open_run, parse_experiment, search
from evomem.runs.bench import model_bench
from tests.runs.test_runs import Stop, outcome, same

CONFIG = {
    "name": "streams",
    "model": "pair-memory",
    "protocol": {"kind": "streaming", "every": 2},
    "space": {
        "manager": {
            "name": "feature_scorer",
            "options": {
                "features": ["recency", "frequency", "relevance:4"],
                "knots": 1,
                "sinks": 0,
                "recent": 2,
                "budget": 6,
            },
        },
        "start": {"heuristic": "lru"},
        "sigma": 0.3,
    },
    "tasks": [{"spec": "zipf", "length": 40, "options": {"keys": 24, "dim": 8, "topics": 4}}],
    "fitness": {"objective": "exact"},
    "driver": {"name": "cmaes", "population": 4},
    "generations": 2,
    "samples_per_generation": 2,
    "train_contexts": 4,
    "select": {"contexts": 2, "top": 1},
    "sealed": {"contexts": 2},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams") / "run"
    search(parse_experiment(CONFIG), folder, model_bench)
    return folder


def test_an_interrupted_search_ends_the_same(tmp_path, whole, monkeypatch):
    evaluate, units = StreamEvaluator.evaluate, []

    def stopping(self, *arguments, **options):
        units.append(1)
        if len(units) == 4:
            raise Stop
        return evaluate(self, *arguments, **options)

    monkeypatch.setattr(StreamEvaluator, "evaluate", stopping)
    folder = tmp_path / "run"
    with pytest.raises(Stop):
        search(parse_experiment(CONFIG), folder, model_bench)
    monkeypatch.undo()
    search(parse_experiment(CONFIG), folder, model_bench, resume=True)
    same(outcome(folder), outcome(whole))


def test_a_winner_is_a_plugin_that_is_compared_like_any_other(tmp_path, whole):
    winner = open_run(whole).winner
    winner.save_pretrained(tmp_path / "plugin")
    rows = evomem.compare([str(whole), str(tmp_path / "plugin")], against=["lru"], budgets=[6], samples=2, check=False)
    by_name = {row.manager: row for row in rows}
    assert len(by_name) == 4
    assert {row.model for row in rows} == {"pair-memory"}
    assert {row.protocol for row in rows} == {"streaming:2/query_agnostic"}
    of_run, of_plugin = (row for row in rows if row.role == "subject")
    assert (of_run.score, of_run.loglik) == (of_plugin.score, of_plugin.loglik)
    assert by_name["full"].score >= max(row.score for row in rows)


def test_streams_choose_their_model_and_protocol():
    rows = evomem.compare(
        "random", against=[], tasks="zipf:length=30,keys=20,dim=4", budgets=[4], samples=2, check=False
    )
    assert [(row.model, row.protocol) for row in rows] == [("pair-memory", "streaming:1/query_agnostic")]
    assert torch.tensor(rows[0].score).isfinite()
