"""Runs: whatever lies in a run folder, reading it gives what was written, or an error that names the file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from evomem.cli.app import app
from evomem.cli.commands.export import export
from evomem.errors import EvomemError, RunError
from evomem.files import atomic as files
from evomem.report import evolving
from evomem.report.plots import fitness_plot
from evomem.report.subjects import resolve
from evomem.report.tables import read_rows
from evomem.runs import open_run, search
from evomem.runs.front import read_front
from evomem.runs.pools import limited_threads
from evomem.tracking import JsonlTracker
from evomem.tracking.replay import replay
from tests.support.interrupted_search import SMALL, Interrupted, Stop, outcome, same
from tests.support.processes import elsewhere
from tests.support.synthetic_search import ToyEvaluator, experiment, factory


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def everything(folder, out):
    """Read all that commands read of a run."""
    found = open_run(folder)
    found.totals()
    found.generations()
    if found.result is not None:
        found.result.lines()
        np.isfinite(found.winner_vector).all()
        export(str(folder), Path(tempfile.mkdtemp(dir=out)) / "mine")
    found.space  # noqa: B018
    read_front(folder)
    replay(found, JsonlTracker(out / "told.jsonl"))


READ = ["config.yaml", "journal.jsonl", "result.json", "start/state.safetensors", "winner/vector.npy"]
RESUMED = ["config.yaml", "journal.jsonl", "start/state.safetensors", "start/vector.npy", "start/provenance.json"]


def odd(path):
    """Yield the ways in which a file may be odd: done to it one after the other."""
    content = path.read_bytes()
    for text in (b"", b"\0" * 64, b"[" * 100_000, b"{}", b"[]", b"null", b'"x"', b"1e999", b"\xff\xfe", b"9" * 6000):
        path.write_bytes(text)
        yield text[:8]
    for cut in (1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:cut])
        yield f"cut at {cut}"
    path.unlink()
    path.mkdir()
    yield "a folder"
    path.rmdir()
    os.mkfifo(path)
    yield "a pipe"
    path.unlink()
    path.symlink_to("/dev/zero")
    yield "no end"
    path.unlink()
    path.symlink_to(path)
    yield "a circle"
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("name", READ)
def test_odd_files_of_a_finished_run(run, name, tmp_path):
    for how in odd(run / name):
        before = how
        with suppress(EvomemError):
            everything(run, tmp_path)
    assert before == "a circle"
    everything(run, tmp_path)


@pytest.mark.parametrize("name", RESUMED)
def test_odd_files_of_a_run_that_is_resumed(stopped, name, tmp_path):
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    for how in odd(run / name):
        before = run / name
        with pytest.raises((EvomemError, Stop)) as ended:
            search(experiment(*SMALL), run, factory(Interrupted(0)), resume=True)
        if ended.type is not Stop:
            assert str(ended.value), how
        if name == "journal.jsonl" and before.is_file() and not before.is_symlink():
            shutil.rmtree(run)  # it has been gone on with
            shutil.copytree(stopped, run)


# ---- what a folder may not do -----------------------------------------------------------------------------------


class Payload:
    def __reduce__(self):
        return (os.system, ("touch {}",))


def test_a_checkpoint_of_an_earlier_evomem_is_not_unpickled_and_the_run_goes_on(stopped, finished, tmp_path, caplog):
    """Its journal has all; a stranger's folder runs nothing."""
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    code = pickle.dumps(Payload()).replace(b"touch {}", f"touch {tmp_path}/x".encode()[:8])
    for name in ("000001-asked.ckpt", "000002-0told.ckpt"):
        content = code
        (run / "checkpoints" / name).write_bytes(b"evomem checkpoint 1\n" + hashlib.sha256(content).digest() + content)
    pickled = []
    real, pickle.loads = pickle.loads, lambda *arguments, **options: pickled.append(arguments)
    try:
        search(experiment(*SMALL), run, factory(ToyEvaluator()), resume=True)
    finally:
        pickle.loads = real
    assert not pickled
    assert "pickles are not read" in caplog.text
    same(outcome(run), outcome(finished))


def test_checkpoints_of_another_run_count_for_nothing(stopped, finished, tmp_path, caplog):
    run, other = Path(shutil.copytree(stopped, tmp_path / "run")), tmp_path / "other"
    with pytest.raises(Stop):
        search(experiment(*SMALL, "seed=7"), other, factory(Interrupted(60)))
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(other / "checkpoints", run / "checkpoints")
    search(experiment(*SMALL), run, factory(ToyEvaluator()), resume=True)
    assert "belongs to another run" in caplog.text
    same(outcome(run), outcome(finished))


