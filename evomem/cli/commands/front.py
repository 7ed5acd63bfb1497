"""CLI: a front on the command line: its table, its picture, and what a comparison sets beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from evomem.errors import ConfigError
from evomem.report.tables import budget_text
from evomem.runs import Run
from evomem.runs.front import Member, member_of, plugin_folder


def front_table(members: Sequence[Member]) -> Table:
    """Return the table of a front, the smallest member first, the winner highlighted."""
    first = members[0]
    table = Table(
        title=f"front: score against measured bytes ({first.sealed.contexts} sealed contexts)",
        title_justify="left", title_style="bold", header_style="dim", expand=False,
    )  # fmt: skip
    for heading in ("place", "budget", "KiB", "slots", "select", "sealed", "loglik [95 %]", "exact", "found"):
        words = heading in (
            "loglik [95 %]",
            "found",
        )  # on a narrow terminal they go on in the next line; a number is never cut
        table.add_column(heading, justify="left" if heading == "found" else "right", no_wrap=not words, overflow="fold")
    for member in members:
        sealed = member.sealed
        span = "" if member.interval is None else f" [{member.interval[0]:.3f}, {member.interval[1]:.3f}]"
        cells = [
            str(member.place),
            budget_text(member.budget),
            f"{sealed.bytes_mean / 1024:,.0f}",
            f"{sealed.slots:.1f}",
            f"{member.select.fitness:.3f}",
            f"{sealed.fitness:.3f}",
            f"{sealed.loglik:.3f}{span}",
            "" if sealed.exact is None else f"{sealed.exact:.3f}",
            member.label,
        ]
        table.add_row(*[Text(cell) for cell in cells], style="bold green" if member is members[-1] else "")
    return table


def front_notes(members: Sequence[Member]) -> list[str]:
    """Return what a reader of the table must know."""
    notes = [
        "KiB: mean measured bytes of a sequence's cache. select, sealed: the score on two splits; the front was chosen "
        "on select. The last is the winner."
    ]
    order = [member.sealed.fitness for member in sorted(members, key=lambda member: member.sealed.bytes_mean)]
    beaten = sum(any(value >= order[place] for value in order[:place]) for place in range(len(order)))
    if beaten:
        notes.append(
            f"on sealed, {beaten} of {len(members)} score no better than a smaller member: selection is noisy."
        )
    return notes


def member_plugin(run: Run, place: int | None, size: float | None) -> Path:
    """Return the folder of the plug-in of a member, by place or by size; of the winner if neither is given.

    Raises
    ------
    ConfigError : both are given.
    RunError : the run is not finished, or has no such member.
    """
    winner = run.plugin  # refuses a run that is not finished
    if place is None and size is None:
        return winner
    if place is not None and size is not None:
        raise ConfigError("--place and --bytes both name a member of the front; give one of them")
    return plugin_folder(run.folder, member_of(run.folder, place, size).place)
