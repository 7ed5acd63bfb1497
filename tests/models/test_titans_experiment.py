"""The table of `experiments.titans`: texts that state what they ask, models of one size, what is refused."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from experiments import titans
from experiments.titans import KEYS, NOISE, ROWS, VALUES, VOCABULARY, count, main, new_model, parser, recall, texts


def test_every_answer_was_stated_once_and_all_else_is_noise():
    ids, answers = texts(3, 20, 24, 5)
    again, _ = texts(3, 20, 24, 5)
    assert ids.equal(again)
    for row, asked in zip(ids.tolist(), answers.tolist(), strict=True):
        context, questions = row[:14], row[14:]
        stated = {context[at]: context[at + 1] for at in range(13) if context[at] < KEYS}
        assert questions == [token for key in questions[::2] for token in (key, stated[key])]
        assert len(stated) == 5
        assert asked == [False] * 14 + [False, True] * 5
        assert sum(token >= KEYS + VALUES for token in context) == 4


def test_recall_is_the_share_of_right_values():
    given = parser().parse_args(["--texts", "30", "--pairs", "3"])

    class Lookup:
        """Says of every key what stood behind it first, and of every other token itself."""

        def __call__(self, ids, logits_to_keep):
            said = ids.clone()
            for row, tokens in enumerate(ids.tolist()):
                for at, token in enumerate(tokens):
                    if token < KEYS and tokens.index(token) < at:
                        said[row, at] = tokens[tokens.index(token) + 1]
            return SimpleNamespace(logits=torch.nn.functional.one_hot(said, VOCABULARY)[:, -logits_to_keep:].float())

    assert recall(Lookup(), 20, given) == [1.0] * 30
    constant = SimpleNamespace(logits=torch.zeros(25, 6, VOCABULARY))
    constant.logits[..., KEYS] = 1  # one of the values, always
    ids, answers = texts(-21, 30, 20, 3)
    right = [float((row[asked] == KEYS).float().mean()) for row, asked in zip(ids, answers, strict=True)]
    said = recall(lambda ids, logits_to_keep: SimpleNamespace(logits=constant.logits[: len(ids)]), 20, given)
    assert said == pytest.approx(right)


def test_the_window_alone_has_as_many_parameters_as_the_largest():
    given = parser().parse_args([])
    sizes = {name: count(new_model(name, 0, given)) for name in ROWS}
    largest = max(size for name, size in sizes.items() if name != titans.WINDOW)
    assert sizes[titans.WINDOW] == pytest.approx(largest, rel=0.005)
    assert NOISE + KEYS + VALUES == VOCABULARY


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["titans", *map(str, words)])
    main()


def test_a_seed_gives_the_same_row_again_whatever_else_is_trained(monkeypatch, tmp_path, capsys):
    small = "--rows lmm --steps 1 --batch 2 --texts 2 --length 8 --pairs 2 --times 1,2 --segment 4"
    rows = {}
    for seeds in ("0,1", "1"):
        path = tmp_path / "new" / f"{seeds}.json"
        run(monkeypatch, *small.split(), "--seeds", seeds, "--json", path)
        (rows[seeds],) = json.loads(path.read_text())["rows"]
    both, alone = rows.values()
    assert both["loss_by_seed"][1:] == alone["loss_by_seed"]
    for length in ("8", "16"):
        assert both[length]["by_seed"][1:] == alone[length]["by_seed"]
        assert both[length]["right"] == pytest.approx(sum(both[length]["by_seed"]) / 2)
    assert "| | parameters | 8 | 16 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rows lmm,rnn", "lmm, mac, mag, mal, window"),
        ("--rows lmm,lmm", "none twice"),
        ("--seeds 0,x", "at least 0"),
        ("--seeds 1,1", "none twice"),
        ("--times 0", "at least 1"),
        ("--texts 1", "at least 2"),
        ("--steps 0", "counts"),
        ("--pairs 25", "at most 24"),
        ("--length 8", "4 tokens"),
        ("--rate nan", "above 0"),
        ("--depth 9", "1 to 4"),
        ("--segment 0", "--segment are counts"),
        ("--conv 0", "conv is 0"),
    ],
)
def test_what_is_no_training_is_refused_before_it(monkeypatch, capsys, words, message):
    with pytest.raises(SystemExit) as refused:
        run(monkeypatch, *words.split())
    assert message in f"{refused.value} {capsys.readouterr().err}"
