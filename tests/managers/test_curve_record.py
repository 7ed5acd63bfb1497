"""Curves of `lukv`: their record travels with them, and another scorer or another model is said, once."""

from __future__ import annotations

import logging

import pytest
import safetensors.torch
import torch

from evomem import plugins
from evomem.evaluation import EvaluationProtocol, Evaluator
from evomem.evaluation.utility import UtilityCurves, utility_curves, with_curves
from evomem.managers import build
from evomem.managers.allocation import curve_record, probed
from evomem.managers.allocation.curve_record import CurveRecord, ScorerDigest
from evomem.managers.allocation.probes import fingerprint
from evomem.managers.reallocation import change_between, with_allocation
from evomem.modes import outside_inference_mode
from evomem.testing.models import tiny
from tests.evaluation.test_ranking_costs import policy
from tests.evaluation.test_traces import Words, load

UNDER, ELSEWHERE = "were measured under another scorer", "were measured on another model"


@pytest.fixture(scope="module")
def evaluator():
    return Evaluator(load())


@pytest.fixture(scope="module")
def curves(evaluator):
    """Curves as `evomem allocate` measures them, under a scorer with learned numbers."""
    return utility_curves(evaluator, policy(kind="feature_scorer"), Words().samples("train", 1, 0), points=4)


@pytest.fixture
def said(caplog, monkeypatch):
    """What is warned of when a manager is bound to a model, in a process that has warned of nothing."""
    monkeypatch.setattr(curve_record, "_warned", set())

    def bound(manager, model):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "evomem"):
            manager.for_model(model)
        return [record.getMessage() for record in caplog.records if record.name == "evomem"]

    return bound


def test_same_scorer_and_model_are_silent_whatever_budget_allocation_and_schedule_are(evaluator, curves, said):
    manager, model = with_curves(policy(kind="feature_scorer"), curves), evaluator.loaded.model
    same = [
        manager,
        manager.with_options(budget=3),
        manager.with_options(budget=0.5, every=7),
        evaluator.scheduled(manager),
    ]
    # Curves that were measured while it learned shares of its own; those are no part of the ranking.
    shares = policy(kind="feature_scorer", allocation=2, size=0.0)
    shares.weights.data.copy_(manager.weights)
    of_shares = utility_curves(evaluator, shares, Words().samples("train", 1, 0), points=8)
    same += [with_curves(policy(kind="feature_scorer"), of_shares), with_curves(shares, curves)]
    for one in same:
        assert said(one, model) == []


def test_other_scorers_are_said_once_with_what_differs(evaluator, curves, said):
    model, manager = evaluator.loaded.model, with_curves(policy(kind="feature_scorer"), curves)
    moved = with_curves(policy(kind="feature_scorer"), curves)
    moved.weights.data[0, 0] += 1e-3
    ends = manager.with_options(sinks=2)
    order = manager.with_options(features=tuple(reversed(manager.options.features)))
    kind = with_curves(build("keydiff(budget=8)"), curves)
    for other, words in ((moved, "(other numbers)"), (ends, "(other options)"), (kind, "(another kind of manager)")):
        (text,) = said(other, model)
        assert f"{UNDER} {words}" in text
        assert "`evomem allocate`" in text
        assert ELSEWHERE not in text
        assert said(other, model) == []
    assert said(order, model) == []  # options again, of the same curves: said before
    moved.weights.data[0, 0] += 1  # the next candidate of a search
    assert said(moved, model) == []


def test_another_model_of_the_same_shape_is_said(evaluator, curves, said):
    manager = with_curves(policy(kind="feature_scorer"), curves)
    other = tiny("llama", layers=2)
    assert fingerprint(other) == fingerprint(evaluator.loaded.model)
    assert said(manager, other) == []
    with torch.no_grad():
        next(other.parameters()).add_(1)
    (text,) = said(manager, other)
    assert ELSEWHERE in text
    assert UNDER not in text
    assert said(manager, other) == []


