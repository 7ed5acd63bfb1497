"""The command line: how its words are read, and its help."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from evomem.cli.app import app
from evomem.errors import ConfigError
from evomem.evaluation.measurement import EvaluationProtocol


def test_what_is_written_on_the_command_line_is_read_as_it_is_meant():
    from evomem.cli.commands.compare import parse_budgets, split_specs
    from evomem.report.conditions import parse_protocol

    assert split_specs("adakv(snapkv, safeguard=0.3),h2o, x(a=[1,2])") == [
        "adakv(snapkv, safeguard=0.3)",
        "h2o",
        "x(a=[1,2])",
    ]
    assert (split_specs(None), split_specs("none"), split_specs("all")) == (None, [], ["all"])
    assert parse_budgets(None) == []
    for read in (parse_budgets, split_specs, lambda text: split_specs(text, "--allocations")):
        for empty in ("", " ", ",", " , "):  # an empty variable of a shell does not stand for a default
            with pytest.raises(ConfigError, match=r"^--(budgets|against|allocations) .*names nothing"):
                read(empty)
    assert [repr(b) for b in parse_budgets("64, 0.25,1,1.0")] == ["64", "0.25", "1", "1.0"]
    default = EvaluationProtocol(kind="streaming", every=7, mode="query_aware")
    assert parse_protocol(None, None, default) == default
    assert str(parse_protocol("streaming", "query_agnostic", default)) == "streaming:7/query_agnostic"
    assert str(parse_protocol("streaming:3", None, EvaluationProtocol())) == "streaming:3/query_agnostic"
    for wrong in ("streaming:", "streaming:x", "compress_once:3", "streaming:0"):
        with pytest.raises(ConfigError):
            parse_protocol(wrong, None, default)


def test_help_is_there_without_loading_anything_heavy():
    code = (
        "import sys, evomem.cli.app\n"
        "sys.argv = ['evomem', 'compare', '--help']\n"
        "try: evomem.cli.app.main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'scipy') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.rstrip().endswith("[]")
    assert "evomem compare runs/demo" in shown
    version = subprocess.run([sys.executable, "-m", "evomem", "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.startswith("evomem 0.")


def test_defaults_in_help_texts_are_not_taken_for_markup():
    """Rich reads ``[default: ...]`` as a style, and drops it, unless its bracket is escaped."""
    commands = typer.main.get_command(app).commands
    told = [(name, param) for name, command in commands.items() for param in command.params]
    texts = {(name, param.name): getattr(param, "help", None) or "" for name, param in told}
    with_default = [place for place, text in texts.items() if "[default: " in text]
    assert {("compare", "samples"), ("transfer", "samples")} <= set(with_default)
    assert not [place for place in with_default if "\\[default: " not in texts[place]]
    runner = CliRunner()
    for name in {name for name, _ in with_default}:
        shown = " ".join(runner.invoke(app, [name, "--help"]).output.replace("│", " ").split())
        own = [texts[place].split("\\[default: ")[1] for place in with_default if place[0] == name]
        assert all(f"[default: {text.split()[0]}" in shown for text in own), name
