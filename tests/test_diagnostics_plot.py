"""Run: the picture of a search's diagnostics."""

from __future__ import annotations

import math

from evomem.runs.diagnostics import diagnostics_plot
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
