"""A policy that learns from recorded traces, and the oracle in a comparison: on a model of the zoo."""

from __future__ import annotations

import numpy as np
import pytest

import evomem.models
from evomem.errors import ConfigError, RunError
from evomem.evaluation import Evaluator
from evomem.evaluation.compare import NamedManager, Scenario, compare
from evomem.evaluation.measurement import EvaluationProtocol
from evomem.evaluation.oracle import evaluate_oracle
from evomem.evaluation.traces.recording import record
from evomem.managers import build
from evomem.report.sentences import best_heuristic
from evomem.runs import open_run, search
from evomem.runs.bench import model_bench
from evomem.tasks import Split
from evomem.tasks import build as build_task
from tests.support.policy_search import STAGES, configured

EXACT = {"stages": STAGES[:1], "diagnostics": {"every": 0}}


@pytest.fixture(scope="module")
def loaded():
    return evomem.models.load("zoo-gpt-neox")


@pytest.fixture(scope="module")
def traces(loaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces") / "needle"
    task = build_task("zoo_needle", loaded.tokenizer, 64)
    record(loaded, task, "zoo_needle:length=64", folder, samples=4)
    return folder


def test_a_search_on_traces_is_the_search_on_readings_without_the_model(traces, tmp_path, monkeypatch):
    # Calibration and the check of the task read contexts of their own, before: here only the search counts.
    monkeypatch.setattr("evomem.runs.bench.calibrate_manager", lambda manager, chosen: None)
    read = search(configured(**EXACT), tmp_path / "read", model_bench)
    traced = search(configured(traces=[str(traces)], **EXACT), tmp_path / "traced", model_bench)
    assert tokens_of(tmp_path / "traced") == 0
    assert tokens_of(tmp_path / "read") > 0
    assert np.abs(traced.vector - read.vector).max() < 0.02
    assert np.abs(read.vector).max() > 0.1


def tokens_of(folder):
    """Tokens that the model read while it searched."""
    units = [r for r in open_run(folder).records() if r["kind"] == "unit" and r["phase"] == "train"]
    assert units
    return sum(evaluation["tokens"] for unit in units for evaluation in unit["evaluations"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"traces": ["nowhere"]}, "no trace folder"),
        ({"model": "zoo-qwen3"}, "traces are of zoo-gpt-neox"),
        ({"protocol": {"mode": "query_aware"}}, "query_agnostic"),
        ({"space": {"manager": {"name": "kv_policy", "options": {"features": ["last:5"]}}}}, "'last:5' is not in"),
        (
            {"space": {"manager": {"name": "kv_policy", "options": {"features": ["age"], "allocation": "cake"}}}},
            "observes",
        ),
    ],
)
def test_traces_that_do_not_fit_are_refused(traces, tmp_path, changes, message):
    with pytest.raises((RunError, ConfigError), match=message):
        search(configured(**{"traces": [str(traces)], **EXACT, **changes}), tmp_path / "run", model_bench)


def test_the_oracle_is_a_mark_and_no_competitor(loaded):
    task = build_task("zoo_needle", loaded.tokenizer, 128)
    place = Scenario("zoo", "needle", Evaluator(loaded), task)
    subject = NamedManager("knorm", build("knorm"))
    found = compare([subject], [place], samples=3, budgets=[8, 16], against=["random"], exact=False, oracle=True)
    rows = {(row.manager, row.budget): row for row in found.rows}
    for budget in (8, 16):
        own = [evaluate_oracle(place.evaluator, s, task, budget).loglik for s in task.samples(Split.SEALED, 3, 0)]
        assert rows["future_oracle", budget].loglik == pytest.approx(np.mean(own), abs=1e-5)
        assert rows["future_oracle", budget].role == "oracle"
        best = best_heuristic([row for row in found.rows if row.budget == budget])
        assert best is not None
        assert best.manager == "random"
    streaming = Scenario("zoo", "needle", Evaluator(loaded, EvaluationProtocol(kind="streaming", every=32)), task)
    with pytest.raises(ConfigError, match="compress_once only"):
        compare([subject], [streaming], samples=2, budgets=[8], against=["random"], exact=False, oracle=True)
