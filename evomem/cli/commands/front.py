"""Run: a front on the command line: its table, its picture, and what a comparison sets beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from evomem.errors import ConfigError
from evomem.evaluation.rows import Budget, Row
from evomem.report.plots import front_plot
from evomem.report.tables import budget_text
from evomem.runs import Run
from evomem.runs.front import Member, member_of, plugin_folder

_COMPARED = 3
"""Sizes of the front at which the field is measured."""


def front_table(members: Sequence[Member]) -> Table:
    """Return the table of a front, the smallest member first, the winner highlighted."""
    first = members[0]
    table = Table(
        title=f"front: score against measured bytes ({first.sealed.contexts} sealed contexts)",
        title_justify="left", title_style="bold", header_style="dim", expand=False,
    )  # fmt: skip
    for heading in ("place", "budget", "KiB", "slots", "select", "sealed", "loglik [95 %]", "exact", "found"):
        table.add_column(heading, justify="left" if heading == "found" else "right", no_wrap=True)
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
    found = [
        "KiB: mean measured bytes of a sequence's cache. select, sealed: the score on two splits; the front was chosen "
        "on select. The last is the winner."
    ]
    order = [member.sealed.fitness for member in sorted(members, key=lambda member: member.sealed.bytes_mean)]
    beaten = sum(any(value >= order[place] for value in order[:place]) for place in range(len(order)))
    if beaten:
        found.append(
            f"on sealed, {beaten} of {len(members)} score no better than a smaller member: selection is noisy."
        )
    return found


def compared_budgets(members: Sequence[Member]) -> list[Budget]:
    """Return a few of the members' budgets, the smallest and the winner's among them; none if they have no own."""
    budgets = list(dict.fromkeys(member.budget for member in members if member.budget is not None))
    count = min(_COMPARED, len(budgets))
    places = [round(step * (len(budgets) - 1) / max(count - 1, 1)) for step in range(count)]
    return [budgets[place] for place in places] if count > 1 else list(budgets)


def draw_front(run: Run, members: Sequence[Member], rows: Sequence[Row]) -> None:
    """Write ``plots/front.png``; the field is beside it where there is one task."""
    one = len({(row.model, row.task) for row in rows}) == 1
    title = f"{run.config.name}: front on {members[0].sealed.contexts} sealed contexts"
    front_plot(run.folder / "plots" / "front.png", members, rows if one else [], title)


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
