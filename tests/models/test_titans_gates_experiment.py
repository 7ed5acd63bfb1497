"""The table of decisions about a neural memory: its arms, its grid, and what it refuses."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from experiments import titans_gates


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["titans_gates", *arguments])
    titans_gates.main()


def test_a_table_sets_arms_against_the_model_and_the_grid(monkeypatch, tmp_path, capsys):
    """The model by itself, one whose memory does not fade, a spec, and two seeds of one arm."""
    for seed, threshold in ((1, 0.0), (2, 4.0)):
        titans_gates.constant(threshold=threshold).save_pretrained(tmp_path / f"gates-{seed}")
    file = tmp_path / "rows.json"
    monkeypatch.setattr(titans_gates, "GRID_SAMPLES", 1)
    monkeypatch.setattr(titans_gates, "FORGET", (0.0,))
    monkeypatch.setattr(titans_gates, "RATE", (0.0,))
    monkeypatch.setattr(titans_gates, "THRESHOLD", (0.0, 4.0))
    folders = [str(tmp_path / f"gates-{seed}") for seed in (1, 2)]
    run(monkeypatch, *folders, "--cells", "zoo_recall(pairs=6):64", "--samples", "2", "--json", str(file))
    rows = {row["memory"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == ["own", "no forgetting", "grid", "gates"]
    assert rows["gates"]["seeds"] == 2
    assert rows["gates"]["nats_by_seed"][0] == pytest.approx(rows["own"]["nats"], abs=1e-5)
    assert rows["gates"]["nats_by_seed"][1] < rows["own"]["nats"] - 1  # a memory that nearly nothing enters
    assert rows["grid"]["nats"] == pytest.approx(rows["own"]["nats"], abs=1e-5)
    assert rows["grid"]["ahead"] == 0
    assert rows["no forgetting"]["nats"] != rows["own"]["nats"]
    assert "| zoo_recall(pairs=6) | 64 | gates |" in capsys.readouterr().out


def test_a_constant_decision_is_the_four_numbers_of_the_manager():
    manager = titans_gates.constant(forget=-2.0, rate=0.5, threshold=0.7)
    assert torch.equal(manager.weights, torch.tensor([[[-2.0], [0.0], [0.5], [0.7]]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "1"], "at least 2"), (["--every", "5"], "divides a segment of 16"),
        (["--model", "zoo-fam"], "has no neural memory"), (["no_manager_at_all"], "no_manager_at_all"),
        (["--cells", "no_task:64"], "no_task"), (["--cells", "zoo_recall:4"], "length 4 is too short"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(monkeypatch, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, *arguments)
