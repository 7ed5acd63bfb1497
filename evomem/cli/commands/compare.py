"""CLI: the commands ``compare`` and ``evaluate``: what they print and write (`evomem.report.comparing` measures)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from evomem.cli.commands.progress import ProgressBar
from evomem.errors import ConfigError
from evomem.evaluation.rows import Budget, Row
from evomem.managers.base import check_budget
from evomem.report.comparing import claim_rows, compare_subjects, evaluate_subject
from evomem.report.conditions import Conditions
from evomem.report.heads import head_notes, head_tables
from evomem.report.pictures import claim_folder, draw_comparison
from evomem.report.sentences import sentences
from evomem.report.tables import keep_rows, notes, partial_file, rows_json, tables
from evomem.spec import split
from evomem.terminal import wide_console


def compare(
    sources: Sequence[str],
    against: str | None,
    conditions: Conditions,
    output: str | None,
    *,
    allocations: str | None = None,
    check: bool = True,
    oracle: bool = False,
    price_per_megabyte: float | None = None,
    heads: bool = False,
    plots: str | None = None,
) -> None:
    """Compare subjects with the field, print tables, and write rows; with ``check``, refuse tasks at chance.

    ``allocations`` are those under which the first subject's scorer is measured too. ``heads`` also prints what every
    layer's heads hold; ``plots`` is a folder for pictures.
    """
    output = claim_rows("--json", output)
    folder = claim_folder("--plots", plots)
    with ProgressBar("comparing") as bar:
        rows = compare_subjects(
            sources,
            split_specs(against),
            conditions,
            allocations=split_specs(allocations, "--allocations") or [],
            oracle=oracle,
            price_per_megabyte=price_per_megabyte,
            check=check,
            output=output,
            progress=bar.report,
            say=say_yellow,
        )
    deliver(rows, output, heads=heads)
    if folder is not None:
        draw_comparison(folder, rows)


def evaluate(
    source: str, conditions: Conditions, output: str | None, *, check: bool = True, heads: bool = False
) -> None:
    """Evaluate one subject, print its table, and write rows; with ``check``, refuse tasks at chance."""
    output = claim_rows("--json", output)
    with ProgressBar("evaluating") as bar:
        rows = evaluate_subject(
            source, conditions, check=check, keep=partial_file(output), progress=bar.report, say=say_yellow
        )
    deliver(rows, output, heads=heads)


def say_yellow(text: str) -> None:
    """Print a warning on standard error."""
    wide_console(stderr=True).print(Text(text, style="yellow"))


# ---- what the words mean -------------------------------------------------------------------------------------------


def parse_budgets(text: str | None, option: str = "--budgets") -> list[Budget]:
    """Read ``64,128,0.25``: whole numbers are slots per head, others shares of the tokens read; None is none.

    Raises
    ------
    ConfigError : a word is no budget, or there is none.
    """
    budgets: list[Budget] = []
    for part in (text or "").split(","):
        word = part.strip()
        if not word:
            continue
        try:
            budget: Budget = int(word) if word.lstrip("+-").isdigit() else float(word)
        except ValueError:
            raise ConfigError(f"{option}: {word!r} is no number; write for example 64,128 or 0.25") from None
        check_budget(budget)
        budgets.append(budget)
    if text is not None and not budgets:
        raise ConfigError(f"{option} {text!r}: names nothing; write for example 64,128, or leave the option out")
    return budgets


def split_specs(text: str | None, option: str = "--against") -> list[str] | None:
    """Split specs of managers or allocations at the commas that are outside of brackets and quotation marks.

    None stays None, and ``none`` is an empty list.

    Raises
    ------
    ConfigError : the text of the ``option`` names nothing: a variable of the user's shell may be empty.
    """
    if text is None:
        return None
    if text.strip() == "none":
        return []
    specs = split(text)
    if not specs:
        raise ConfigError(f"{option} {text!r}: names nothing; write none for none, or leave the option out")
    return specs


# ---- what comes out ------------------------------------------------------------------------------------------------


def deliver(rows: Sequence[Row], output: str | None, *, heads: bool = False) -> None:
    """Print tables, and write rows where the user wants them; samples lie beside them."""
    if output == "-":
        show(rows, wide_console(stderr=True), heads=heads)
        sys.stdout.write(rows_json(rows))
        return
    if output is not None:
        keep_rows(rows, Path(output))
    show(rows, wide_console(), heads=heads)


def show(rows: Sequence[Row], console: Console, *, heads: bool = False) -> None:
    """Print tables, with ``heads`` also those of layers and heads, then what they say."""
    for table in tables(rows):
        console.print(table)
    for table in head_tables(rows) if heads else ():
        console.print(table)
    for note in head_notes(rows) if heads else ():
        console.print(Text(note, style="dim"))
    for note in notes(rows):
        console.print(Text(note, style="dim"))
    for sentence in sentences(rows):
        console.print(Text(sentence, style="bold"))
