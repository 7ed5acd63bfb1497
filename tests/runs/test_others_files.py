"""What users have on their disk: no command removes or replaces what evomem did not make."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from evomem.cli.commands.track import track
from evomem.errors import ConfigError, RunError
from evomem.evaluation.traces.recording import _locked
from evomem.files.atomic import is_temporary, sweep, write_atomically
from evomem.report.outputs import claim
from evomem.runs import search
from tests.support.synthetic_search import ToyEvaluator, experiment, factory


def everything(folder: Path) -> dict[str, object]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else path.is_symlink()
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def home(tmp_path) -> Path:
    """A folder that is somebody's, with hidden files that look a little like ours."""
    folder = tmp_path / "home"
    (folder / "deep" / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    for name in (
        "thesis.tex", ".notes.tmp", "deep/.mail.tmp", "deep/checkpoints/.x.12.evomem.tmp", ".config.yaml.7.tmp",
        "checkpoints/000001-0told.ckpt", "checkpoints/.a.1.evomem.tmp", "owner.json",
    ):  # fmt: skip
        (folder / name).write_text("mine")
    (folder / ".link.1.evomem.tmp").symlink_to(folder / "thesis.tex")
    return folder


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_in_a_strangers_folder_is_refused_before_anything_is_written(home, resume):
    before = everything(home)
    with pytest.raises(RunError, match="no run folder"):
        search(experiment(), home, factory(ToyEvaluator()), resume=resume)
    assert everything(home) == before


@pytest.mark.parametrize("text", ["server: {port: 80}", "just text", "[1, 2]", "a: [", ""])
@pytest.mark.parametrize("resume", [False, True])
def test_a_config_yaml_of_another_program_is_no_run(home, text, resume):
    (home / "config.yaml").write_text(text)
    before = everything(home)
    with pytest.raises(RunError):
        search(experiment(), home, factory(ToyEvaluator()), resume=resume)
    assert everything(home) == before


def test_a_run_sweeps_what_its_own_writes_left_and_nothing_else(tmp_path):
    folder = tmp_path / "run"
    search(experiment(), folder, factory(ToyEvaluator()))
    (folder / "result.json").unlink()
    ours = [folder / ".config.yaml.17.evomem.tmp", folder / "start" / ".vector.npy.17.evomem.tmp"]
    theirs = [folder / ".notes.tmp", folder / "start" / ".x.tmp", folder / "mine" / ".y.3.evomem.tmp"]
    (folder / "mine").mkdir()
    for path in (*ours, *theirs):
        path.write_text("x")
    (tmp_path / "target").write_text("x")
    (folder / ".link.1.evomem.tmp").symlink_to(tmp_path / "target")
    search(experiment(), folder, factory(ToyEvaluator()), resume=True)
    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in theirs)
    assert (folder / ".link.1.evomem.tmp").is_symlink()


def test_what_a_killed_write_leaves_is_known_by_its_name(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # as after a kill: nobody tidies up
        with pytest.raises(KeyboardInterrupt):
            write_atomically(tmp_path / "a.json", b"x")
    (left,) = tmp_path.iterdir()
    assert is_temporary(left)
    (tmp_path / "folder").symlink_to(tmp_path)
    sweep(tmp_path / "folder", tmp_path / "absent", left)
    assert left.exists()
    sweep(tmp_path)
    assert not left.exists()


def test_traces_in_a_strangers_folder_are_refused_before_anything_is_written(home):
    before = everything(home)
    with pytest.raises(RunError, match="no trace folder"), _locked(home):
        pass
    assert everything(home) == before


# ---- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../out", "/etc/x", "a/b", "a\\b", "..", ".", ".hidden", "nul\0", "line\nbreak", "x" * 300, "ü" * 60, "CON",
     "nul.x", "a:b", "tail.", " a", "esc\x1b[2J", ""],
)  # fmt: skip
def test_the_name_of_an_experiment_leads_nowhere_else(name):
    import json

    with pytest.raises(ConfigError, match="name"):
        experiment(f"name={json.dumps(name)}")


@pytest.mark.parametrize("name", ["demo", "my run 2", "été-1.5", "a..b", "con_1"])
def test_names_that_a_folder_may_have(name):
    assert experiment(f"name={name}").name == name


# ---- outputs -------------------------------------------------------------------------------------------------------


def beside(path: Path) -> list[Path]:
    return [path.with_suffix(".md")]


def test_rows_replace_rows_and_nothing_else(tmp_path):
    rows, other = tmp_path / "rows.json", tmp_path / "data.json"
    assert claim("--json", None) is None
    assert claim("--json", "-") == "-"
    assert claim("--json", str(rows), beside) == str(rows)
    rows.write_text('[{"task": "t", "loglik": 1}]')
    rows.with_suffix(".md").write_text("of these rows")
    (tmp_path / "link.json").symlink_to(rows)
    assert claim("--json", str(tmp_path / "link.json"), beside) == str(rows)
    other.write_text('{"a": 1}')
    for bad in (other, tmp_path, Path("/dev/null"), Path("/dev/stdout"), tmp_path / ("x" * 260), tmp_path / "nul\0"):
        with pytest.raises(ConfigError, match="--json"):
            claim("--json", str(bad), beside)
    (tmp_path / "new.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"new\.md is there and would be lost"):
        claim("--json", str(tmp_path / "new.json"), beside)
    with pytest.raises(ConfigError, match="ending"):
        claim("--json", str(tmp_path / "fresh.md"), beside)
    assert other.read_text() == '{"a": 1}'


def test_a_track_of_somebody_else_is_not_replaced(tmp_path):
    folder = tmp_path / "run"
    search(experiment(), folder, factory(ToyEvaluator()))
    out = tmp_path / "out"
    track(str(folder), "jsonl", None, None, out)
    first = (out / "track.jsonl").read_bytes()
    track(str(folder), "jsonl", None, None, out)
    assert (out / "track.jsonl").read_bytes() == first
    (out / "track.jsonl").write_text("lap times\n")
    with pytest.raises(RunError, match="tells of no run"):
        track(str(folder), "jsonl", None, None, out)
    assert (out / "track.jsonl").read_text() == "lap times\n"
