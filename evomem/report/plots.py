"""Report: pictures of a search and of a comparison, as PNG files."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evomem.errors import EvomemError
from evomem.evaluation.rows import Row
from evomem.files.atomic import disk_errors, write_atomically
from evomem.installing import require
from evomem.report.sentences import best_heuristic
from evomem.runs.front import Member
from evomem.runs.result import RunResult
from evomem.tracking.base import GenerationRecord

# Okabe and Ito's palette, which people with any kind of colour vision tell apart; the subject is always vermilion.
_SUBJECT, _GREY, _INK = "#D55E00", "#8C8C8C", "#222222"
_FIELD = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_SHOWN = 4
"""Heuristics that are drawn in colour and named: the best ones, and random; the others are a grey cloud."""


def fitness_plot(path: Path, generations: Sequence[GenerationRecord], result: RunResult | None, title: str) -> None:
    """Draw fitness over generations: the population's quantiles, its mean and best, and the winner's other splits.

    Every stage has a panel and a scale of its own, because stages may measure different things.
    """
    stages = [list(group) for _, group in itertools.groupby(generations, key=lambda record: record.stage)] or [[]]
    figure, all_axes = _figure(title, [max(1, len(stage)) for stage in stages])
    for axes, records in zip(all_axes, stages, strict=True):
        x = np.array([record.generation + 1 for record in records])
        quantiles = np.array([_quantiles(record.fitness) for record in records]).reshape(-1, 5)
        axes.fill_between(x, quantiles[:, 0], quantiles[:, 4], color=_FIELD[0], alpha=0.12, linewidth=0, label="5-95 %")
        axes.fill_between(
            x, quantiles[:, 1], quantiles[:, 3], color=_FIELD[0], alpha=0.25, linewidth=0, label="25-75 %"
        )
        axes.plot(x, [record.mean for record in records], color=_FIELD[0], linewidth=1.8, label="mean")
        axes.plot(x, [record.best for record in records], color=_FIELD[0], linewidth=1, linestyle=":", label="best")
        axes.set_xlabel("generation" if len(stages) == 1 else f"generation ({records[0].stage})")
        axes.xaxis.get_major_locator().set_params(integer=True)
    if result is not None:
        _mark_winner(all_axes[-1], stages[-1], result)
    all_axes[0].set_ylabel("fitness")
    all_axes[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=9)
    save_figure(figure, path)


def _mark_winner(axes: Any, records: Sequence[GenerationRecord], result: RunResult) -> None:
    """Draw markers beside the curve: the winner on splits that the search has not seen, and where it started."""
    last = records[-1].generation + 1 if records else 0
    gap = max(0.5, 0.04 * len(records))
    for step, (split, marker) in enumerate((("train", "s"), ("select", "D"), ("sealed", "*"))):
        value = getattr(result, split).fitness
        if math.isfinite(value):
            size = 13 if marker == "*" else 7
            axes.plot(
                last + gap * (1 + 1.2 * step), value, marker, color=_SUBJECT, markersize=size, clip_on=False,
                markeredgecolor="white", label=f"winner on {split}: {value:.3f}", linestyle="none",
            )  # fmt: skip
    start = result.finalists.get("start")
    if start is not None and math.isfinite(start.fitness):
        axes.axhline(start.fitness, color=_GREY, linewidth=1, linestyle="--", zorder=0)
        axes.annotate(
            "start, on select", (0.99, start.fitness), xycoords=("axes fraction", "data"), xytext=(0, 3),
            textcoords="offset points", color=_GREY, fontsize=8.5, ha="right",
        )  # fmt: skip


def _quantiles(values: Sequence[float]) -> list[float]:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return [math.nan] * 5
    return [float(q) for q in np.quantile(finite, (0.05, 0.25, 0.5, 0.75, 0.95))]


def memory_plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """Draw the score against the measured bytes, a line per manager over its budgets, for one model and task."""
    figure, (axes,) = _figure(title)
    named = _named(rows)
    ends: list[tuple[float, float, str, str]] = []
    sizes = [row.bytes_mean / 1024 for row in rows if row.role != "full"]
    # Budgets give equal sizes: bars of the same size stand side by side, in the order of the palette.
    width = 1.3 * max(sizes) / min(sizes)
    shift = {name: width ** (0.012 * (place - (len(named) - 1) / 2)) for place, name in enumerate(named)}
    for manager in sorted({row.manager for row in rows}, key=lambda name: name in named):
        mine = sorted((row for row in rows if row.manager == manager), key=lambda row: row.bytes_mean)
        if mine[0].role == "full":
            _full_line(axes, mine[0])
            continue
        if mine[0].role == "oracle":
            ends.append(_oracle_line(axes, mine))
            continue
        color = named.get(manager, _GREY)
        x = [row.bytes_mean / 1024 * shift.get(manager, 1.0) for row in mine]
        y = [row.loglik for row in mine]
        bars = [[max(0.0, value - low) for value, (low, _) in zip(y, _spans(mine), strict=True)],
                [max(0.0, high - value) for value, (_, high) in zip(y, _spans(mine), strict=True)]]  # fmt: skip
        subject = mine[0].role == "subject"
        axes.errorbar(
            x, y, yerr=bars if manager in named else None, color=color, marker="o", capsize=2.5,
            markersize=6 if subject else 4, linewidth=2.2 if subject else 1.2 if manager in named else 0.7,
            alpha=1.0 if manager in named else 0.5, zorder=4 if subject else 3 if manager in named else 2,
        )  # fmt: skip
        ends.append((x[-1], y[-1], manager, color))
    axes.set_xscale("log")
    _plain_ticks(axes, sizes)
    axes.set_xlabel("KiB of cache per sequence, mean (log; equal ones side by side)")
    axes.set_ylabel("log-likelihood, nats per answer token")
    _label_ends(axes, ends)
    save_figure(figure, path)


def front_plot(path: Path, members: Sequence[Member], rows: Sequence[Row], title: str) -> None:
    """Draw a front, the log-likelihood on `sealed` against the measured bytes, and the field of a comparison beside it.

    Parameters
    ----------
    members : of the front.
    rows : of a comparison on the same samples, in the same type of numbers; other subjects than the front's are drawn
        like the field. Without any the front stands alone.
    """
    figure, (axes,) = _figure(title)
    ends: list[tuple[float, float, str, str]] = []
    named = _named(rows)
    for manager in dict.fromkeys(row.manager for row in rows):
        mine = sorted((row for row in rows if row.manager == manager), key=lambda row: row.bytes_mean)
        if mine[0].role == "full":
            _full_line(axes, mine[0])
            continue
        subject = mine[0].role == "subject"
        color = _SUBJECT if subject else named.get(manager, _GREY)
        x, y = [row.bytes_mean / 1024 for row in mine], [row.loglik for row in mine]
        axes.plot(
            x, y, color=color, marker="o", markersize=3.5, linewidth=1.2 if manager in named else 0.7,
            linestyle=":" if subject else "-", alpha=1.0 if manager in named else 0.5, zorder=2,
        )  # fmt: skip
        ends.append((x[-1], y[-1], manager, color))
    x = [member.sealed.bytes_mean / 1024 for member in members]
    y = [member.sealed.loglik for member in members]
    spans = [member.interval or (value, value) for member, value in zip(members, y, strict=True)]
    bars = [[max(0.0, value - low) for value, (low, _) in zip(y, spans, strict=True)],
            [max(0.0, high - value) for value, (_, high) in zip(y, spans, strict=True)]]  # fmt: skip
    axes.errorbar(
        x,
        y,
        yerr=bars,
        color=_SUBJECT,
        marker="D",
        markersize=5.5,
        linewidth=2.2,
        elinewidth=1.2,
        capsize=2.5,
        zorder=4,
    )
    ends.append((x[-1], y[-1], f"front ({len(members)})", _SUBJECT))
    sizes = [*x, *(row.bytes_mean / 1024 for row in rows if row.role != "full")]
    axes.set_xscale("log")
    _plain_ticks(axes, sizes)
    axes.set_xlabel("KiB of cache per sequence, mean (log)")
    axes.set_ylabel("log-likelihood, nats per answer token")
    _label_ends(axes, ends)
    save_figure(figure, path)


def _full_line(axes: Any, row: Row) -> None:
    """Draw the full cache, whose size would stretch the picture, as a line."""
    axes.axhline(row.loglik, color=_INK, linewidth=1, linestyle="--", zorder=1)
    axes.annotate(
        f"full cache ({row.bytes_mean / 1024:,.0f} KiB)", (0.5, row.loglik), xycoords=("axes fraction", "data"),
        xytext=(0, 4), textcoords="offset points", color=_INK, fontsize=9, ha="center",
    )  # fmt: skip


def _oracle_line(axes: Any, rows: Sequence[Row]) -> tuple[float, float, str, str]:
    """Draw what a decision that knows the future reaches, as a mark of ink rather than a competitor; return its end."""
    x, y = [row.bytes_mean / 1024 for row in rows], [row.loglik for row in rows]
    axes.plot(x, y, color=_INK, marker="*", markersize=9, linestyle=":", linewidth=1.2, zorder=2)
    return x[-1], y[-1], rows[0].manager, _INK


def _named(rows: Sequence[Row]) -> dict[str, str]:
    """Colours of the managers that are drawn in colour."""
    # The first subject is the one that differences are taken of: it has none itself.
    ordered = sorted((row for row in rows if row.role == "subject"), key=lambda row: row.difference is not None)
    subjects = list(dict.fromkeys(row.manager for row in ordered))
    colours = dict.fromkeys(subjects[:1], _SUBJECT)
    budgets = {row.budget for row in rows if row.role == "field"}
    best = [best_heuristic([row for row in rows if row.budget == budget]) for budget in sorted(budgets, key=str)]
    field: dict[str, float] = {}
    for row in rows:
        if row.role == "field" and math.isfinite(row.loglik):
            field[row.manager] = max(field.get(row.manager, -math.inf), row.loglik)
    ranked = sorted(field, key=lambda name: -field[name])
    chosen = [row.manager for row in best if row is not None] + ranked[:_SHOWN] + ["random"] * ("random" in field)
    for name, colour in zip(dict.fromkeys(subjects[1:] + chosen), _FIELD, strict=False):
        colours[name] = colour
    return colours


def _spans(rows: Sequence[Row]) -> list[tuple[float, float]]:
    return [
        (row.interval_loglik[0], row.interval_loglik[1]) if row.interval_loglik else (row.loglik, row.loglik)
        for row in rows
    ]


def _label_ends(axes: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each line's name to the right of the plot, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    step = 0.048 * (high - low)
    ordered = sorted((end for end in ends if math.isfinite(end[1])), key=lambda end: end[1])
    places = _apart([end[1] for end in ordered], step, low, high)
    for place, (x, y, name, colour) in zip(places, ordered, strict=True):
        axes.annotate(
            name, (x, y), xytext=(1.02, place), textcoords=("axes fraction", "data"), color=colour, fontsize=9,
            va="center", fontweight="bold" if colour == _SUBJECT else "normal", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.5, "shrinkA": 0, "shrinkB": 4},
        )  # fmt: skip


def _apart(heights: Sequence[float], step: float, low: float, high: float) -> list[float]:
    """Return the places nearest to sorted heights (least squares) that are ``step`` apart: isotonic regression.

    They lie between ``low`` and ``high``, under the title and over the axis, as long as there is room for all.
    """
    blocks: list[tuple[float, int]] = []  # mean of (height - place in line * step), and how many
    for number, height in enumerate(heights):
        mean, count = height - number * step, 1
        while blocks and blocks[-1][0] > mean:
            before, members = blocks.pop()
            mean, count = (mean * count + before * members) / (count + members), count + members
        blocks.append((mean, count))
    top = max(low, high - (len(heights) - 1) * step)  # bounds of an isotonic regression cut its values off
    bases = [min(max(mean, low), top) for mean, count in blocks for _ in range(count)]
    return [base + number * step for number, base in enumerate(bases)]


def _plain_ticks(axes: Any, sizes: Sequence[float]) -> None:
    """Name the sizes that occur rather than powers of ten: a few budgets span less than a decade."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    ticks: list[float] = []
    for size in sorted(sizes):
        if not ticks or size > 1.15 * ticks[-1]:
            ticks.append(size)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlim(min(sizes) / 1.15, max(sizes) * 1.15)


def _figure(title: str, widths: Sequence[int] = (1,)) -> tuple[Any, list[Any]]:
    """Return a figure and its panels side by side, as wide as ``widths`` say, but none too narrow to read."""
    return figure_with(title, ratios=[max(width, 0.4 * max(widths)) for width in widths])


def figure_with(
    title: str, *, rows: int = 1, ratios: Sequence[float] = (1,), size: tuple[float, float] = (8.6, 4.8)
) -> tuple[Any, list[Any]]:
    """Return a figure and its panels in ``rows`` rows, columns as wide as ``ratios`` say; size in inches."""
    require([("matplotlib", "plots")])
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:  # it is there, and broken
        raise EvomemError(f"plots need matplotlib, which cannot be imported: {error}") from None
    figure = Figure(figsize=size, dpi=150, layout="constrained")  # no pyplot: nothing global is touched
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, len(ratios), width_ratios=list(ratios), squeeze=False).flat)
    panels[0].set_title(title, loc="left", fontsize=11)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, panels


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG; its folder is made."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomically(path, content.getvalue())  # whole or not at all, also on a full disk
