"""The script of the memory matrix's tables: what it cannot measure, it says in a sentence before it measures."""

from __future__ import annotations

import json

import pytest

from evomem import plugins
from evomem.managers import build
from experiments.zoo import matrix_recall

SMALL = ("--tasks", "zoo_recall:length=64,pairs=4", "--samples", "2")


def test_rows_are_those_of_the_arms_and_the_means_of_their_seeds(tmp_path, capsys):
    for seed in (0, 1):
        plugins.save(build("fifo", budget=3), tmp_path / f"oldest-{seed}")
    sources = [str(tmp_path / f"oldest-{seed}") for seed in (0, 1)]
    path = tmp_path / "new" / "rows.json"
    matrix_recall.main(["fifo", *sources, *SMALL, "--slots", "8,32", "--json", str(path)])
    (rows,) = json.loads(path.read_text())["tasks"].values()
    known = {(row["memory"], row["budget"]): row for row in rows}
    assert len(rows) == len(known) == 1 + 2 + 1 + 2 * 2  # emptied, own writing, full, and two arms
    for slots in (8, 32):
        one, two = known["fifo", slots], known["oldest", slots]
        assert (one["seeds"], two["seeds"]) == (1, 2)
        assert one["nats"] == pytest.approx(two["nats"])
        assert one["slots"] <= slots
        assert one["ahead"] == pytest.approx(one["nats"] - known["own writing", slots]["nats"])
    assert "| oldest | 8 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nosuch"], "nosuch"), (["runs/no/such"], "runs/no/such"), (["fifo", "fifo"], "fifo is there twice"),
        (["full"], "full: holds .* rows where at most 32 are compared"),
        (["--samples", "1"], "--samples 1: give at least 2"), (["--every", "0"], "--every 0"),
        (["--seed", "-1"], "--seed -1"), (["--slots", "4"], "--slots 4: a decision every 4"),
        (["--slots", "33"], "has 32 slots"), (["--tasks", "nosuch"], "nosuch"),
        (["--tasks", "zoo_recall:pairs=x"], "pairs"), (["--tasks", "zipf"], "streams of requests"),
        (["--model", "zoo-qwen3"], "zoo-qwen3 has no memory matrix"), (["--model", "no/such"], "no/such"),
        (["--json", "/dev/null/rows.json"], "/dev/null"), (["surprise_of_nobody(x=1)"], "surprise_of_nobody"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_said_in_a_sentence(words, message):
    with pytest.raises(SystemExit, match=message):
        matrix_recall.main([*words, *([] if "--samples" in words else ["--samples", "2"])])


def test_slots_that_are_no_numbers_are_refused(capsys):
    for text in ("", "8,", "eight", "-8", "²"):
        with pytest.raises(SystemExit):
            matrix_recall.main([f"--slots={text}"])
        assert "give whole numbers of at least 1" in capsys.readouterr().err
