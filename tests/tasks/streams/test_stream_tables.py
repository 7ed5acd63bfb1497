"""The script of the streams' page: its grid is `slot_relevance` point by point, and its rows are what caches do."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from evomem.managers import build
from evomem.plugins import save
from experiments import streams, streams_bytes
from tests.support import slow_stream
from tests.support.slow_replacement import relevance, replay

TASK = "zipf:length=80,keys=40,dim=8,topics=4"


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["streams", *map(str, words)])
    streams.main()


def test_a_grid_is_the_manager_point_by_point():
    evaluator, task, samples = streams.task_and_samples(TASK, "train", 2)
    points = [(0.5, 1.0, 2.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1.0, 0.0, 4.0), (8.0, 1.0, 32.0)]
    as_grid = streams.measured(evaluator, task, samples, [streams.GridRelevance.at(point, 8) for point in points])
    as_managers = streams.measured(
        evaluator, task, samples, [build(streams.spec_of(point), budget=8) for point in points]
    )
    assert as_grid["exact"].tolist() == as_managers["exact"].tolist()
    for place, sample in enumerate(samples):
        stream = task.stream(sample)
        for number, rank in ((1, relevance(1, 0)), (2, relevance(0, 1))):
            assert as_grid["exact"][number, place] == slow_stream.exact(stream, replay(stream, rank, 8))


def test_the_table_has_paired_rows_and_refuses_what_it_cannot_have(tmp_path, monkeypatch, capsys):
    scorer = build("feature_scorer(features=['recency', 'frequency'], knots=1, sinks=0, recent=1)", budget=6)
    with torch.no_grad():
        scorer.weights[:] = torch.tensor([-1.0, 0.2])
    save(scorer, tmp_path / "plugin", {})
    monkeypatch.setattr(streams, "POINTS", streams.POINTS[:2])
    monkeypatch.setattr(streams, "POLICIES", ())
    monkeypatch.setattr(streams, "MANAGERS", ("lru",))
    common = ("--task", TASK, "--streams", "3", "--slots", "6,12", "--json", tmp_path / "rows.json")
    run(monkeypatch, "grid", *common)
    more = ("--more", f"again={tmp_path / 'plugin'}")
    run(monkeypatch, "table", *common, "--grid", tmp_path / "rows.json", "--runs", tmp_path / "plugin", *more)
    rows = json.loads((tmp_path / "rows.json").read_text())[f"table {TASK}"]["slots"]["6"]
    mine, lru, bound = rows[str(tmp_path / "plugin")], rows["lru"], rows["belady"]
    assert mine["evolved_ahead_by"] == {"mean": 0.0, "interval": [0.0, 0.0]}
    assert lru["evolved_ahead_by"]["mean"] == pytest.approx(mine["mean"] - lru["mean"], abs=2e-4)
    assert all(best >= other for best, other in zip(bound["rates"], lru["rates"], strict=True))
    assert mine["bytes"] >= lru["bytes"]
    assert rows["again"]["rates"] == mine["rates"]
    assert rows["again"]["ahead_by"]["lru"] == lru["evolved_ahead_by"]
    later = ("--grid", tmp_path / "rows.json", "--runs", tmp_path / "plugin", "--skip", "2", "--key", "later")
    run(monkeypatch, "table", *common, *later)
    rows = json.loads((tmp_path / "rows.json").read_text())["later"]
    assert rows["skipped"] == 2
    assert rows["slots"]["6"]["lru"]["rates"][0] == lru["rates"][2]
    assert "share of Belady's" in capsys.readouterr().out
    for words, message in (
        (("table", "--task", "zipf:length=30,keys=12,topics=2", *common[2:]), "holds no grid of"),
        (("table", *common[:4], "--slots", "7", *common[6:]), "has no grid at 7 slots"),
        (("count", *common[:4], *common[6:]), "by_distinct_rate"),
    ):
        more = () if words[0] == "count" else ("--grid", tmp_path / "rows.json")
        with pytest.raises(SystemExit, match=message):
            run(monkeypatch, *words, *more, "--runs", tmp_path / "plugin")


def test_counts_are_set_against_the_same_ranking_at_fixed_counts(tmp_path, monkeypatch):
    manager = build("lru(allocation=by_distinct_rate(total=[0.5, 2]))", budget=6)
    with torch.no_grad():
        manager.allocation.coefficients[:] = torch.tensor([0.0, 30.0])  # always twice the budget
    save(manager, tmp_path / "plugin", {})
    small = "zipf:length=60,keys={},dim=8,topics=4"
    words = (
        "count", "--runs", tmp_path / "plugin", "--json", tmp_path / "rows.json", "--streams", "2", "--price", "0.01",
        "--task", small.format(24), "--fixed", "4,12", "--keys", "12,24", "--fillers", "0",
        "--by-keys", small, "--by-filler", "zipf:length=60,keys=24,dim=8,topics=4,filler={},filler_keys=9",
    )  # fmt: skip
    run(monkeypatch, *words)
    found = json.loads((tmp_path / "rows.json").read_text())[f"count {small.format(24)}"]["runs"]
    row = found[str(tmp_path / "plugin")]
    assert row["net"] == row["net_of_fixed"]["12"]
    assert row["net"] == pytest.approx(row["hit_rate"] - 0.01 * row["slots"], abs=2e-4)
    assert row["best_fixed"] in (4, 12)
    assert row["by_keys"]["24"][0] > row["by_keys"]["12"][0]
    assert set(row["by_filler"]) == {"0.0"}


def test_files_and_names_that_do_not_fit_are_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(streams, "grid", lambda arguments: pytest.fail("measured"))
    path = tmp_path / "rows.json"
    for text, message in (("{", "is no JSON"), ("[]", "holds no rows"), ('{"a": 1}', "holds no rows")):
        path.write_text(text)
        with pytest.raises(SystemExit, match=message):
            run(monkeypatch, "grid", "--task", TASK, "--json", path)
        assert path.read_text() == text
        with pytest.raises(SystemExit, match=message):
            run(monkeypatch, "table", "--task", TASK, "--json", tmp_path / "new", "--grid", path, "--runs", "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="file"):
        run(monkeypatch, "grid", "--task", TASK, "--json", tmp_path / "file" / "rows.json")
    for words, message in (
        (("--runs", ","), "at least one name, and none twice"),
        (("--runs", "a,a"), "at least one name, and none twice"),
        (("--runs", "a", "--price", "nan"), "a finite number"),
        (("--runs", "a", "--by-keys", "zipf:keys=8"), "where the value goes"),
        (("--runs", "a", "--by-filler", "zipf:filler={share}"), "where the value goes"),
    ):
        with pytest.raises(SystemExit):
            run(monkeypatch, "count", "--json", tmp_path / "new", *words)
        assert message in capsys.readouterr().err
    for label in ("runs/a", "=a", "lru=a"):
        with pytest.raises(SystemExit):
            run(monkeypatch, "table", "--json", tmp_path / "new", "--grid", path, "--runs", "a", "--more", label)
        assert "give LABEL=RUN,RUN" in capsys.readouterr().err
    assert {one.name for one in tmp_path.iterdir()} == {"rows.json", "file"}


def test_arc_holds_as_many_pairs_as_the_bytes_do(tmp_path, monkeypatch, capsys):
    """Pairs of 10 bytes each and ghosts of 8: 95 bytes are 5 of them; the rest is ARC on the table's own streams."""
    asked = []
    monkeypatch.setattr(streams_bytes, "hits", lambda stream, policy, slots: asked.append(slots) or stream.reads)
    rows = {
        "random": {"bytes": 40.0}, "best R: x": {"bytes": 60.0}, "arc": {}, "evolved": {"mean": 0.5},
        "a": {"bytes": 90.0, "rates": [0.5, 0.25]}, "b": {"bytes": 100.0, "rates": [0.5, 0.75]},
    }  # fmt: skip
    table = {"task": TASK, "split": "sealed", "streams": 2, "skipped": 1, "slots": {"4": rows}}
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"t": table, "grid": {}}))
    streams_bytes.main([str(path), "--key", "t", "--json", str(path)])
    saved = json.loads(path.read_text())
    assert saved["t"] == table
    row = saved["bytes t"]["4"]
    assert (row["bytes"], row["arc_pairs"], set(asked)) == (95.0, 5, {5})
    assert row["arc_rates"] == [1.0, 1.0]
    assert row["evolved_ahead_by"]["mean"] == -0.5
    streams_bytes.main([str(path), "--key", "t", "--runs", "b"])
    assert asked[-1] == 5  # 100 / 18
    for words, message in (
        (["--key", "u"], "has no table 'u'; it has 't'"), (["--key", "grid"], "has no table 'grid'"),
        (["--key", "t", "--runs", "arc"], "arc: is no ranking of the table"),
    ):  # fmt: skip
        with pytest.raises(SystemExit, match=message):
            streams_bytes.main([str(path), *words])
    del rows["random"]
    path.write_text(json.dumps({"t": table}))
    with pytest.raises(SystemExit, match="no row of 'random'"):
        streams_bytes.main([str(path), "--key", "t"])
    capsys.readouterr()
