"""The tables of `experiments.zoo.matrix_count`: prices, what counts are compared, what is refused."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from evomem import plugins
from evomem.managers import build
from experiments.zoo import matrix_count


def plugin(folder, allocation, coefficients=()):
    """Save a manager that keeps what is longest, under an allocation with these numbers; return its folder."""
    manager = build(f"feature_scorer(features=[key_norm], budget=4, sinks=0, recent=1, allocation={allocation})")
    with torch.no_grad():
        manager.weights.fill_(1.0)
        if coefficients:
            manager.allocation.coefficients[:] = torch.tensor(coefficients)
    plugins.save(manager, folder)
    return str(folder)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["matrix_count", "--samples", "2", *arguments])
    matrix_count.main()


def test_the_price_is_of_the_mean_bytes():
    assert matrix_count.net([SimpleNamespace(loglik=-1.0, bytes_mean=2e6)], 3.0) == [-7.0]


def test_rows_follow_the_pairs_and_not_the_filler(monkeypatch, tmp_path):
    source = plugin(tmp_path / "count-0", "by_effective_writes(total=[0.25, 8])", (1.0, -1.0))
    run(monkeypatch, "--runs", source, "--fixed", "4", "--pairs", "2", "8", "--lengths", "64", "96", "--every", "1",
        "--task", "zoo_recall:length=64,pairs=8", "--json", str(tmp_path / "new" / "rows.json"))  # fmt: skip
    record = json.loads((tmp_path / "new" / "rows.json").read_text())
    few, many = (record["rows_by_pairs"]["count-0"][pairs][0] for pairs in ("2", "8"))
    assert (few, many) == (2, 8)
    short, long = (record["rows_by_length"]["count-0"][length][0] for length in ("64", "96"))
    assert short == long == 8
    row = record["runs"]["count-0"]
    assert row["best_fixed"] == 4
    assert row["net"] == pytest.approx(row["nats"] - 85 * row["bytes"] / 1e6)
    assert row["ahead"]["mean"] == pytest.approx(row["net"] - row["fixed"]["4"]["net"])


def test_what_the_input_does_not_decide_is_refused(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="is 'uniform', where the input decides nothing"):
        run(monkeypatch, "--runs", plugin(tmp_path / "fixed-0", "uniform"))
    with pytest.raises(SystemExit, match="give at least 2 samples"):
        run(monkeypatch, "--runs", "x", "--samples", "1")
    for words, message in (
        ((), "give --runs, or --observations"),
        (("--runs", "x", "--observations", "effective_writes"), "give --runs, or --observations"),
        (("--observations", "effective_writes", "--texts", "1"), "at least 2 --texts"),
        (("--observations", "recency"), "is one of every slot"), (("--observations", "nosuch"), "nosuch"),
        (("--observations", "surprise"), "surprise"),
        (("--model", "zoo-qwen3", "--observations", "x"), "no memory matrix"),
    ):  # fmt: skip
        with pytest.raises(SystemExit, match=message):
            run(monkeypatch, *words)


def test_observations_are_those_of_whole_texts(monkeypatch, tmp_path, capsys):
    path = tmp_path / "rows.json"
    run(monkeypatch, "--observations", "effective_writes", "distinct_rate:8", "--texts", "3", "--pairs", "2", "4",
        "--lengths", "64", "96", "--json", str(path))  # fmt: skip
    cells = json.loads(path.read_text())["observed"]
    for spec, pairs in (
        ("zoo_recall:length=128,pairs=2", 2), ("zoo_recall:length=128,pairs=4", 4),
        ("zoo_recall:length=64,pairs=8", 8), ("zoo_recall:length=96,pairs=8", 8),
    ):  # fmt: skip
        assert cells["effective_writes"][spec][0] == pytest.approx(pairs, abs=0.2)
        assert 0 <= cells["distinct_rate:8"][spec][0] <= 1
    assert "| effective_writes | " in capsys.readouterr().out