@pytest.mark.parametrize("name", ["journal.jsonl", "start/vector.npy", "start/state.safetensors"])
def test_a_journal_or_start_of_another_run_is_refused(stopped, tmp_path, name):
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    if name == "journal.jsonl":
        with pytest.raises(Stop):
            search(experiment(*SMALL, "seed=7"), tmp_path / "other", factory(Interrupted(60)))
        shutil.copyfile(tmp_path / "other" / name, run / name)
    elif name.endswith("npy"):
        files.write_vector(run / name, np.ones(6))
    else:
        tensors = safetensors.torch.load((run / name).read_bytes())
        tensors["first"][0, 0] += 1
        (run / name).write_bytes(safetensors.torch.save(tensors))
    with pytest.raises(RunError, match="is of another run, or files have been exchanged"):
        search(experiment(*SMALL), run, factory(ToyEvaluator()), resume=True)


@pytest.mark.parametrize("name", ["result.json", "winner/vector.npy", "start/state.safetensors"])
def test_a_changed_digit_of_a_finished_run_is_noticed(run, name):
    content = bytearray((run / name).read_bytes())
    place = len(content) - 60 if name == "result.json" else len(content) - 3
    content[place] ^= 1
    (run / name).write_bytes(content)
    with pytest.raises(RunError, match=name.rpartition("/")[2]):
        open_run(run).winner  # noqa: B018


@pytest.mark.parametrize(("name", "value"), [
    ("winner", "zzz"), ("winner", "start"), ("winner", 3), ("generations", 10**300), ("generations", -1),
    ("generations", 2), ("generations", True), ("front", -1), ("front", 9), ("front", 0.5), ("stopped", 7),
    ("finalists", {}), ("spent", []), ("spent", {}), ("sealed", {}),
])  # fmt: skip
def test_a_result_without_a_checksum_is_believed_only_where_it_can_be_true(run, name, value):
    """An earlier evomem wrote none, so taking the checksum away must not make anything of it true."""
    path = run / "result.json"
    data = {key: part for key, part in json.loads(path.read_text()).items() if key not in ("line", "check", "files")}
    path.write_text(json.dumps(data))
    assert open_run(run).result.winner == data["winner"]
    path.write_text(json.dumps({**data, name: value}))
    with pytest.raises(RunError, match=r"result\.json.*resume the run"):
        open_run(run).result  # noqa: B018


@pytest.mark.parametrize("which", ["plugin", "vector"])
def test_a_winner_that_is_not_its_plug_in_is_refused(run, tmp_path, which):
    if which == "plugin":
        path = run / "winner" / "plugin" / "model.safetensors"
        tensors = safetensors.torch.load(path.read_bytes())
        path.write_bytes(safetensors.torch.save({name: value + 1 for name, value in tensors.items()}))
    else:  # of an earlier evomem, which kept no digests
        path = run / "result.json"
        data = json.loads(path.read_text())
        path.write_text(json.dumps({key: data[key] for key in data if key not in ("line", "check", "files")}))
        assert resolve(str(run)).name == open_run(run).config.name
        files.write_vector(run / "winner" / "vector.npy", open_run(run).winner_vector + 1)
        with pytest.raises(RunError, match="not the same manager"):
            resolve(str(run))
    with pytest.raises(RunError, match="not the same manager"):
        export(str(run), tmp_path / "mine")


def test_rows_are_a_list(tmp_path):
    (tmp_path / "rows.json").write_text("{}")
    with pytest.raises(RunError, match="a list of rows"):
        read_rows(tmp_path / "rows.json")


# ---- disks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_disk_that_refuses_pictures_leaves_none_half(run, tmp_path, monkeypatch, number):
    path = tmp_path / "fitness.png"
    fitness_plot(path, open_run(run).generations(), None, "before")
    before = path.read_bytes()

    def refuse(*_):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(RunError, match=r"fitness\.png"):
        fitness_plot(path, open_run(run).generations(), None, "after")
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith(".")] == []


def test_a_folder_that_cannot_be_written_is_one_line(run, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr("evomem.cli.commands.track.track", refuse)
    done = CliRunner().invoke(app, ["track", str(run), "--to", "jsonl"])
    assert done.exit_code == 2
    assert f"error: {tmp_path}: Permission denied" in done.output
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file.*cannot be written|is a file"):
        search(experiment(*SMALL), tmp_path / "file" / "run", factory(ToyEvaluator()))


def product():
    """Threads, and a number whose last digits depend on how many there are."""
    torch.manual_seed(0)
    return torch.get_num_threads(), (torch.randn(300, 3001) @ torch.randn(3001, 300)).sum().item().hex()


def final_comparison(folder):
    """What the comparison after a search computes with on a machine of three cores."""
    torch.set_num_threads(3)
    assert product()[0] == 3
    evolving.search = lambda *_, **__: SimpleNamespace(lines=list)
    evolving.open_run = evolving.read_front = lambda folder: []
    seen = []

    def compare(*_):
        seen.append(product())
        raise Stop

    evolving._comparison = compare
    with pytest.raises(Stop):
        evolving.evolve("demo", out=folder)
    return seen


def test_the_final_comparison_computes_with_the_experiments_threads(tmp_path):
    """Whatever the machine has: another number of threads moves the last digits."""
    with limited_threads(1):
        assert elsewhere(final_comparison, tmp_path / "none") == [product()]
