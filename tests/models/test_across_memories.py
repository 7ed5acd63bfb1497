"""The table of one scorer on several memories: gains against a plain computation, and the moons' part."""

from __future__ import annotations

import json

import numpy as np
import pytest

from evomem import plugins
from evomem.errors import ConfigError
from evomem.managers import build
from evomem.report.transfer import TransferRow
from evomem.statistics import paired_bootstrap
from evomem.tasks.base import Split
from experiments.across_memories import (
    SCORER,
    WHERE,
    counts,
    gains_of_transfer,
    gains_on_moons,
    main,
    on_moons,
    search,
    table,
)  # fmt: skip
from experiments.moons import MOONS, MoonsMosaic
from experiments.moons_store import BUDGET, measure, series_of

ROW = {
    "model": "pair-memory", "task": "zipf", "budget": 16, "protocol": "streaming:1/query_agnostic", "split": "sealed",
    "samples": 3, "score": None, "bytes_peak": 1.0, "bytes_mean": 1.0, "slots": 16.0, "seconds": 1.0,
    "bytes_ratio": 1.0, "subject": "a", "train_model": "pair-memory",
}  # fmt: skip


def test_gains_are_paired_differences_to_the_best_heuristic():
    errors = {
        "full": [0.0, 0.0, 0.1],
        "lru": [0.3, 0.2, 0.4],
        "lfu": [0.5, 0.6, 0.1],
        "a": [0.1, 0.1, 0.15],
        "b": [0.9, 0.8, 0.9],
    }
    roles = {"full": "full", "lru": "field", "lfu": "field", "a": "subject", "b": "subject"}
    gains = gains_on_moons({n: {"errors": e, "role": roles[n], "found_on": n} for n, e in errors.items()})
    assert [one.manager for one in gains] == ["a", "b"]
    for one in gains:
        gap = paired_bootstrap([-e for e in errors[one.manager]], [-e for e in errors["lru"]])
        assert (one.best, one.gain, one.interval) == ("lru", gap.mean, [gap.low, gap.high])
        assert one.value - one.best_value == pytest.approx(one.gain)
        assert one.full == pytest.approx(-np.mean(errors["full"]))
    lines = table(gains)
    assert "**+0.183" in lines[2]
    assert "*-0.567" in lines[3]
    assert counts(gains)[2:] == ["| a | +0.183 (1, 0, 0) |", "| b | -0.567 (0, 0, 1) |"]


def test_gains_of_a_transfer_are_those_of_its_cells():
    rows = [
        TransferRow(**ROW, manager="a", role="subject", loglik=-1.0),
        TransferRow(**ROW, manager="lru", role="field", loglik=-1.5, difference=0.5, interval=[0.4, 0.6]),
        TransferRow(**ROW, manager="fifo", role="field", loglik=-2.0, difference=1.0, interval=[0.9, 1.1]),
        TransferRow(
            **{**ROW, "budget": None}, manager="full", role="full", loglik=-0.5, difference=-0.5, interval=[-1, 0]
        ),
    ]
    (gain,) = gains_of_transfer(rows)
    assert (gain.gain, gain.interval, gain.best, gain.full) == (0.5, [0.4, 0.6], "lru", -0.5)
    with pytest.raises(ConfigError, match="no heuristic"):
        gains_of_transfer([rows[0], rows[3]])


def test_a_plug_in_decides_on_the_moons_as_its_manager_does(tmp_path, capsys):
    found, history = search(0, generations=1, popsize=4)
    again, _ = search(0, generations=1, popsize=4)
    assert history[0] <= 0
    assert found.weights.tolist() == again.weights.tolist()
    plugins.save(found, tmp_path / "moons-0", {"experiment": "moons-0", "models": [{"name": WHERE}]})
    results = on_moons([str(tmp_path / "moons-0")], 2)
    plain = build(SCORER, budget=BUDGET)
    plain.weights.data.copy_(found.weights)
    series = series_of(Split.SEALED, 2, 100_000)
    assert (
        results["moons-0"]["errors"] == measure(MoonsMosaic.given(MOONS), series, plain.requires_grad_(False))["errors"]
    )
    assert results["full"]["pairs"] > results["lru"]["pairs"] == 3 * BUDGET
    (tmp_path / "moons.json").write_text(json.dumps(results))
    main(["report", str(tmp_path / "moons.json"), "--out", str(tmp_path / "page")])
    assert json.loads((tmp_path / "page.json").read_text())[0]["found_on"] == WHERE
    assert "| best heuristic there |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="moons-0 is there twice"):  # a table that is written goes into another one
        main(["report", str(tmp_path / "page.json"), str(tmp_path / "page.json")])
    gains = json.loads((tmp_path / "page.json").read_text())
    other = [{**gains[0], "manager": "other", "best": "fifo"}]
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(SystemExit, match="against fifo"):
        main(["report", str(tmp_path / "page.json"), str(tmp_path / "other.json")])
    (tmp_path / "other.json").write_text(json.dumps([{**gains[0], "manager": "other"}]))
    main(["report", str(tmp_path / "page.json"), str(tmp_path / "other.json"), "--out", str(tmp_path / "both")])
    assert json.loads((tmp_path / "both.json").read_text()) == [*gains, {**gains[0], "manager": "other"}]
    with pytest.raises(ConfigError, match="already"):
        on_moons([str(tmp_path / "moons-0")] * 2, 2)


def test_bad_input_is_refused_with_a_sentence(tmp_path):
    (tmp_path / "no.json").write_text("{")
    for words, message in (
        (["report", str(tmp_path / "no.json")], "is no JSON"),
        (["moons", "lru", "--starts", "1", "--out", str(tmp_path / "x.json")], "at least 2"),
        (["search", "--out", str(tmp_path)], "is there already"),
        (["moons", str(tmp_path / "none"), "--out", str(tmp_path / "x.json")], "none"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(words)
