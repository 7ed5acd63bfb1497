"""Temporary folders: they go with their process, or the next process removes them, and never anybody else's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

from evomem.files import scratch
from evomem.files.scratch import LOCK, Scratch, sweep

HOLDS = """
import time
from evomem.files.scratch import Scratch
s = Scratch('x')
print(s.path, flush=True)
time.sleep(99)
"""


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_goes_with_its_owner_and_only_its_user_may_look(base):
    held, dropped = Scratch("x"), Scratch("x")
    assert held.path.stat().st_mode & 0o777 == 0o700
    assert held.path.parent == base
    assert sweep("x") == []
    (held.path / "a").write_text("a")
    del dropped
    assert list(base.iterdir()) == [held.path]
    child = os.fork()
    if child == 0:
        held.close()  # a fork's copy
        os._exit(0)
    os.waitpid(child, 0)
    assert sweep("x") == []  # nor does the fork's end let go of the lock
    held.close()
    held.close()
    assert list(base.iterdir()) == []


def test_the_next_process_removes_what_a_killed_one_has_left(base):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS], stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(base)}
    )
    path = base / process.stdout.readline().strip().rsplit("/", 1)[1]
    (path / "deep").mkdir()
    (path / "deep" / "file").write_text("gigabytes")
    assert sweep("x") == []
    process.kill()
    process.wait()
    assert sweep("y") == []
    seen = []
    assert sweep("x", before=seen.append) == [path] == seen
    assert list(base.iterdir()) == []


def test_what_is_not_a_dead_process_s_stays(base, monkeypatch):
    def left(name):
        folder = base / f"evomem-x-{name}"
        folder.mkdir()
        (folder / LOCK).touch()
        return folder

    kept = base / "kept"
    kept.mkdir()
    (kept / LOCK).touch()
    (base / "evomem-x-link").symlink_to(kept)
    (base / "evomem-x-file").write_text("a file")
    (base / "evomem-x-begun").mkdir()  # its maker is about to lock it
    full = base / "evomem-x-full"
    full.mkdir()
    (full / "data").write_text("of an earlier version, which may run")
    aliens = left("alien")
    (aliens / LOCK).unlink()
    (aliens / LOCK).symlink_to(kept / LOCK)  # not followed
    monkeypatch.setattr(scratch, "UNLOCKED_SECONDS", -1.0)
    os.utime(base / "evomem-x-begun")
    expected = set(base.iterdir()) - {base / "evomem-x-begun"}
    assert sweep("x") == []
    assert set(base.iterdir()) == expected
    mine = left("mine")
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    assert sweep("x") == []
    monkeypatch.undo()
    assert sweep("x", base) == [mine]


def test_makers_and_sweepers_at_once_lose_nothing(base):
    """A folder that was handed out stays until it is closed, however many sweep meanwhile."""
    over, lost = threading.Event(), []

    def sweeps():
        while not over.is_set():
            sweep("x")

    def makes():
        while not over.is_set():
            made = Scratch("x")
            try:
                (made.path / "a").write_text("a")
            except OSError as error:
                lost.append(error)
            if not (made.path / "a").exists() or not (made.path / LOCK).exists():
                lost.append(made.path)
            made.close()

    threads = [threading.Thread(target=what) for what in (sweeps, sweeps, makes, makes)]
    for thread in threads:
        thread.start()
    time.sleep(0.7)
    over.set()
    for thread in threads:
        thread.join()
    assert lost == []
    for left in base.iterdir():
        shutil.rmtree(left)


def test_a_disk_without_locks_still_gives_folders(base, monkeypatch):
    def refuses(*arguments):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(scratch.fcntl, "flock", refuses)
    made = Scratch("x")
    assert made.path.is_dir()
    assert sweep("x") == []
    made.close()
    assert list(base.iterdir()) == []
