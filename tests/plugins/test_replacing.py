"""Plug-ins saved over what is there: only plug-ins are replaced, whole, and what is not ours stays."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from evomem import plugins
from evomem.errors import PluginError
from evomem.managers import KeyDiff, build
from evomem.plugins.replacing import current, write_folder
from tests.plugins.test_plugins import SPECS, randomised


@pytest.fixture
def folder(tmp_path):
    plugins.save(randomised(SPECS[3]), tmp_path / "plug", {"experiment": "mine", "numbers": [1, 0.1, None]})
    return tmp_path / "plug"


def test_only_plug_ins_are_replaced(folder, tmp_path):
    plugins.save(build("keydiff"), folder, {})
    assert isinstance(plugins.load(folder), KeyDiff)
    (tmp_path / "mine").mkdir()
    plugins.save(build("keydiff"), tmp_path / "mine", {})  # empty
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(PluginError, match=r"other: exists and is no plug-in"):
        plugins.save(build("keydiff"), tmp_path / "other", {})
    assert (tmp_path / "other" / "thesis.tex").read_text() == "x"


@pytest.mark.parametrize("good_calls", range(6))
def test_a_full_disk_leaves_the_old_plug_in_whole(good_calls, folder, tmp_path, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    calls, real = [], os.fsync

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) > good_calls:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(PluginError, match="No space left"):
        plugins.save(build("keydiff"), folder, {})
    monkeypatch.undo()
    if good_calls < 5:  # the sixth call comes after the new one is in place
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    plugins.load(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["plug"]


def test_what_a_killed_process_left_is_cleared_up(folder, tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".plug.partial-{dead.pid}").mkdir()
    folder.rename(tmp_path / f".plug.replaced-{dead.pid}")  # by an evomem that moved the old one away
    mine = tmp_path / f".plug.partial-0{dead.pid}"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")  # looks like ours, and is not
    plugins.save(build("keydiff"), folder, {})
    assert isinstance(plugins.load(folder), KeyDiff)
    assert sorted(path.name for path in tmp_path.iterdir()) == [mine.name, "plug"]
    assert (mine / "thesis.tex").read_text() == "x"


def clone(folder) -> dict[str, bytes]:
    """Make a plug-in look like a clone with a history; return what must stay."""
    (folder / ".git" / "objects").mkdir(parents=True)
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    (folder / "assets").mkdir(exist_ok=True)
    (folder / "assets" / ".keep").write_text("")
    return hidden(folder)


def hidden(folder) -> dict[str, bytes]:
    names = {path: path.relative_to(folder).parts for path in folder.rglob("*") if path.is_file()}
    return {str(path): path.read_bytes() for path, parts in names.items() if any(p.startswith(".") for p in parts)}


PNG = b"\x89PNG\r\n\x1a\n"


def test_a_clone_keeps_its_history_and_a_folder_its_inode(folder, tmp_path):
    plugins.save(plugins.load(folder), folder, {}, pictures={"old.png": PNG})
    before, inode = clone(folder), folder.stat().st_ino
    (tmp_path / "link").symlink_to("plug")
    plugins.save(build("keydiff"), tmp_path / "link", {}, pictures={"new.png": PNG})
    assert isinstance(plugins.load(folder), KeyDiff)
    assert hidden(folder) == before
    assert folder.stat().st_ino == inode
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in (folder / "assets").iterdir()) == [".keep", "new.png"]
    empty = tmp_path / "empty"
    (empty / ".git").mkdir(parents=True)
    plugins.save(build("keydiff"), empty, {})
    assert isinstance(plugins.load(empty), KeyDiff)


@pytest.mark.parametrize("name", ["notes.txt", "src", "assets/data.csv", "assets/Fancy name.png", "LICENSE"])
def test_a_file_that_is_none_of_a_plug_ins_is_refused_and_stays(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(PluginError, match=f"holds {name}, which is none"):
        plugins.save(build("keydiff"), folder, {})
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_links_in_a_folder_are_replaced_and_what_they_lead_to_stays(folder, tmp_path):
    (tmp_path / "card.md").write_text("mine")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(tmp_path / "card.md")
    plugins.save(build("keydiff"), folder, {})
    assert (tmp_path / "card.md").read_text() == "mine"
    assert not (folder / "README.md").is_symlink()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "mine.png").write_bytes(PNG)
    (folder / "assets").symlink_to(tmp_path / "pictures")
    with pytest.raises(PluginError, match="assets"):
        plugins.save(build("keydiff"), folder, {}, pictures={"a.png": PNG})
    assert (tmp_path / "pictures" / "mine.png").exists()


def test_the_working_folder_can_be_exported_into(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    plugins.save(build("keydiff"), ".", {})
    assert isinstance(plugins.load("."), KeyDiff)
    assert os.path.samefile(os.getcwd(), tmp_path / "here")
    for name in ("/", "a" * 300, "nul\0", "../here/../" + "b" * 300):
        with pytest.raises(PluginError):
            plugins.save(build("keydiff"), name, {})


class Killed(BaseException):
    """What no handler catches."""


def killing(monkeypatch, after: int) -> list[int]:
    """Make the ``after``-th change on the disk the last one, as a kill does; return a list with the changes so far."""
    done: list[int] = []

    def dying(real):
        def change(*arguments, **options):
            if len(done) >= after:
                raise Killed
            done.append(1)
            return real(*arguments, **options)

        return change

    for place, name in ((os, "replace"), (os, "fsync"), (os, "rename"), (os, "mkdir"), (os, "unlink"), (os, "rmdir")):
        monkeypatch.setattr(place, name, dying(getattr(place, name)))
    return done


def test_a_kill_at_any_moment_leaves_the_old_plug_in_or_the_new_one_and_the_history(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a change on the disk too, and a slow one
    old = {"config.json": b"old", "README.md": b"old", "assets/old.png": PNG}
    new = {"config.json": b"new", "README.md": b"new", "model.safetensors": b"new", "assets/new.png": PNG}

    def read(folder):
        place = current(folder)
        files = (path for path in place.rglob("*") if path.is_file())
        names = {path.relative_to(place).as_posix(): path for path in files}
        return {name: path.read_bytes() for name, path in names.items() if "/." not in f"/{name}"}

    seen, after, whole = [], 0, False
    while not whole:
        here = tmp_path / f"kill{after}" / "plug"
        write_folder(here, old)
        before = clone(here)
        with pytest.MonkeyPatch.context() as patch:
            killing(patch, after)
            try:
                write_folder(here, new)
                whole = True
            except Killed:
                pass
        seen.append(read(here))
        assert seen[-1] == new or (seen[-1] == old and not whole)
        assert before.items() <= hidden(here).items()
        write_folder(here, new)
        assert read(here) == new
        assert current(here) == here
        assert hidden(here) == before
        assert [path.name for path in here.parent.iterdir()] == ["plug"]
        after += 1
    assert after > 20
    assert seen[0] == old
