"""Text of others is only seen: no escape sequence of theirs reaches the terminal, no link of theirs a card."""

from __future__ import annotations

import io

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from evomem import plugins
from evomem.cli.app import app
from evomem.cli.errors import guarded
from evomem.errors import PluginError
from evomem.evaluation.rows import Row
from evomem.managers import build
from evomem.plain_text import plain
from evomem.plugins.card import render_card
from evomem.report.tables import tables
from evomem.terminal import plain_console

ESCAPES = "a\x1b]0;title\x07b\x9b31mc\rd\x7fe\u202efdp\u2066g\u2028h\u200fi"
LINKS = "[x](javascript:alert(1)) ![p](http://evil/p.png) <img src=x> [r]: http://evil |c| \\[y](z) \u202etxt"
HARMFUL = [
    chr(code) for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, 0x202E, 0x2066) if code not in (9, 10)
]


@given(st.text())
def test_what_is_left_is_only_seen(text):
    shown = plain(text)
    assert not any(letter in shown for letter in HARMFUL)
    assert plain(shown) == shown
    if not any(letter in text for letter in [*HARMFUL, "\u202a", "\u061c", "\ufeff", "\u200e", "\u200f"]):
        assert len(shown) >= len(text)
    assert plain("grün, 漢字, שלום, 👩\u200d🚀\n\t") == "grün, 漢字, שלום, 👩\u200d🚀\n\t"


def test_a_console_keeps_its_own_colours_and_spells_out_those_of_others():
    file = io.StringIO()
    console = plain_console(file=file, force_terminal=True, color_system="standard", width=200)
    table = Table(title=ESCAPES)
    table.add_column(ESCAPES)
    table.add_row(Text(ESCAPES, style="bold red"))
    console.print(table)
    console.print(ESCAPES, markup=False)
    with Progress(console=console) as bar:
        bar.add_task("x", total=1, completed=1)
    written = file.getvalue()
    assert "\x1b[1;31m" in written  # rich's own
    assert "\\x1b]0;title" in written
    assert "\x1b]0;" not in written
    for letter in HARMFUL:
        assert letter in ("\x1b", "\r") or letter not in written, repr(letter)


def test_no_row_of_a_stranger_reaches_a_terminal_as_it_is():
    row = Row(
        model=ESCAPES, task=ESCAPES, manager=ESCAPES, budget=8, protocol=ESCAPES, split="sealed", role="subject",
        samples=2, score=None, loglik=-1.0, bytes_peak=1.0, bytes_mean=1.0, slots=8.0, seconds=1.0,
    )  # fmt: skip
    file = io.StringIO()
    for table in tables([row]):
        plain_console(file=file, width=300).print(table)
    assert not any(letter in file.getvalue() for letter in HARMFUL)


def test_an_error_of_a_strangers_file_is_plain(capsys):
    with pytest.raises(typer.Exit), guarded():
        raise PluginError(ESCAPES)
    assert not any(letter in capsys.readouterr().err for letter in HARMFUL)


def test_a_plug_ins_own_words_are_spelled_out_by_the_commands(tmp_path):
    plugins.save(build("keydiff(budget=4)"), tmp_path / "plug", {"experiment": ESCAPES, "models": [ESCAPES]})
    result = CliRunner().invoke(app, ["compare", str(tmp_path / "plug"), "--task", "passkey:length=200"])
    assert result.exit_code == 2
    assert not any(letter in result.output for letter in HARMFUL)


def test_a_card_that_is_made_again_has_no_links_of_others(tmp_path):
    row = {"model": LINKS, "task": LINKS, "manager": LINKS, "role": "subject", "loglik": 0.0, "split": LINKS}
    provenance = {
        "experiment": LINKS, "model": LINKS, "tasks": [{"spec": LINKS, "length": LINKS}], "sentences": [LINKS],
        "comparison": [{**row, "samples": LINKS}], "driver": {"name": LINKS}, "seed": LINKS,
        "libraries": {LINKS: LINKS},
        "protocol": {"kind": LINKS, "mode": LINKS}, "imported": {LINKS: LINKS}, "evomem_version": LINKS,
        "scores": {LINKS: {"contexts": LINKS}},
        "transfer": [{**row, "train_model": LINKS, "best": LINKS, "protocol": LINKS, "dtype": LINKS}],
    }  # fmt: skip
    plugins.save(build("keydiff(budget=4)"), tmp_path / "plug", provenance)
    again = plugins.load(tmp_path / "plug")
    again.save_pretrained(tmp_path / "again")
    for card in ((tmp_path / "again" / "README.md").read_text(), render_card(LINKS, {}, {})):
        body = card.split("---", 2)[2]
        assert body.replace("\\\\", "").count("\\[x\\](javascript") == body.count("javascript") > 0
        assert "](http" not in body.replace("\\](http", "")
        assert "![p" not in body
        assert "<img" not in body
        assert "\u202e" not in body
