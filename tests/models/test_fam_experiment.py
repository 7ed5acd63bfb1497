"""The table of `experiments.fam`: arms over seeds, the best constant gate, other segments, rows that stay, refusals."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from evomem.evaluation import Evaluator
from evomem.evaluation.measurement import EvaluationProtocol
from evomem.models import load
from evomem.models.architectures.fam import Fam, FamConfig
from evomem.tasks import Split, build
from experiments.fam import BEST, ORACLES, OWN, Row, main, oracle_row, own_row, with_segments
from experiments.zoo.data import zoo_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of random models, with feedback and without."""
    tokenizer, made = zoo_tokenizer(), {}
    for feedback in (2, 0):
        torch.manual_seed(0)
        config = FamConfig(
            vocab_size=len(tokenizer), hidden_size=16, num_attention_heads=2, intermediate_size=24, block=8,
            feedback=feedback, initializer_range=0.4,
        )  # fmt: skip
        made[feedback] = tmp_path_factory.mktemp(f"fam-{feedback}")
        Fam(config).save_pretrained(made[feedback])
        tokenizer.save_pretrained(made[feedback])
    return made


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["fam", *map(str, words)])
    main()


def test_the_best_constant_gate_is_compared_with_and_rows_stay(folders, monkeypatch, tmp_path):
    path = tmp_path / "new" / "fam.json"
    small = ("--model", folders[2], "--name", "tiny", "--samples", 3, "--long-samples", 2, "--json", path)
    run(monkeypatch, "write_gate", *small, "--blocks", 2, "--constants", "0.1,0.9")
    run(monkeypatch, *small, "--blocks", "2,3", "--segments", 2)
    rows = json.loads(path.read_text())["rows"]
    first = {row["memory"]: row for row in rows if row["segments"] == 1}
    fixed = [first["constant 0.1"], first["constant 0.9"]]
    chosen = max(fixed, key=lambda row: (row["right"], row["nats"]))
    assert first[BEST]["of"] == chosen["memory"] == first["write_gate"]["ahead_of"]
    assert first["write_gate"]["ahead"] == pytest.approx(first["write_gate"]["right"] - chosen["right"])
    assert [row["blocks"] for row in rows if row["segments"] == 2] == [2, 3]
    assert {row["memory"] for row in rows if row["segments"] == 2} == {OWN}


def test_an_arm_is_the_mean_over_its_seeds_sample_by_sample():
    row = Row("gate", [[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]], [[0.0] * 3] * 2, [[5.0, 5.0, 5.0], [5.0, 7.0, 5.0]])
    record = row.record(Row("constant", [[0.0, 0.0, 1.0]], [[0.0] * 3], [[5.0] * 3]))
    assert row.by_sample == [1.0, 0.0, 0.5]
    assert record["right_by_seed"] == pytest.approx([2 / 3, 1 / 3])
    assert record["ahead"] == pytest.approx(0.5 - 1 / 3)
    assert record["bytes_peak"] == 7.0


def test_the_model_by_itself_is_one_pass_over_the_text_also_with_other_segments(folders):
    loaded = load(str(folders[2]))
    evaluator = Evaluator(loaded, EvaluationProtocol(kind="streaming", every=8))
    samples = build("zoo_passkey", loaded.tokenizer, 40).samples(Split.SELECT, 2, 0)
    nats = {}
    for segments in (1, 3):
        model = with_segments(loaded, segments).model
        (nats[segments],) = own_row(evaluator, model, samples).nats
        for sample, got in zip(samples, nats[segments], strict=True):
            parts = evaluator.tokens(sample)
            with torch.no_grad():
                logits = model(torch.cat((parts.read, parts.prompt), 1)).logits[0, -1]
            assert got == pytest.approx(float(logits.log_softmax(-1)[parts.answer[0, 0]]), abs=1e-5)
    assert nats[1] != pytest.approx(nats[3], abs=1e-4)
    assert loaded.model.config.segments == 1


def test_an_oracle_writes_the_blocks_that_it_says(folders):
    """Writing all of them is the model by itself, and none leaves what feedback begins with."""
    loaded = load(str(folders[2]))
    evaluator = Evaluator(loaded, EvaluationProtocol(kind="streaming", every=8))
    samples, model = build("zoo_passkey", loaded.tokenizer, 48).samples(Split.SELECT, 3, 0), loaded.model
    own = own_row(evaluator, model, samples)
    for name, written in (("all", lambda block, key: True), ("late", lambda block, key: block > 100)):
        ORACLES[name] = written
        try:
            row = oracle_row(evaluator, model, samples, name)
        finally:
            del ORACLES[name]
        assert (row.nats[0] == pytest.approx(own.nats[0], abs=1e-5)) == (name == "all")
    nothing, oracle = (oracle_row(evaluator, model, samples, name) for name in ("nothing", "oracle"))
    assert nothing.nats[0] == pytest.approx(row.nats[0])
    assert oracle.nats[0] != pytest.approx(nothing.nats[0])
    assert oracle.record(None)["change_by_key"] > 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--model", "zoo-gpt2"), "has no feedback memory"),
        (("--model", "none-of-these"), "none-of-these"),
        (("--samples", "1"), "at least 2"),
        (("no_such_manager",), "no_such_manager"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(words, sentence, folders, monkeypatch):
    words = words if "--model" in words else ("--model", folders[2], *words)
    with pytest.raises(SystemExit, match=sentence):
        run(monkeypatch, *words)
    with pytest.raises(SystemExit, match="no feedback"):
        run(monkeypatch, "write_gate", "--model", folders[0])


@pytest.mark.parametrize(
    "words", [("--blocks", "0"), ("--blocks", "4,4"), ("--constants", "1"), ("--constants", "a"), ("--segments", "-1")]
)
def test_numbers_that_mean_nothing_are_refused(words, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, *words)
    assert "give" in capsys.readouterr().err
