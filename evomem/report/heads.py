"""Report: what every layer and KV head holds, as tables for a terminal and as a heat map."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from evomem.evaluation.rows import Budget, Row
from evomem.report.plots import figure_with, save_figure
from evomem.report.sentences import by_scenario
from evomem.report.tables import budget_text

_NAMED = 2
"""Managers that a panel's title names, at most, of those whose heads hold the same."""
_ACROSS = 6
"""Panels in one row of a heat map, at most."""
_WIDE = 24
"""Characters of one line of a panel's title, at most."""
_WORDS = re.compile(r"[^\s,(=/+]+[,(=/+]*\s*|\S")
"""What is not broken in a manager's name: a word with the punctuation behind it."""
_EMPTY = "#E3E3E3"
"""Colour of a head that holds nothing."""


@dataclass(frozen=True)
class Alike:
    """Managers whose heads hold the same on average, at one budget.

    Attributes
    ----------
    managers : their names, the best first.
    slots, size : per layer one number a KV head: slots, and bytes.
    """

    budget: Budget
    managers: tuple[str, ...]
    slots: tuple[tuple[float, ...], ...]
    size: tuple[tuple[float, ...], ...]

    @property
    def total_slots(self) -> float:
        """Slots of all layers and heads."""
        return sum(map(sum, self.slots))

    @property
    def total_bytes(self) -> float:
        """Bytes of all layers and heads."""
        return sum(map(sum, self.size))


def alike(rows: Sequence[Row]) -> list[Alike]:
    """Return what heads hold, in the order of the rows, managers that hold the same together.

    Parameters
    ----------
    rows : of one model and task; those that were not measured by head are left out.
    """
    names: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        if row.head_slots is not None and row.head_bytes is not None:
            slots, size = (tuple(map(tuple, table)) for table in (row.head_slots, row.head_bytes))
            # One slot is 1, the whole context is 1.0.
            names.setdefault((type(row.budget), row.budget, slots, size), []).append(row.manager)
    return [Alike(budget, tuple(members), slots, size) for (_, budget, slots, size), members in names.items()]


def head_tables(rows: Sequence[Row]) -> list[Table]:
    """Return a table per model, task and budget: layers down, managers across, the least, mean and most of a head.

    Managers that hold the same stand in one column, and layers that do in one line. KiB are those of a layer; totals
    are in the last line. Both are of the moment when the context has been read.
    """
    tables = []
    for (model, task), group in by_scenario(rows):
        for budget, some in groupby(alike(group), key=lambda one: one.budget):
            tables.append(_table(f"budget {budget_text(budget)}: slots per head, {task} on {model}", list(some)))
    return tables


