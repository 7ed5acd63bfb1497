"""What the command line says where little is wrong: the right complaint first, one line, and the nearest valid name."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from evomem import plugins
from evomem.cli.app import app
from evomem.cli.commands import progress
from evomem.cli.commands.listing import entries
from evomem.cli.options import DEFAULT_PROTOCOLS, Listing
from evomem.errors import ConfigError
from evomem.evaluation.rows import Row
from evomem.managers import build, managers
from evomem.managers.allocation import allocations
from evomem.report.protocols import DEFAULTS
from evomem.report.tables import markdown, notes, tables
from evomem.tasks import tasks
from evomem.tasks.building import check_options
from evomem.validation import apply_settings, parse_yaml


def error(*words):
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 2, result.output
    assert result.output.startswith("error: ")
    return result.output


@pytest.mark.parametrize("command", ["compare", "evaluate", "transfer"])
def test_a_misspelt_task_is_complained_of_before_a_missing_budget(command):
    models = ["--models", "smollm2-135m"] if command == "transfer" else []
    for task, words in (("passkey:lenght=5", "Did you mean 'length'"), ("pass_key", "Did you mean 'passkey'")):
        assert words in error(command, "keydiff", "--task", task, *models)
    assert "--budgets" in error(command, "keydiff", "--task", "passkey:length=500", *models)


def test_task_options_are_checked_without_a_tokenizer():
    check_options("multikey_1:length=500")
    check_options("file:any.jsonl")
    for spec in ("multikey_1:length=many", "passkey:haystack=hay", "zoo_needle:nonesuch=3"):
        with pytest.raises(ConfigError):
            check_options(spec)


@pytest.mark.parametrize("spec", ["snapkv(windw=8)", "adakv(keydiff, safegard=0.3)", "random(budgett=4)"])
def test_a_misspelt_option_of_a_manager_is_guessed(spec):
    with pytest.raises(ConfigError, match=r"unknown key; did you mean '(window|safeguard|budget)'"):
        build(spec)


@pytest.mark.parametrize(
    "text", ["a: [1, 2", "a: b: c", "{", "a: 1\n b: 2", "- a\nb: 1", "a: &x [*x", "a: !!nonesuch 3"]
)
def test_a_fault_of_yaml_is_one_line_with_its_place(text):
    with pytest.raises(ConfigError, match=r"^mine\.yaml: not valid YAML: line \d+, column \d+: .") as caught:
        parse_yaml(text, "mine.yaml")
    assert "\n" not in str(caught.value)


def test_an_element_of_a_list_that_is_not_there():
    with pytest.raises(ConfigError, match=r"there is no list stages whose element 0 could be set"):
        apply_settings({"name": "x"}, ["stages.0.generations=3"])
    assert apply_settings({"stages": [{"g": 1}]}, ["stages.0.g=3"]) == {"stages": [{"g": 3}]}


def test_a_plug_in_is_replaced_only_when_that_is_said(tmp_path):
    plugins.save(build("keydiff(budget=4)"), tmp_path / "one")
    plugins.save(build("snapkv(budget=9)"), tmp_path / "two")
    words = ["export", str(tmp_path / "one"), str(tmp_path / "two")]
    assert "holds a plug-in already; choose another folder, or replace it with --overwrite" in error(*words)
    assert plugins.load(tmp_path / "two").name == "snapkv"
    assert CliRunner().invoke(app, [*words, "--overwrite"]).exit_code == 0
    assert plugins.load(tmp_path / "two").name == "keydiff"
    npz = "tests/data/namm_bam_update.npz"
    assert "--overwrite" in error("import-namm", npz, "--out", tmp_path / "two")


def row(**changes):
    known = {
        "model": "m", "task": "t", "manager": "mine", "budget": 8, "protocol": "p", "split": "sealed",
        "role": "subject", "samples": 3, "score": None, "loglik": -1.0, "bytes_peak": 1.0, "bytes_mean": 1.0,
        "slots": 8.0, "seconds": 1.0,
    }  # fmt: skip
    return Row(**{**known, **changes})


def test_a_column_in_which_nothing_stands_is_left_out():
    field = row(manager="other", role="field", difference=0.5, interval=[0.1, 0.9])
    shown = [str(column.header) for column in tables([row(), field])[0].columns]
    assert shown == ["budget", "manager", "loglik", "advantage [95 %]", "slots", "KiB"]
    assert "exact" in markdown([row(score=0.5), field])
    assert "exact" not in markdown([row(), field])


def test_one_sample_has_no_interval_and_none_is_spoken_of():
    rows = [row(samples=1), row(samples=1, manager="other", role="field", difference=0.5)]
    text = markdown(rows)
    assert "95 %" not in text
    assert "bootstrap" not in text
    assert "of one sample" in notes(rows)[0]


def test_commands_in_the_comment_of_an_experiment_stand_on_lines_of_their_own():
    lines = entries(Listing.experiments)["needle_smollm2"].splitlines()
    assert lines[0].startswith("The full experiment")
    assert "  evomem evolve needle_smollm2 -s seed=1 --out runs/needle-1" in lines
    listed = json.loads(CliRunner().invoke(app, ["list", "experiments", "--json"]).output)
    assert listed == entries(Listing.experiments)


@pytest.mark.parametrize("section", [Listing.managers, Listing.tasks, Listing.allocations])
def test_lists_name_the_options_that_are_accepted(section):
    registry = {Listing.managers: managers, Listing.tasks: tasks, Listing.allocations: allocations}[section]
    for name, text in entries(section).items():
        if not registry.get(name).__module__.startswith("evomem."):
            continue  # other test files register managers, without descriptions
        _, _, options = text.partition(" Options: ")
        for option, field in registry.get(name).Options.model_fields.items():
            shared = section is Listing.managers and option in ("budget", "every", "allocation")
            assert (f"{option}: {field.description}" in options) is not shared, (name, option)
            assert field.description, (name, option)


@pytest.mark.parametrize("command", ["compare", "transfer"])
def test_help_names_the_protocol_of_every_kind_of_memory(command):
    words = " ".join(CliRunner().invoke(app, [command, "--help"]).output.replace("│", " ").split())
    assert DEFAULT_PROTOCOLS in words
    assert re.findall(r"compress_once|streaming:\d+", DEFAULT_PROTOCOLS) == [
        str(one).partition("/")[0] for one in DEFAULTS.values()
    ]


def test_a_log_file_is_told_how_far_it_is(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.ProgressBar("comparing") as bar:
        for done in range(1, 11):
            now[0] += 20.0
            bar.report(done, 10)
    assert capsys.readouterr().err.splitlines() == [
        "comparing, samples 2/10  left 0:02:40",
        "comparing, samples 4/10  left 0:02:00",
        "comparing, samples 6/10  left 0:01:20",
        "comparing, samples 8/10  left 0:00:40",
    ]
