"""The models of the RegBench experiment: of equal size, and trained on what comes next."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from evomem.tasks.base import Split
from evomem.tasks.streams.automata import SEPARATOR
from experiments.regbench import NAMES, TESTED, batch_of, chosen, main, measured, new_model, predictions, texts


def test_all_have_about_as_many_parameters():
    sizes = [sum(part.numel() for part in new_model(name, 0).parameters()) for name in NAMES]
    assert max(sizes) < 1.01 * min(sizes)


def test_what_is_read_comes_before_what_is_said():
    episodes = texts(Split.TRAIN, 3)
    read, said = batch_of(episodes)
    for row, episode in enumerate(episodes):
        count = len(episode.symbols)
        assert read[row, 0] == SEPARATOR
        assert read[row, 1:count].tolist() == episode.symbols[:-1].tolist()
        letters = said[row, :count] != -100
        assert letters.tolist() == episode.scored.tolist()
        assert said[row, :count][letters].tolist() == episode.symbols[episode.scored].tolist()
        assert (said[row, count:] == -100).all()


@pytest.mark.parametrize("name", NAMES)
def test_predictions_do_not_know_what_comes(name):
    model, (episode,) = new_model(name, 0).eval(), texts(Split.SEALED, 1)
    said = predictions(model, episode)
    np.testing.assert_allclose(said.sum(-1), 1, atol=1e-5)
    episode.symbols[20:] = 0
    assert np.array_equal(predictions(model, episode)[:21], said[:21])


def test_the_legal_letters_score_best():
    tested = texts(Split.SEALED, 4)
    perfect = [one.legal / one.legal.sum(-1, keepdims=True).clip(min=1) for one in tested]
    assert measured(perfect, tested) == {"accuracy": [1.0] * 4, "tvd": [0.0] * 4}
    flat = measured([np.full((len(one.symbols), 19), 1 / 19) for one in tested], tested)
    assert min(flat["tvd"]) > 1
    assert torch.tensor(flat["accuracy"]).max() < 1


def test_what_is_no_training_is_refused(tmp_path, monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["regbench", *map(str, words)])
        main()

    with pytest.raises(SystemExit, match=r"no training has left a record\.json"):
        run("report", "--runs", tmp_path / "nothing", "--out", tmp_path / "out")
    path = tmp_path / "v1-0-1200-0.003" / "record.json"
    path.parent.mkdir()
    for text in ("{", "[]", '{"model": "v1"}', json.dumps({"train": {"accuracy": [1.0], "tvd": [0.0]}})):
        path.write_text(text)
        for words in (("report", "--out", tmp_path / "out"), ("train", "v1")):
            with pytest.raises(SystemExit, match="is no record of a training"):
                run(*words, "--runs", tmp_path)
    for words in (("--steps", 0), ("--seed", -1), ("--rate", "nan")):
        with pytest.raises(SystemExit):
            run("train", "v1", "--runs", tmp_path / "new", *words)
        assert "at least one step" in capsys.readouterr().err


def record(name, seed, rate, tvd, steps=1200):
    """A training whose distance is ``tvd[split]`` on all automata, and whose accuracy is its opposite."""
    by_split = {split: {"accuracy": [1 - far / 2] * TESTED, "tvd": [far] * TESTED} for split, far in tvd.items()}
    how = {"steps": steps, "rate": rate, "parameters": 9, "cpu_seconds": 1.0, "loss": 2.0}
    return {"model": name, "seed": seed, **how, **by_split}


def test_rates_are_chosen_by_automata_that_the_report_does_not_read(tmp_path, monkeypatch, capsys):
    """Seed 0 chooses, on `select`; what other seeds, other splits or trainings of other length say does not count."""
    good, bad = {"train": 0.2, "select": 0.5, "sealed": 0.9}, {"train": 0.1, "select": 0.6, "sealed": 0.1}
    records = [
        record("v1", 0, 1e-2, bad), record("v1", 0, 3e-3, good), record("v1", 1, 3e-3, {**bad, "sealed": 0.7}),
        record("v1", 1, 1e-3, {**good, "select": 0.0}), record("v2", 0, 1e-3, good), record("v2", 1, 1e-3, good),
        record("transformer", 0, 1e-2, bad), record("transformer", 0, 3e-3, good, steps=4800),
    ]  # fmt: skip
    best = chosen(records)
    assert {key: [(one["rate"], one["seed"]) for one in trained] for key, trained in best.items()} == {
        ("v1", 1200): [(3e-3, 0), (3e-3, 1)], ("v2", 1200): [(1e-3, 0), (1e-3, 1)],
        ("transformer", 1200): [(1e-2, 0)], ("transformer", 4800): [(3e-3, 0)],
    }  # fmt: skip
    one_rate = {name: value for name, value in record("v1", 0, 3e-3, good).items() if name != "select"}
    assert chosen([one_rate]) == {("v1", 1200): [one_rate]}  # recorded before there was a split to choose by
    with pytest.raises(SystemExit, match=r"v1 was trained at 2 rates.* seed 0 at 0.003 has no select split"):
        chosen([one_rate, records[0]])
    for number, one in enumerate(records):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "record.json").write_text(json.dumps(one))
    monkeypatch.setattr(sys, "argv", ["regbench", "report", "--runs", str(tmp_path), "--out", str(tmp_path / "out")])
    main()
    printed = capsys.readouterr().out
    assert "('v1', 1200) minus ('transformer', 4800), tvd: -0.100 [-0.100, -0.100] (by seed +0.000)" in printed
    assert "('v2', 1200) minus ('v1', 1200), tvd: +0.100 [+0.100, +0.100] (by seed +0.000, +0.200)" in printed
    assert "('transformer', 4800) minus ('3-gram', 0), accuracy" in printed
    assert "('v1', 1200) minus ('v2'" not in printed
    assert [one["model"] for one in json.loads((tmp_path / "out.json").read_text())].count("3-gram") == 1