def test_a_search_and_a_cache_ask_where_they_bind_a_manager_and_not_when_it_decides(
    evaluator, curves, said, monkeypatch
):
    asked = []
    monkeypatch.setattr(probed, "warn_of_others", lambda *arguments: asked.append(arguments))
    manager, model = with_curves(policy(kind="feature_scorer"), curves), evaluator.loaded.model
    task = Words()
    every = Evaluator(evaluator.loaded, EvaluationProtocol(kind="streaming", every=8))
    every.evaluate([every.scheduled(manager)] * 2, task.samples("train", 1, 0)[0], task)
    assert len(asked) == 1
    with manager.with_options(every=4).attach(model) as cache:
        ids = torch.arange(24)[None] % 50
        model(input_ids=ids, past_key_values=cache)
        model(input_ids=ids, past_key_values=cache)
    assert len(asked) == 2


def test_the_record_travels_with_the_curves(evaluator, curves, said, tmp_path):
    manager = with_curves(policy(kind="feature_scorer"), curves)
    record = manager.allocation.record
    assert record == CurveRecord(ScorerDigest.of(manager), fingerprint(evaluator.loaded.model)) == curves.record
    plugins.save(manager, tmp_path / "plug")
    loaded = plugins.load(tmp_path / "plug")
    loaded.save_pretrained(tmp_path / "again")
    for one in (loaded, plugins.load(tmp_path / "again"), manager.with_options(budget=3), manager.bfloat16()):
        assert one.allocation.record == record
    partly = with_curves(policy(kind="feature_scorer"), curves)
    partly.load_state_dict({"weights": partly.weights + 1}, strict=False)
    assert partly.allocation.record == record
    # New curves never keep the record of those before.
    partly.allocation.set_curves(partly.allocation.knots, partly.allocation.marginal)
    assert partly.allocation.record == CurveRecord()
    dropped = change_between(manager, with_allocation(manager, "uniform")).dropped
    assert dropped.keys() == {"allocation.knots", "allocation.marginal"}


def test_plugins_and_states_of_before_load_and_are_said_to_be_unknown_once(evaluator, curves, said, tmp_path):
    manager = with_curves(policy(kind="feature_scorer"), curves)
    plugins.save(manager, tmp_path / "plug")
    file = tmp_path / "plug" / "model.safetensors"
    state = {name: value for name, value in safetensors.torch.load_file(file).items() if "measured" not in name}
    assert len(state) == len(manager.state_dict()) - 2
    safetensors.torch.save_file(state, file)
    old = plugins.load(tmp_path / "plug")
    assert torch.equal(old.allocation.marginal, manager.allocation.marginal)
    (text,) = said(old, evaluator.loaded.model)
    assert "do not say under which scorer and on which model" in text
    assert "`evomem allocate`" in text
    assert said(plugins.load(tmp_path / "plug"), evaluator.loaded.model) == []
    manager.load_state_dict(state)  # as a run of before is resumed
    assert manager.allocation.record == CurveRecord()
    nothing = build("keydiff(budget=4, allocation=lukv(layers=2, heads=2))")
    assert said(nothing, evaluator.loaded.model) == []  # it has no curves; a decision refuses that


def test_a_digest_is_of_the_numbers_and_not_of_their_type_and_is_the_same_in_inference_mode():
    manager = policy(kind="feature_scorer").bfloat16()
    digest = ScorerDigest.of(manager)
    assert ScorerDigest.of(manager.float()) == ScorerDigest.of(manager.double()) == digest
    with torch.inference_mode():
        assert ScorerDigest.of(manager) == digest
        with outside_inference_mode():
            manager.weights.data[0, 0] += 1e-6
    assert ScorerDigest.of(manager) != digest


def test_curves_without_a_record_are_unknown(said):
    knots = torch.linspace(0, 1, 3).double()
    by_hand = UtilityCurves(knots, torch.tensor([[[0.0, 2, 3]] * 2] * 2).double(), 0, 2, 1)
    (text,) = said(with_curves(build("keydiff(budget=4)"), by_hand), tiny("llama", layers=2))
    assert "do not say under which scorer" in text
