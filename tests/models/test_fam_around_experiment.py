"""The experiment of feedback around a frozen decoder: its texts, its rows, and what it says to bad input."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import evomem
from evomem.tasks import Split
from experiments import fam_around


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fam_around", *arguments])
    fam_around.main()


def test_texts_end_in_an_answer_that_they_state():
    tokenizer = evomem.load_model("zoo-qwen3").tokenizer
    given = fam_around.texts(tokenizer, 12, 96, 64, Split.SEALED, 0)
    assert given.ids.shape == (12, 96)
    behind = []
    for row in given.ids.tolist():
        key, answer = row[-given.answer - 2 : -given.answer], row[-given.answer :]  # magic KEY
        places = [at for at in range(90) if row[at : at + 6] == [*key, *answer]]
        assert len(places) == 1
        behind.append(places[0] + 7 <= 96 - 64)  # and a full stop
    assert given.behind == behind
    assert {True, False} == set(behind)
    differing = (given.ids != given.changed).sum(1)
    assert (differing == given.answer).all()  # the needle's digits, all of them, and nothing else
    assert torch.equal(given.ids[:, -6:], given.changed[:, -6:])
    again = fam_around.texts(tokenizer, 12, 96, 64, Split.SEALED, 0)
    assert torch.equal(given.ids, again.ids)


def test_every_row_is_measured(monkeypatch, tmp_path, capsys):
    file = tmp_path / "rows.json"
    run(monkeypatch, "--seeds", "0", "--steps", "1", "--generations", "1", "--texts", "8", "--blocks", "1,4", "--batch",
        "2", "--population", "4", "--evolution-batch", "1", "--json", str(file))  # fmt: skip
    said = json.loads(file.read_text())
    assert [row["row"] for row in said["rows"]] == list(fam_around.ROWS)
    rows = {row["row"]: row for row in said["rows"]}
    assert (
        rows["stock"]["1"]["all"]["text_right"] == rows["blocks"]["1"]["all"]["text_right"]
    )  # one block is all there is
    assert rows["stock"]["1"]["behind"] is None
    assert rows["stock"]["4"]["behind"]["nats"] > rows["blocks"]["4"]["behind"]["nats"] + 1
    flow = {name: row["4"]["behind"]["flow"] for name, row in rows.items()}
    assert flow["stock"] > 1 > flow["blocks"] >= -1e-6
    assert {line["row"] for line in said["against_blocks"]} == set(fam_around.LEARNED)
    assert "| behind | 1 blocks | 4 blocks |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "blocks,none"], None), (["--blocks", "2,2"], None), (["--texts", "1"], "at least 2"),
        (["--train-blocks", "2"], "give at least 3"),
        (["--block", "8"], "at least 24 tokens"), (["--rate", "0"], "above 0"), (["--steps", "0"], "--steps is 0"),
        (["--model", "zoo-gpt2"], "no rotary positions"), (["--model", "no-such-model"], "no-such-model"),
    ],
)  # fmt: skip
def test_bad_input_ends_in_a_sentence(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *arguments)
    said = capsys.readouterr().err + str(ended.value)
    assert (message or "give") in said
