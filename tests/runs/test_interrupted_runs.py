"""Runs that were interrupted, damaged, or ran out of disk end as those that were not."""

from __future__ import annotations

import json
import os
import resource
import signal

import pytest

from evomem.errors import RunError
from evomem.runs import search
from evomem.runs.journal import Journal
from tests.support.interrupted_search import SMALL, Interrupted, Stop, broken_off, outcome, same
from tests.support.synthetic_search import ToyEvaluator, experiment, factory


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    search(experiment(*SMALL), folder, factory(ToyEvaluator()))
    return outcome(folder)


@pytest.mark.parametrize("every", [2, 7, 16, 29])
def test_interrupted_again_and_again(tmp_path, undisturbed, every):
    config, sessions = experiment(*SMALL), 0
    while True:
        sessions += 1
        try:
            search(config, tmp_path / "run", factory(Interrupted(every)), resume=True)
            break
        except Stop:
            assert sessions < 200
    assert sessions > 1
    same(outcome(tmp_path / "run"), undisturbed)


@pytest.mark.parametrize("damaged", [1, 2])
@pytest.mark.parametrize("how", ["truncate", "flip", "empty"])
def test_damaged_checkpoints(tmp_path, undisturbed, damaged, how, caplog):
    folder = tmp_path / "run"
    broken_off(folder)
    files = sorted((folder / "checkpoints").iterdir())
    assert len(files) == 2
    for path in files[-damaged:]:
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes({"truncate": content[:-7], "flip": content, "empty": b""}[how])
    search(experiment(*SMALL), folder, factory(ToyEvaluator()), resume=True)
    assert caplog.text.count("is damaged") == damaged
    same(outcome(folder), undisturbed)


def test_without_any_checkpoint_the_journal_is_enough(tmp_path, undisturbed):
    folder = tmp_path / "run"
    broken_off(folder, after=60)
    for path in (folder / "checkpoints").iterdir():
        path.unlink()
    search(experiment(*SMALL), folder, factory(ToyEvaluator()), resume=True)
    same(outcome(folder), undisturbed)


@pytest.mark.parametrize("cut", [1, 20, 300])
def test_a_torn_last_line_is_cut_off(tmp_path, undisturbed, cut, caplog):
    folder = tmp_path / "run"
    broken_off(folder)
    journal = folder / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-cut])
    search(experiment(*SMALL), folder, factory(ToyEvaluator()), resume=True)
    assert "torn" in caplog.text
    same(outcome(folder), undisturbed)


def test_a_damaged_line_in_the_middle_is_evaluated_again(tmp_path, undisturbed, caplog):
    folder = tmp_path / "run"
    broken_off(folder)
    lines = (folder / "journal.jsonl").read_bytes().splitlines(keepends=True)
    place = max(i for i, line in enumerate(lines) if b'"unit"' in line) - 1
    lines[place] = b"\0" * 40 + b"\n"
    (folder / "journal.jsonl").write_bytes(b"".join(lines))
    search(experiment(*SMALL), folder, factory(ToyEvaluator()), resume=True)
    assert f"line {place + 1} is damaged" in caplog.text
    same(outcome(folder), undisturbed)


def test_a_full_disk_says_so_and_the_run_goes_on_later(tmp_path, undisturbed):
    folder = tmp_path / "run"
    full = os.open("/dev/full", os.O_WRONLY)

    class Filling(ToyEvaluator):
        def evaluate(self, *arguments, **options):
            if len(self.calls) == 30:
                target = str(folder / "journal.jsonl")
                for name in os.listdir("/proc/self/fd"):
                    if os.path.realpath(f"/proc/self/fd/{name}") == target:
                        os.dup2(full, int(name))
            return super().evaluate(*arguments, **options)

    with pytest.raises(RunError, match=r"disk is full.*resume"):
        search(experiment(*SMALL), folder, factory(Filling()))
    os.close(full)
    search(experiment(*SMALL), folder, factory(ToyEvaluator()), resume=True)
    same(outcome(folder), undisturbed)


def test_a_line_that_the_disk_took_half_of_is_taken_back(tmp_path):
    """A limit on the file's size in a process of its own: the kernel writes what fits, then refuses."""
    path = tmp_path / "j.jsonl"
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        journal = Journal(path)
        journal.append({"kind": "event", "event": "one"})
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 9, resource.RLIM_INFINITY))
        try:
            journal.append({"kind": "event", "event": "two"})
        except RunError:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            journal.append({"kind": "event", "event": "three"})
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["one", "three"]
