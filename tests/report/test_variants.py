"""A subject beside itself under other allocations: names, rows at equal slots, what is said, what is refused."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from typer.testing import CliRunner

import evomem
from evomem.cli.app import app
from evomem.errors import ConfigError
from evomem.evaluation.compare import NamedManager, field_of
from evomem.managers import build
from evomem.managers.reallocation import name_with_allocation
from evomem.models import LoadedModel
from evomem.report.comparing import say_unsearched
from evomem.report.subjects import resolve_all
from evomem.testing.models import tiny, tiny_tokenizer
from tests.managers.test_reallocation import NUMBERLESS, searched


@pytest.fixture(scope="module")
def loaded():
    return LoadedModel("tiny", tiny("llama", layers=2), tiny_tokenizer(), "digest")


@pytest.fixture(scope="module")
def conditions(loaded, tmp_path_factory):
    words = ["the", "cat", "dog", "bird", "tree", "house", "red", "black", "white", "big", "small", "sky", "blue"]
    file = tmp_path_factory.mktemp("task") / "questions.jsonl"
    rows = [
        {
            "context": " ".join(np.random.default_rng(seed).choice(words, 40)), "question": " what ?",
            "answers": ["red cat"], "split": "sealed",
        }
        for seed in range(2)
    ]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, rows)))
    return {
        "models": loaded, "tasks": f"file:{file}", "budgets": [16], "samples": 2, "check": False, "exact": False,
    }  # fmt: skip


def test_variants_stand_beside_the_subject_at_equal_slots(conditions, tmp_path, caplog):
    subject = NamedManager("mine", searched())
    out, pictures = tmp_path / "rows.json", tmp_path / "pictures"
    with caplog.at_level(logging.WARNING, logger="evomem"):
        rows = evomem.compare(
            subject, against=[], allocations=[*NUMBERLESS, "layer_budgets(layers=2)"], out=out, plots=pictures,
            **conditions,
        )  # fmt: skip
    assert [record.message for record in caplog.records] == [
        "mine: its numbers for depth_shares(points=3) have no part under another allocation: "
        "log_shares (3 numbers)",
        "mine(allocation=layer_budgets(layers=2)): its numbers were not searched, they are all equal, so they share "
        "equally: allocation.factors (2 numbers)",
    ]  # fmt: skip
    found = {row.manager: row for row in rows}
    assert set(found) == {
        "mine", "mine(allocation=layer_budgets(layers=2))", *(f"mine(allocation={spec})" for spec in NUMBERLESS),
    }  # fmt: skip
    assert {row.slots for row in rows} == {16}
    assert {row.role for row in rows} == {"subject"}
    assert all((row.difference is None) == (row.manager == "mine") for row in rows)
    assert {path.name for path in pictures.iterdir()} == {"memory.png", "heads.png"}
    assert {row["manager"] for row in json.loads(out.read_text())} == set(found)
    plain = found["mine(allocation=uniform)"]
    assert np.ptp(plain.head_slots) == 0 < np.ptp(found["mine"].head_slots)
    assert found["mine(allocation=layer_budgets(layers=2))"].loglik == pytest.approx(plain.loglik, abs=1e-5)
    assert len({row.loglik for row in rows}) > 4


def test_under_uniform_a_heuristic_is_itself_and_the_spec_is_the_same_manager(conditions, caplog):
    specs = ["uniform", "pyramid(beta=4)", "uniform", "pyramid(beta=4.0)"]
    subjects = ["keydiff", "keydiff(allocation=uniform)"]
    with caplog.at_level(logging.WARNING, logger="evomem"):
        rows = evomem.compare(
            subjects, against=["keydiff(allocation=pyramid(beta=4))"], allocations=specs, **conditions
        )  # fmt: skip
    assert [record.message for record in caplog.records] == [
        "keydiff(allocation=uniform): is keydiff, whose allocation is uniform; it is measured once",
        "keydiff(allocation=pyramid(beta=4.0)): is keydiff(allocation=pyramid(beta=4)), whose allocation is "
        "pyramid(beta=4.0); it is measured once",
    ]
    found = {row.manager: row for row in rows}
    assert set(found) == {*subjects, "keydiff(allocation=pyramid(beta=4))"}
    assert found[subjects[1]].loglik == pytest.approx(found["keydiff"].loglik, abs=1e-5)
    assert found[subjects[1]].head_slots == found["keydiff"].head_slots
    alone = evomem.compare("keydiff(allocation=pyramid(beta=4))", against=[], **conditions)
    assert found["keydiff(allocation=pyramid(beta=4))"].loglik == pytest.approx(alone[0].loglik, abs=1e-5)


def test_names_say_the_allocation():
    assert name_with_allocation("demo", " lava ") == "demo(allocation=lava)"
    assert name_with_allocation("runs/demo", "duo(retrieval=0.4)") == "runs/demo(allocation=duo(retrieval=0.4))"
    assert name_with_allocation("snapkv(window=64)", "lava") == "snapkv(window=64, allocation=lava)"
    assert name_with_allocation("snapkv(allocation=lava, window=8)", "cake") == "snapkv(window=8, allocation=cake)"
    assert name_with_allocation("snapkv(allocation=lava)", "cake") == "snapkv(allocation=cake)"
    assert name_with_allocation("keydiff (winner)", "cake") == "keydiff (winner)(allocation=cake)"
    assert name_with_allocation("mine(a)", "cake") == "mine(a)(allocation=cake)"


@pytest.mark.parametrize(
    ("subjects", "specs", "message"),
    [
        ("keydiff", "lav", "Did you mean 'lava'"),
        ("keydiff", ["lava", "lava"], r"two managers .*are called 'keydiff\(allocation=lava\)'"),
        (["keydiff", "keydiff(allocation=lava)"], ["lava"], r"are called 'keydiff\(allocation=lava\)'"),
        ("keydiff", "pyramid(bta=3)", "beta"),
        ("keydiff", "lukv", "evomem allocate"),
        ("keydiff", [8], "is no text"),
        ("keydiff", 8, "8 is no text"),
        ("keydiff", {"name": "lava"}, "is no text"),
        ("keydiff", "lava(", "^allocation 'lava\\(', character 6"),
        ("adakv(keydiff)", "lava", "takes no other allocation"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(subjects, specs, message, monkeypatch):
    monkeypatch.setattr("evomem.models.load", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match=message):
        evomem.compare(subjects, allocations=specs, budgets=8, tasks="passkey:length=500")


def test_the_command_splits_at_commas_outside_of_brackets(monkeypatch):
    seen = {}
    monkeypatch.setattr("evomem.cli.commands.compare.compare_subjects", lambda *_, **words: seen.update(words) or [])
    words = ["compare", "keydiff", "--allocations", "uniform, probe_shares(probe=retrieval, power=0.5),lava"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert seen["allocations"] == ["uniform", "probe_shares(probe=retrieval, power=0.5)", "lava"]


def test_numbers_that_no_search_gave_are_said(tmp_path):
    spec, scorer = "keydiff(budget=4, allocation='slots(total=[0.5, 2])')", "feature_scorer(features=[keydiff])"
    build(spec).save_pretrained(tmp_path / "saved")
    said = []
    subjects = resolve_all([spec, "keydiff(budget=4)", str(tmp_path / "saved")])
    say_unsearched(subjects, field_of(["snapkv", scorer]), said.append)
    counts = {name: sum(one.numel() for one in build(name).parameters()) for name in (spec, scorer)}
    assert said == [
        f"{name}: its {count} numbers were not searched; they are as a search begins" for name, count in counts.items()
    ]
