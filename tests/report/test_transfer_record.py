"""Rows on other models in a plug-in: what is written, what stays, and what is refused before anything is measured."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from evomem import plugins
from evomem.cli.commands import transfer as command
from evomem.cli.commands.evolve import evolve
from evomem.errors import ConfigError, PluginError
from evomem.managers import build
from evomem.report import transfer_record
from evomem.report.tables import read_rows
from evomem.report.transfer import Cell, TransferRow, cells
from evomem.report.transfer_record import merged, open_record, record_row, write_record
from evomem.workers import WorkerOptions
from tests.report.test_transfer import conditions, travellers  # noqa: F401
from tests.workers.test_several_models import experiment, folders  # noqa: F401

TOLD = {"experiment": "mine", "models": [{"name": "home"}], "seed": 3, "fitness_curve": [{"generation": 0, "best": 1}]}
PNG = b"\x89PNG\r\n\x1a\n" + bytes(50)


def cell(model="away", budget=8, difference=0.5, task="t", best="keydiff", **changes):
    """A cell of the matrix; its interval is a quarter of a nat to either side."""
    given = {
        "model": model, "task": task, "budget": budget, "protocol": "compress_once/query_agnostic", "split": "sealed",
        "samples": 100, "score": None, "bytes_peak": 2048.0, "slots": 8.0, "seconds": 0.1, "subject": "mine",
        "train_model": "home", **changes,
    }  # fmt: skip
    interval = [difference - 0.25, difference + 0.25]
    mine = TransferRow(manager="mine", role="subject", loglik=-1.0, bytes_mean=2048.0, **given)
    full = TransferRow(manager="full", role="full", loglik=-0.25, bytes_mean=9e4, **{**given, "budget": None})
    other = TransferRow(
        manager=best, role="field", loglik=-1.0 - difference, bytes_mean=1024.0, difference=difference,
        interval=interval, **given,
    )  # fmt: skip
    return Cell(mine, full, other)


def record(folder, *found, dtype="float32", recalibrated=False):
    notes = write_record(open_record(folder), [(one, recalibrated) for one in found], dtype)
    return plugins.read(folder), notes


@pytest.fixture
def plug(tmp_path):
    manager = build("feature_scorer(budget=8)")
    torch.manual_seed(0)
    for tensor in manager.parameters():
        tensor.data.normal_()
    plugins.save(manager, tmp_path / "plug", TOLD, pictures={"fitness.png": PNG})
    return tmp_path / "plug"


def everything(root):
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_rows_are_those_of_the_matrix_and_everything_else_stays(tmp_path, folders, travellers, capsys):  # noqa: F811
    """The whole command: a plug-in, a NAMM with statistics collected anew, a heuristic."""
    before = [plugins.read(folder) for folder in travellers]
    path, measured_on = tmp_path / "transfer.json", conditions(folders, "llama", "gpt_neox")
    command.transfer(
        [*travellers, "snapkv"], "keydiff,random", measured_on, str(path), recalibrate=True, check=False, record=True
    )
    found = {(c.row.subject, c.row.model, c.row.budget): c for c in cells(read_rows(path, TransferRow))}
    assert "snapkv is no folder and is left alone" in capsys.readouterr().err
    for folder, old in zip(travellers, before, strict=True):
        new = plugins.read(folder)
        name, rows = old.provenance["experiment"], new.provenance["transfer"]
        assert {key: value for key, value in new.provenance.items() if key != "transfer"} == old.provenance
        assert all(
            torch.equal(a, b) for a, b in zip(*(p.manager.state_dict().values() for p in (old, new)), strict=True)
        )
        assert new.manager.describe() == old.manager.describe()
        assert len(rows) == 4 * (2 if name == "bam" else 1)
        for row in rows:
            one = found[name + " (recalibrated)" * row["recalibrated"], row["model"], row["budget"]]
            assert (row["loglik"], row["bytes_mean"]) == (one.row.loglik, one.row.bytes_mean)
            assert (row["full"], row["best"], row["difference"]) == (
                one.full.loglik, one.best.manager, one.best.difference
            )  # fmt: skip
            assert row["interval"] == list(one.best.interval)
        assert new.pictures["transfer.png"].startswith(PNG[:8])
        card = (Path(folder) / "README.md").read_text()
        assert card.count("| 6 sealed |") == len(rows)
        assert "](assets/transfer.png)" in card
        assert [item.name for item in Path(folder).parent.iterdir() if item.name.startswith(".")] == []


def test_the_same_cell_is_replaced_and_others_stay(plug):
    record(plug, cell("a"), cell("b"), cell("a", 16), cell("a", task="other"))
    found, notes = record(plug, cell("a", difference=-0.5), cell("c"), dtype="bfloat16")
    assert notes == []
    told = [(row["model"], row["task"], row["budget"], row["difference"]) for row in found.provenance["transfer"]]
    assert told == [
        ("a", "t", 8, -0.5),
        ("a", "t", 16, 0.5),
        ("a", "other", 8, 0.5),
        ("b", "t", 8, 0.5),
        ("c", "t", 8, 0.5),
    ]
    # Statistics collected anew, another protocol, and the whole context instead of one slot are other cells.
    others = [
        record_row(cell("a"), "float32", recalibrated=True),
        record_row(cell("a", protocol="streaming:512/query_agnostic"), "float32", recalibrated=False),
        record_row(cell("a", 1), "float32", recalibrated=False),
        record_row(cell("a", 1.0), "float32", recalibrated=False),
        record_row(cell("a"), "float32", recalibrated=False),
    ]
    assert len(merged(others, others)) == 5
    assert merged(others, []) == merged(merged(others, []), others)
    assert {key: found.provenance[key] for key in TOLD} == TOLD
    assert found.pictures["fitness.png"] == PNG
    assert record(plug, cell("c"), cell("a", difference=-0.5), dtype="bfloat16")[0].provenance == found.provenance


def test_rows_that_are_written_at_the_same_time_all_stay(plug, monkeypatch):
    """Each writer reads what is there, and takes its time before it writes."""
    monkeypatch.setattr(transfer_record, "_drawn", lambda rows: time.sleep(0.02) or PNG)
    models = [f"model{n}" for n in range(6)]
    with ThreadPoolExecutor(len(models)) as threads:
        list(threads.map(lambda model: record(plug, cell(model)), models))
    assert {row["model"] for row in plugins.read(plug).provenance["transfer"]} == set(models)


def test_the_card_says_where_it_is_better_and_where_worse(plug):
    record(plug, cell("home", difference=-2.0), cell("a|b", difference=2.0), cell("c", difference=-1.0), cell("d", 0.5))
    record(plug, cell("d", 0.5, difference=0.125, protocol="streaming:64/query_agnostic"), dtype="bfloat16")
    record(plug, cell("a|b", difference=-3.0), recalibrated=True)
    card = (plug / "README.md").read_text()
    assert "Found on home" in card
    # At home, and with other statistics, it has not been moved as it is.
    assert "Of 4 cells on 3 other models it is better than the best heuristic there in 2, worse in 1," in card
    assert (
        "| home (found on it) | t | 8 | -1.000 | -0.250 | keydiff (1.000) | *-2.000 [-2.250, -1.750]* | 2 | 1 |" in card
    )
    assert (
        "| a\\|b | t | 8 | -1.000 | -0.250 | keydiff (-3.000) | **+2.000 [+1.750, +2.250]** | 2 | 1 | 100 sealed |"
        in card
    )
    assert "| a\\|b (recalibrated) | t | 8 |" in card
    assert "| d | t, streaming:64/query_agnostic | 0.5 |" in card
    assert "| +0.125 [-0.125, +0.375] | 2 | 1 | 100 sealed, bfloat16 |" in card
    assert "where nothing else is said: compress_once/query_agnostic." in card
    assert "*recalibrated*: with its statistics" in card
    # Nothing measured against: a cell without a field.
    alone = cell("e")
    record(plug, Cell(alone.row, None, None))
    assert "| e | t | 8 | -1.000 | - | - | - | 2 | - | 100 sealed |" in (plug / "README.md").read_text()
    assert plugins.load(plug).pictures["transfer.png"].startswith(PNG[:8])


def test_many_rows_stay_within_the_limits_and_new_ones_come_first(plug, monkeypatch):
    monkeypatch.setattr("evomem.report.transfer_record._ROWS", 30)
    many = [cell(f"model-{number}", task="x" * 300) for number in range(40)]
    found, notes = record(plug, *many)
    assert len(found.provenance["transfer"]) == 30
    assert "room for 30 of 40 rows" in notes[0]
    monkeypatch.undo()
    # A provenance that has room for some rows only.
    limit = plugins.LIMITS["provenance.json"]
    told = {**TOLD, "long": "x" * (limit - (70 << 10))}
    plugins.save(plugins.load(plug), plug, told)
    found, notes = record(plug, *many, *[cell(f"model-{number}", task="y" * 300) for number in range(40, 120)])
    kept = [row["model"] for row in found.provenance["transfer"]]
    assert f"room for {len(kept)} of 120 rows" in notes[0]
    assert kept[-1] == "model-119"
    assert 0.97 * limit < (plug / "provenance.json").stat().st_size <= limit
    found, _ = record(plug, cell("newest"), *many[:5])
    assert {"newest", *(f"model-{number}" for number in range(5))} <= {r["model"] for r in found.provenance["transfer"]}
    assert found.provenance["long"] == told["long"]


def test_a_card_that_is_full_of_pictures_gets_no_more(plug):
    pictures = {f"p{number}.png": PNG for number in range(plugins.PICTURE_COUNT)}
    plugins.save(plugins.load(plug), plug, TOLD, pictures=pictures)
    found, notes = record(plug, cell())
    assert "transfer.png is not among them" in notes[0]
    assert found.pictures == pictures
    assert len(found.provenance["transfer"]) == 1


def test_without_numbers_or_matplotlib_the_table_is_still_written(plug, monkeypatch):
    odd = cell("$x_", difference=float("nan"))  # nobody answered
    found, notes = record(plug, odd, cell("b"), cell("$y^{"))
    assert notes == []
    assert found.provenance["transfer"][0]["interval"] is found.provenance["transfer"][0]["difference"] is None
    assert "transfer.png" in found.pictures
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found, notes = record(plug, cell("c"))
    assert "no transfer.png: plots need matplotlib, which cannot be imported" in notes[0]
    assert "](assets/transfer.png)" not in (plug / "README.md").read_text()
    assert len(found.provenance["transfer"]) == 4
    # What others have written there may be anything; it ends up as text, or as a dash.
    rows = [{"model": "m", "interval": ["NaN", "NaN"], "difference": "Infinity"}, {"budget": "x", "interval": 3}]
    plugins.save(plugins.load(plug), plug, {"transfer": rows})
    assert "| m |  | - | - | - | - | - | - | - |" in (plug / "README.md").read_text()


def test_what_cannot_be_written_is_said_before_anything_is_measured(plug, tmp_path, folders, monkeypatch):  # noqa: F811
    monkeypatch.setattr(command, "load", lambda *_: pytest.fail("a model was loaded"))
    before = everything(tmp_path)

    def refused(message, kind=PluginError, source=plug):
        with pytest.raises(kind, match=message):
            command.transfer(
                [str(source)], "none", conditions(folders, "llama"), None, recalibrate=False, check=False, record=True
            )

    refused("none of the subjects is a run or a plug-in folder", ConfigError, "keydiff")

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkdtemp", denied)
        refused(r"plug: rows cannot be written into it: Permission denied. Measure a copy")
    (plug / "notes.txt").write_text("mine")
    refused(r"plug: holds notes\.txt, which is none of a plug-in's files")
    (plug / "notes.txt").unlink()
    assert everything(tmp_path) == before
    for field, message in (
        ({"transfer": {"a": 1}}, r"transfer: a list of rows is expected.*Remove the field"),
        ({"transfer": [{"model": "a", "budget": [1]}]}, r"transfer\.0.*Remove the field"),
        ({"long": "x" * (plugins.LIMITS["provenance.json"] - (60 << 10))}, "no room for rows: without them it has"),
    ):
        plugins.save(plugins.load(plug), tmp_path / "bad", {**TOLD, **field}, card="mine\n")
        refused(message, source=tmp_path / "bad")


def test_another_manager_in_its_place_gets_no_rows_and_a_failure_leaves_the_old_whole(plug, monkeypatch):
    opened = open_record(plug)
    before = everything(plug)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(PluginError, match="No space left"):
            write_record(opened, [(cell(), False)], "float32")
    assert everything(plug) == before
    other = plugins.load(plug)
    other.get_parameter("weights").data.add_(1)
    plugins.save(other, plug)
    before = everything(plug)
    with pytest.raises(PluginError, match="another manager than the one that was measured"):
        write_record(opened, [(cell(), False)], "float32")
    assert everything(plug) == before


def test_a_link_and_a_run_lead_to_the_plug_in(plug, tmp_path, folders):  # noqa: F811
    (tmp_path / "link").symlink_to(plug, target_is_directory=True)
    record(tmp_path / "link", cell())
    assert (tmp_path / "link").is_symlink()
    assert len(plugins.read(plug).provenance["transfer"]) == 1
    run = tmp_path / "run"
    (tmp_path / "several.yaml").write_text(json.dumps(experiment(folders).resolved()))
    evolve(str(tmp_path / "several.yaml"), [], run, resume=False, workers=WorkerOptions(), again="")
    known = plugins.read(run / "winner" / "plugin")
    moved_rows = conditions(folders, "llama", budgets="8", samples=2)
    command.transfer([str(run)], "keydiff", moved_rows, None, recalibrate=False, check=False, record=True)
    found = plugins.read(run / "winner" / "plugin")
    assert [row["model"] for row in found.provenance["transfer"]] == [str(folders / "llama")]
    assert {key: found.provenance[key] for key in known.provenance} == known.provenance
    assert set(found.pictures) == {*known.pictures, "transfer.png"}
    assert json.loads((run / "result.json").read_text())["winner"]
