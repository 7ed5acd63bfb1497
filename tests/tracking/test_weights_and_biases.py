"""Weights & Biases: a run there holds what the journal holds, offline and online, whatever happened on the way."""

from __future__ import annotations

import os
import socket
import sys

import numpy as np
import pytest

from evomem.runs import open_run
from evomem.tracking import (
    WandbTracker,
    replay,
)
from evomem.tracking.weights_and_biases import run_id
from tests.cli.test_cli import world  # noqa: F401 (a fixture)
from tests.support.tracked_runs import broken_and_resumed, check_wandb, expected, whole


def test_wandb_offline_holds_the_journal_and_the_winner(tmp_path, finished, capfd):
    replay(open_run(finished), WandbTracker(finished, out=tmp_path))
    assert capfd.readouterr() == ("", "")
    summary, code, where = check_wandb(finished, tmp_path)
    result = open_run(finished).result
    assert (summary["status"], summary["winner"], code) == ("finished", result.winner, 0)
    assert summary["sealed/fitness"] == result.sealed.fitness
    copied = where / "files" / "winner" / "vector.npy"
    assert not copied.is_symlink()
    assert np.array_equal(np.load(copied), result.vector)


def test_wandb_offline_is_written_whole_at_every_end(tmp_path):
    """Live, after an interruption and after the end, each time one folder with all generations."""
    folder, ends = tmp_path / "run", []

    class Watched(WandbTracker):
        def finish(self, summary):
            super().finish(summary)
            ends.append(check_wandb(folder, folder, len(expected(folder)))[:2])

    broken_and_resumed(folder, lambda: Watched(folder))
    assert [(summary["status"], code) for summary, code in ends] == [("interrupted", 255), ("finished", 0)]
    assert len(expected(folder)) == 3


@pytest.mark.parametrize("lost", [0, 1])
def test_wandb_online_has_every_generation_once_after_an_interruption(tmp_path, server, lost, capfd):
    """Also when W&B has not received everything that the journal of a killed run holds."""
    folder, trackers = tmp_path / "run", []

    def make():
        for place in sorted(server.history)[len(server.history) - lost if trackers else 0 :]:
            del server.history[place]
        trackers.append(WandbTracker(folder, mode="online", project="memory"))
        return trackers[-1]

    broken_and_resumed(folder, make)
    assert server.exits == [255, 0]
    lines = expected(folder)
    assert [line["_step"] for line in server.lines()] == [0, 1, 2]
    for line, wanted in zip(server.lines(), lines, strict=True):
        assert {name: line[name] for name in wanted} == pytest.approx(wanted)
    assert server.files["winner/vector.npy"] == (folder / "winner" / "vector.npy").read_bytes()
    assert trackers[-1].url.endswith(f"/runs/{run_id(folder)}")
    said = b"".join(server.asked)
    assert b'"project":"memory"' in said
    assert b'"program":"evomem"' in said
    for private in (socket.gethostname(), str(tmp_path), sys.argv[0], os.environ.get("USER") or "root"):
        assert f'"{private}'.encode() not in said
    assert capfd.readouterr() == ("", "")


def test_a_run_keeps_its_id_when_it_moves_and_shares_it_with_none(tmp_path, finished):
    whole(tmp_path / "run")
    before = run_id(tmp_path / "run")
    assert before != run_id(finished)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert run_id(tmp_path / "moved") == before
