"""What a slot more is worth to heads: curves against a loop over sorted slots, from model and traces; the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from evomem import plugins
from evomem.cli.app import app
from evomem.errors import ConfigError
from evomem.evaluation import EvaluationProtocol, Evaluator, utility
from evomem.evaluation.costs import KnownContext
from evomem.evaluation.future import sample_key
from evomem.evaluation.traces.store import Traces
from evomem.evaluation.utility import solve, utility_curves, with_curves, with_shares
from evomem.managers import build
from evomem.managers.allocation import LUKV, PerHeadShares
from evomem.managers.allocation.curve_record import ScorerDigest
from tests.evaluation.test_ranking_costs import policy
from tests.evaluation.test_traces import FEATURES, Words, load, recorded
from tests.managers.test_allocation import full_views

SAMPLES = Words().samples("train", 2, 0)


@pytest.fixture(scope="module")
def evaluator():
    return Evaluator(load())


def slow_curve(evaluator, manager, samples, knots):
    """Sort every head of every sample, protected tokens first, and add up what is attended to."""
    total = 0
    for sample in samples:
        tokens = evaluator.tokens(sample)
        views = evaluator.reading(tokens.read, manager.observes).views
        peaks = evaluator.future.of(evaluator, tokens, sample_key(tokens), manager.observes).peak
        layers = []
        for view, peak in zip(views, peaks, strict=True):
            heads, n = [], view.seen
            for h, scores in enumerate(manager.score(view)[0].tolist()):
                sinks, recent = getattr(manager.options, "sinks", 0), getattr(manager.options, "recent", 0)
                safe = [i < sinks or i >= n - recent for i in range(n)]
                order = sorted(range(n), key=lambda i: (not safe[i], -scores[i] if not safe[i] else i, i))
                reached = np.concatenate([[0], np.cumsum(peak[0, h].double().numpy()[order])])
                floor = sinks + recent + 1
                heads.append(np.interp(floor + knots * (n - floor), np.arange(n + 1), reached) - reached[floor])
            layers.append(heads)
        total = total + np.array(layers)
    return total / len(samples)


@pytest.mark.parametrize("ends", [{}, {"sinks": 2, "recent": 3}])
def test_curves_are_sums_over_the_ranking(evaluator, ends):
    manager = policy(kind="feature_scorer", **ends)
    found = utility_curves(evaluator, manager, SAMPLES, points=7)
    assert found.contexts == 2
    assert found.floor == 1 + sum(ends.values())
    assert np.allclose(found.utility.numpy(), slow_curve(evaluator, manager, SAMPLES, found.knots.numpy()), atol=1e-6)


@pytest.mark.parametrize("spec", ["snapkv(window=12, kernel=3)", "lava(window=12, kernel=3)", "h2o(recent=0.5)"])
def test_a_window_that_is_a_share_of_the_slots_is_one_at_every_point_of_a_curve(evaluator, spec):
    """Every point holds the attention to what the manager keeps when its budget is that number of slots."""
    knots = np.linspace(0, 1, 6)
    found = utility_curves(evaluator, build(spec, budget=9), SAMPLES[:1], knots=torch.from_numpy(knots))
    tokens = evaluator.tokens(SAMPLES[0])
    manager = build(spec)
    views = evaluator.reading(tokens.read, manager.observes).views
    peaks = evaluator.future.of(evaluator, tokens, sample_key(tokens), manager.observes).peak
    for view, peak, curve in zip(views, peaks, found.utility, strict=True):

        def worth(slots, view=view, peak=peak):
            keep = build(spec, budget=slots, allocation="uniform").decide(view).keep
            return (peak * keep).double().sum(-1)[0].numpy()

        for point, share in enumerate(1 + knots * (view.seen - 1)):
            low = min(int(share), view.seen - 1)
            between = worth(low) + (share - low) * (worth(low + 1) - worth(low))
            assert np.allclose(curve[:, point].numpy(), between - worth(1), atol=1e-6), (view.layer, point)


def test_of_a_heuristic_and_what_budgets_do(evaluator):
    """Solved counts hold more of the attention to come than equal ones, with the very same ranking."""
    manager = build("keydiff", budget=6)
    found = utility_curves(evaluator, manager, SAMPLES[:1], points=64)
    slots = solve(found, 6)
    views = evaluator.reading(evaluator.tokens(SAMPLES[0]).read, frozenset()).views
    assert slots.shape == (len(views), views[0].slots.shape[1])
    tokens = evaluator.tokens(SAMPLES[0])
    peaks = evaluator.future.of(evaluator, tokens, sample_key(tokens), frozenset()).peak
    held = {}
    for name, one in {"equal": manager, "solved": with_curves(manager, found)}.items():
        keeps = [decision.keep for decision in one.decide_all(views)]
        assert sum(int(keep.sum()) for keep in keeps) == slots.numel() * 6
        held[name] = sum(float((peak * keep).sum()) for peak, keep in zip(peaks, keeps, strict=True))
    assert held["solved"] > held["equal"]


def test_from_traces_as_from_the_model(evaluator, tmp_path):
    recorded(load(), tmp_path / "traces", samples=2)
    manager = policy(kind="kv_policy")
    read = utility_curves(evaluator, manager, SAMPLES)
    again = Evaluator(load())
    again.traces = Traces.open(tmp_path / "traces")
    traced = utility_curves(again, manager, SAMPLES)
    assert again.store.misses == 0
    assert np.allclose(read.utility, traced.utility, rtol=0.02, atol=2e-3)
    with pytest.raises(ConfigError, match="'keydiff': cannot score from the traces"):
        utility_curves(again, build("keydiff"), SAMPLES)


def test_what_has_no_curves_is_refused(evaluator):
    with pytest.raises(ConfigError, match="compress_once"):
        utility_curves(Evaluator(load(), EvaluationProtocol(kind="streaming")), build("keydiff"), SAMPLES)
    with pytest.raises(ConfigError, match="no samples"):
        utility_curves(evaluator, build("keydiff"), [])
    with pytest.raises(ConfigError, match="does not rank"):
        utility_curves(evaluator, build("full"), SAMPLES)
    found = utility_curves(evaluator, build("snapkv(window=4)"), SAMPLES[:1])
    for spec in ("pyramidkv(window=4)", "adakv(snapkv(window=4))"):
        with pytest.raises(ConfigError, match="allocation"):
            with_curves(build(spec, budget=8), found)


def test_layers_of_different_heads_are_refused(evaluator, monkeypatch):
    views = (*full_views(2, 20, (0,), 2)[:1], *full_views(2, 20, (0,), 3)[1:])
    monkeypatch.setattr(utility, "context_of", lambda *_: KnownContext(views, None, 0))
    with pytest.raises(ConfigError, match="2 and 3 KV heads"):
        utility_curves(evaluator, build("keydiff"), SAMPLES)


@pytest.mark.parametrize("make", [with_curves, lambda m, c: with_shares(m, c, 8)])
def test_a_manager_keeps_its_numbers_and_leaves_its_old_shares(evaluator, make):
    manager = policy(kind="feature_scorer", allocation=2)
    found = utility_curves(evaluator, manager, SAMPLES[:1])
    made = make(manager, found)
    assert torch.equal(made.weights, manager.weights)
    assert {name for name, _ in made.named_parameters()} <= {"weights", "allocation.log_shares"}
    assert made.options.budget == manager.options.budget
    assert FEATURES


def test_the_command_writes_a_plugin(tmp_path):
    common = ["keydiff", "-m", "zoo-gpt-neox", "-t", "zoo_needle:length=64", "-n", "2", "--no-check"]
    result = CliRunner().invoke(app, ["allocate", *common, "--out", str(tmp_path / "lukv"), "--points", "8"])
    assert result.exit_code == 0, result.output
    assert "8 slots a head: heads get" in result.output
    manager = plugins.load(tmp_path / "lukv")
    assert isinstance(manager.allocation, LUKV)
    assert manager.allocation.record.scorer == ScorerDigest.of(build("keydiff"))
    assert manager.allocation.record.model is not None
    known = json.loads((tmp_path / "lukv" / "provenance.json").read_text())
    assert known["allocated"]["ranking"] == "keydiff"
    result = CliRunner().invoke(
        app, ["allocate", *common, "--budget", "8", "--shares", "--out", str(tmp_path / "start")]
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    start = plugins.load(tmp_path / "start")
    assert isinstance(start.allocation, PerHeadShares)
    assert start.options.budget == 8
    assert start.allocation.log_shares.std() > 0
    for words, message in (
        (["--shares", "--out", str(tmp_path / "x")], "give one"),
        (["--budget", "8,9", "--out", str(tmp_path / "x")], "give one"),
        (["--out", str(tmp_path)], "exists and is no plug-in"),
    ):
        result = CliRunner().invoke(app, ["allocate", *common, *words])
        assert result.exit_code == 2
        assert message in result.output
