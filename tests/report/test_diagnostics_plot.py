"""Run: the pictures of a search's diagnostics and of a comparison."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize

from evomem.evaluation.rows import Row
from evomem.report import plots
from evomem.report.diagnostics import diagnostics_plot
from evomem.tracking.base import GenerationRecord
from evomem.tracking.numbers import scalars
from evomem.tracking.terminal import describe


def record(generation, stage="a", **diagnostics):
    return GenerationRecord(
        generation, stage, (0.0,), 0.0, 0.0, math.nan, math.nan, 0, math.nan, 1, 1, 1.0, diagnostics
    )


def test_a_search_without_diagnostics_has_no_picture(tmp_path):
    path = tmp_path / "d.png"
    assert not diagnostics_plot(path, [record(0), record(1)], "title")
    assert not diagnostics_plot(path, [record(0, kl=math.nan)], "title")
    assert not path.exists()


def test_each_kind_that_was_measured_gets_a_panel(tmp_path):
    few, many = tmp_path / "few.png", tmp_path / "many.png"
    assert diagnostics_plot(few, [record(0, kl=0.0), record(1, "b", kl=0.1)], "title")
    measured = {"kl": 0.1, "signal_to_noise": 0.3, "rank_correlation": 0.5, "expected_cost": 1.5}
    assert diagnostics_plot(many, [record(0), record(1, **measured), record(2)], "title")
    assert height(many) > 2 * height(few)


def height(path):
    """Of a PNG, in pixels: bytes 20 to 24."""
    return int.from_bytes(path.read_bytes()[20:24], "big")


def test_trackers_and_terminal_tell_what_was_measured():
    told = record(0, kl=0.125, signal_to_noise=math.inf)
    assert scalars(told, None)["diagnostics/kl"] == 0.125
    assert "diagnostics/signal_to_noise" not in scalars(told, None)
    assert "kl 0.12" in describe(told)
    assert "snr" not in describe(told)
    assert "spread" not in describe(told)


def test_the_oracle_is_drawn_as_a_mark_and_not_as_a_competitor(monkeypatch, tmp_path):
    def row(manager, role, budget, loglik, size):
        return Row(
            model="m", task="t", manager=manager, budget=budget, protocol="p", split="sealed", role=role, samples=9,
            score=None, loglik=loglik, bytes_peak=size, bytes_mean=size, slots=9.0, seconds=1.0,
        )  # fmt: skip

    rows = [
        row(manager, role, budget, loglik - 1 / budget, 1000.0 * budget)
        for manager, role, loglik in (
            ("mine", "subject", -0.4),
            ("future_oracle", "oracle", -0.2),
            ("h2o", "field", -2),
        )
        for budget in (64, 128)
    ]
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    plots.memory_plot(tmp_path / "memory.png", rows, "title")
    (axes,) = drawn[0].axes
    stars = [line for line in axes.lines if line.get_marker() == "*"]
    assert [list(line.get_ydata()) for line in stars] == [[row.loglik for row in rows if row.role == "oracle"]]
    names = {text.get_text(): text.get_color() for text in axes.texts}
    assert names["future_oracle"] == stars[0].get_color()
    assert names["future_oracle"] not in {names["mine"], names["h2o"]}


def test_names_stand_apart_within_the_picture_and_as_near_as_they_can():
    """Against a general solver; many names at one height are pushed neither into the title nor under the axis."""
    rng = np.random.default_rng(0)
    for count, step, spread in ((1, 0.2, 0.1), (4, 0.2, 0.02), (6, 0.15, 0.3), (3, 0.1, 0.5)):
        for centre in (0.02, 0.5, 0.98):
            heights = np.sort(np.clip(centre + spread * rng.normal(size=count), 0, 1))
            found = np.array(plots._apart(heights, step, 0.0, 1.0))
            assert np.all(np.diff(found) >= step - 1e-9)
            assert found.min() >= -1e-9
            assert found.max() <= 1 + 1e-9
            gaps = [{"type": "ineq", "fun": lambda x, i=i, s=step: x[i + 1] - x[i] - s} for i in range(count - 1)]
            first = np.linspace(0, 1, count) if count > 1 else np.array([0.5])
            best = optimize.minimize(
                lambda x, h=heights: ((x - h) ** 2).sum(), first, bounds=[(0, 1)] * count, constraints=gaps
            )
            assert ((found - heights) ** 2).sum() <= best.fun + 1e-6
    crowded = plots._apart([0.5] * 9, 0.2, 0.0, 1.0)  # no room for all: apart, from the axis upwards
    assert np.diff(crowded) == pytest.approx([0.2] * 8)
    assert crowded[0] == 0.0