def _table(title: str, columns: Sequence[Alike]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", expand=False)
    table.add_column("layer", justify="right")
    for one in columns:
        # Names that differ at their end only are told whole, over several lines.
        names = Text("\n".join(one.managers), overflow="fold")
        table.add_column(names, justify="right", overflow="fold")
        table.add_column("KiB", justify="right")
    lines = [_cells(columns, layer) for layer in range(len(columns[0].slots))]
    for cells, same in groupby(range(len(lines)), key=lambda layer: lines[layer]):
        first, *others = same
        table.add_row(f"{first}-{others[-1]}" if others else str(first), *cells)
    table.add_section()
    totals = [text for one in columns for text in (f"{one.total_slots:,.0f}", f"{one.total_bytes / 1024:,.0f}")]
    table.add_row("total", *totals, style="bold")
    return table


def _cells(columns: Sequence[Alike], layer: int) -> list[str]:
    """Return slots and KiB of a layer in every column."""
    return [text for one in columns for text in (_spread(one.slots[layer]), f"{sum(one.size[layer]) / 1024:,.0f}")]


def _spread(slots: Sequence[float]) -> str:
    """Return the least, mean and most slots of a layer's heads; one number where they are equal."""
    least, mean, most = (f"{count:.0f}" for count in (min(slots), sum(slots) / len(slots), max(slots)))
    return mean if least == most else f"{least} / {mean} / {most}"


def head_notes(rows: Sequence[Row]) -> list[str]:
    """Return what a reader of the tables must know: what a cell says, and which managers are not there."""
    lines = []
    if any(row.head_slots is not None for row in rows):
        lines.append(
            "Slots of a KV head when the context has been read, least / mean / most of a layer's heads, means over "
            "samples; KiB of the layer."
        )
    missing = dict.fromkeys(row.manager for row in rows if row.head_slots is None)
    if missing:
        lines.append(
            f"Not measured by head: {', '.join(missing)}. Their samples are of an earlier version; compare anew for it."
        )
    return lines


def head_plot(path: Path, rows: Sequence[Row], title: str) -> bool:
    """Draw the slots of every layer and KV head, a panel per manager and budget, in one scale of colours.

    Managers that hold the same share a panel. Panels of every budget are in one order, that of the managers in the
    rows: whoever is best at one budget stands where it stands at the others. The full cache is left out: it holds
    everything everywhere.

    Parameters
    ----------
    rows : of one model and task.

    Returns
    -------
    Whether there was anything to draw.
    """
    order = {name: number for number, name in enumerate(dict.fromkeys(row.manager for row in rows))}
    by_budget = groupby((row for row in rows if row.role != "full"), key=lambda row: row.budget)
    shown = alike([row for _, some in by_budget for row in sorted(some, key=lambda row: order[row.manager])])
    if not shown:
        return False
    across = min(_ACROSS, max(sum(other.budget == one.budget for other in shown) for one in shown))
    lines = [
        members[at : at + across]
        for _, group in groupby(shown, key=lambda one: one.budget)
        for members in [list(group)]
        for at in range(0, len(members), across)
    ]
    layers = max(len(one.slots) for one in shown)
    height = 1.0 + min(4.0, max(1.6, 0.1 * layers))
    figure, panels = figure_with(
        "", rows=len(lines), ratios=[1.0] * across, size=(max(5.0, 1.6 * across + 1.2), height * len(lines) + 0.5)
    )
    wide = int(11 * figure.get_figwidth())  # characters that fit
    figure.suptitle("\n".join(wrap(title, wide, break_on_hyphens=False)), x=0.01, ha="left", fontsize=11)
    norm, image = _scale(shown), None
    for place, axes in enumerate(panels):
        line, column = divmod(place, across)
        if column >= len(lines[line]):
            axes.set_axis_off()
            continue
        image = _panel(axes, lines[line][column], norm)
        if column == 0:
            axes.set_ylabel("layer", fontsize=8)
    bar = figure.colorbar(image, ax=panels, shrink=0.8, pad=0.01)
    _name_ticks(bar, norm)
    bar.set_label("slots, mean over samples (log)" + ("; grey: none" if _has_empty(shown) else ""), fontsize=8)
    save_figure(figure, path)
    return True


def _panel(axes: Any, one: Alike, norm: Any) -> Any:
    """Draw one panel; return the image."""
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    colours = colormaps["viridis"].with_extremes(bad=_EMPTY)
    image = axes.imshow(_grid(one), norm=norm, cmap=colours, aspect="auto", interpolation="nearest", origin="upper")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(labelsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.set_xlabel("KV head", fontsize=8)
    names = [line for name in one.managers[:_NAMED] for line in _lines(name)]
    more = len(one.managers) - _NAMED
    others = [f"and {more} more"] if more > 0 else []
    axes.set_title(
        "\n".join([*names, *others, f"{budget_text(one.budget)}: {one.total_slots:,.0f} slots"]), fontsize=7.5
    )
    return image


def _lines(name: str) -> list[str]:
    """Return a manager's name in lines of at most `_WIDE` characters, broken between words where these are shorter."""
    lines = [""]
    for word in _WORDS.findall(name):
        if len(lines[-1]) + len(word.rstrip()) > _WIDE and lines[-1]:
            lines.append("")
        lines[-1] += word
    return [part for line in lines for part in wrap(line.strip(), _WIDE, break_on_hyphens=False)]


def _grid(one: Alike) -> Any:
    """Return slots as (layers, heads), masked where a head holds none or a layer has fewer heads."""
    grid = np.full((len(one.slots), max(map(len, one.slots))), np.nan)
    for layer, slots in enumerate(one.slots):
        grid[layer, : len(slots)] = slots
    return np.ma.masked_where(~(grid > 0), grid)


def _has_empty(shown: Sequence[Alike]) -> bool:
    return any(count <= 0 for one in shown for layer in one.slots for count in layer)


def _scale(shown: Sequence[Alike]) -> Any:
    """Return the one scale of all panels: the logarithm of the slots that occur."""
    from matplotlib.colors import LogNorm

    counts = [count for one in shown for layer in one.slots for count in layer if count > 0] or [1.0]
    least, most = min(counts), max(counts)
    return LogNorm(least, most) if most > least else LogNorm(least / 2, 2 * most)


def _name_ticks(bar: Any, norm: Any) -> None:
    """Name a few numbers of slots that occur rather than powers of ten."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    bar.ax.yaxis.set_major_locator(FixedLocator(np.geomspace(norm.vmin, norm.vmax, 6).tolist()))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}" if value >= 10 else f"{value:.1f}"))
    bar.ax.tick_params(labelsize=7)
