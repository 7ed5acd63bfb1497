"""Every command of README, of the pages and of the experiments' comments is one that evomem reads."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from evomem.cli.app import app
from evomem.files.resources import resource_path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *ROOT.glob("*.md"),
    *ROOT.glob("benchmarks/*.md"),
    *ROOT.glob("docs/**/*.md"),
    *ROOT.glob("experiments/**/*.yaml"),
]
COMMANDS = typer.main.get_command(app).commands


def commands(page: Path) -> list[str]:
    """The lines of a page's blocks, or of an experiment's comments, that begin with ``evomem`` and a command."""
    text = page.read_text().replace("\\\n", " ")
    texts = re.findall(r"^```.*?\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if page.suffix == ".md" else [text]
    lines = [line.lstrip("# ") for text in texts for line in text.splitlines()]
    return [line for line in lines if re.match(r"evomem [a-z-]+( |$)", line) and "…" not in line]


def read(line: str) -> None:
    """Read a command as the shell and evomem do, without running it; raises what it would end with."""
    _, name, *words = shlex.split(line, comments=True)
    context = COMMANDS[name].make_context(name, words)
    if name in ("evolve", "train"):
        resource_path("experiments", context.params["experiment"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_are_read(page):
    for line in commands(page):
        read(line)


def test_there_are_many():
    assert sum(len(commands(page)) for page in PAGES) > 100


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("evomem compere x", "compere"),
        ("evomem compare x --budget 3", "No such option: --budget"),
        ("evomem compare x --samples 0", "greater than or equal to 1"),
        ("evomem compare", "Missing parameter: subjects"),
        ("evomem evolve denmo", "unknown experiment 'denmo'"),
    ],
)
def test_wrong_ones_are_noticed(line, message):
    with pytest.raises(Exception, match=message):
        read(line)
