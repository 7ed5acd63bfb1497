"""Report: how managers do on models that they were not found on: rows, cells of a matrix, tables, a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from evomem.evaluation.compare import Comparison
from evomem.evaluation.rows import Budget, Row, budget_size, rows_of
from evomem.report.plots import figure_with, save_figure
from evomem.report.sentences import best_heuristic, best_trivial
from evomem.report.tables import budget_text
from evomem.statistics import Verdict, verdict


@dataclass(frozen=True)
class TransferRow(Row):
    """A row of a comparison (`evomem.evaluation.rows.Row`) that one subject is the first subject of.

    Attributes
    ----------
    subject : that subject; ``interval`` and ``difference`` are its advantage over the row.
    train_model : the model, or models, that it was found on; "" if that is not known.
    tokens_per_second : read and answered from an empty cache, one sequence, median over a few samples; of subjects and
        of the full cache.
    """

    subject: str = ""
    train_model: str = ""
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class Cell:
    """One manager on one task of one test model at one budget.

    Attributes
    ----------
    row : of the manager.
    full : of the full cache.
    best : of the best heuristic that holds no more memory on this model (`best_heuristic`), with the manager's
        advantage over it; None without a field.
    trivial : likewise of the best trivial manager (`evomem.evaluation.rows.TRIVIAL`); it may be the same row.
    """

    row: TransferRow
    full: TransferRow | None
    best: TransferRow | None
    trivial: TransferRow | None = None

    @property
    def verdict(self) -> Verdict:
        """``wins`` or ``loses`` if the interval of the advantage over the best heuristic excludes zero, else ``ties``.

        ``unknown`` without an interval.
        """
        return verdict(self.best.interval if self.best is not None else None)


def transfer_rows(
    comparison: Comparison, train_models: dict[str, str], speeds: dict[tuple[str, Budget], float]
) -> list[TransferRow]:
    """Return the rows of a comparison of one scenario, once for each of its subjects.

    Parameters
    ----------
    train_models : of every subject by name.
    speeds : tokens per second by manager and budget.
    """
    rows = []
    for subject, train_model in train_models.items():
        compared = [one for one in comparison.measured if one.role != "subject" or one.manager == subject]
        for row in rows_of(subject, compared):
            speed = speeds.get((row.manager, row.budget))
            rows.append(TransferRow(**asdict(row), subject=subject, train_model=train_model, tokens_per_second=speed))
    return rows


def cells(rows: Sequence[TransferRow]) -> list[Cell]:
    """Return the cells of the matrix, in the order of the rows, by budget."""
    matrix = []
    for key in dict.fromkeys((row.subject, row.model, row.task) for row in rows):
        block = [row for row in rows if (row.subject, row.model, row.task) == key]
        full = next((row for row in block if row.role == "full"), None)
        for row in block:
            if row.role == "subject":
                here = [one for one in block if one.budget == row.budget]
                matrix.append(Cell(row, full, best_heuristic(here), best_trivial(here)))
    return sorted(matrix, key=lambda cell: budget_size(cell.row.budget))


def summary(matrix: Sequence[Cell]) -> list[str]:
    """Return what the matrix says in a line per manager and budget."""
    lines = []
    for subject, budget in dict.fromkeys((cell.row.subject, cell.row.budget) for cell in matrix):
        mine = [cell for cell in matrix if (cell.row.subject, cell.row.budget) == (subject, budget)]
        away = [cell for cell in mine if cell.row.model not in cell.row.train_model.split(" + ")]
        for where, some in (("on other models", away), ("at home", [cell for cell in mine if cell not in away])):
            if some:
                text = f"{_counts([cell.verdict for cell in some])} against the best heuristic there"
                floors = [cell.trivial for cell in some if cell.trivial is not None]
                if floors:
                    text += f"; {_counts([verdict(row.interval) for row in floors])} against the best trivial manager"
                lines.append(f"{subject} at {budget_text(budget)}, {where}: {text}")
    return lines


def _counts(verdicts: Sequence[Verdict]) -> str:
    words: tuple[Verdict, ...] = ("wins", "ties", "loses", "unknown")
    return ", ".join(f"{verdicts.count(word)} {word}" for word in words if word in verdicts)


def transfer_tables(matrix: Sequence[Cell]) -> list[Table]:
    """Return the matrix, a table per budget: managers down, models and tasks across."""
    tables = []
    for budget in dict.fromkeys(cell.row.budget for cell in matrix):
        here = [cell for cell in matrix if cell.row.budget == budget]
        table = Table(
            title=f"budget {budget_text(budget)}: log-likelihood (full cache), advantage over the best heuristic, "
            "over the best trivial manager",
            title_justify="left", title_style="bold", header_style="dim", show_lines=True,
        )  # fmt: skip
        table.add_column("manager (found on)")
        places = list(dict.fromkeys((cell.row.model, cell.row.task) for cell in here))
        labels = _labels(matrix)
        for place in places:
            table.add_column(labels[place], justify="right")
        for subject in dict.fromkeys(cell.row.subject for cell in here):
            mine = {(cell.row.model, cell.row.task): cell for cell in here if cell.row.subject == subject}
            first = next(iter(mine.values()))
            texts = [_cell_text(mine.get(place)) for place in places]
            table.add_row(Text(f"{subject}\n({first.row.train_model or '?'})"), *texts)
        tables.append(table)
    return tables


def _labels(matrix: Sequence[Cell]) -> dict[tuple[str, str], str]:
    """Return how a test model and a task are called: with the protocol, where the matrix has several."""
    several = len({cell.row.protocol for cell in matrix}) > 1
    labels = {}
    for row in (cell.row for cell in matrix):
        words = [_short(row.model), _short(row.task), *([row.protocol.partition("/")[0]] if several else [])]
        labels[row.model, row.task] = "\n".join(words)
    return labels


_EMPHASIS = {"wins": "**{}**", "loses": "*{}*"}
_STYLES = {"wins": "green", "loses": "red", "ties": "", "unknown": "dim"}


def _cell_text(cell: Cell | None) -> Text:
    if cell is None:
        return Text("")
    full = "" if cell.full is None else f" ({cell.full.loglik:.3f})"
    text = f"{cell.row.loglik:.3f}{full}"
    if cell.best is not None:
        text += f"\n{_advantage(cell.best)}\n{cell.best.manager}"
    if cell.trivial is not None and cell.trivial is not cell.best:
        text += f"\n{_advantage(cell.trivial)}\n{cell.trivial.manager}"
    return Text(text, style=_STYLES[cell.verdict])


def _advantage(best: TransferRow) -> str:
    if best.difference is None:
        return ""
    span = "" if best.interval is None else f" [{best.interval[0]:+.3f}, {best.interval[1]:+.3f}]"
    return f"{best.difference:+.3f}{span}"


_HEADINGS = (
    "budget", "manager", "found on", "test model", "task", "log-likelihood", "full cache", "best heuristic there",
    "advantage [95 %]", "best trivial there", "advantage over it [95 %]", "KiB", "KiB of the heuristic",
    "tokens/s", "tokens/s, full",
)  # fmt: skip


def transfer_markdown(matrix: Sequence[Cell], skipped: Sequence[str] = ()) -> str:
    """Return the matrix as Markdown, a line per cell, and what was left out."""
    lines = ["| " + " | ".join(_HEADINGS) + " |", "|" + "---|" * len(_HEADINGS)]
    several = len({cell.row.protocol for cell in matrix}) > 1
    for cell in matrix:
        row, best, full, trivial = cell.row, cell.best, cell.full, cell.trivial
        words = [
            budget_text(row.budget),
            row.subject,
            row.train_model or "?",
            row.model,
            f"{row.task}, {row.protocol}" if several else row.task,
            f"{row.loglik:.3f}",
            "-" if full is None else f"{full.loglik:.3f}",
            "-" if best is None else f"{best.manager} ({best.loglik:.3f})",
            "-" if best is None else _EMPHASIS.get(cell.verdict, "{}").format(_advantage(best)),
            "-" if trivial is None else f"{trivial.manager} ({trivial.loglik:.3f})",
            "-" if trivial is None else _EMPHASIS.get(verdict(trivial.interval), "{}").format(_advantage(trivial)),
            f"{row.bytes_mean / 1024:,.0f}",
            "-" if best is None else f"{best.bytes_mean / 1024:,.0f}",
            _speed(row),
            "-" if full is None else _speed(full),
        ]  # fmt: skip
        lines.append("| " + " | ".join(words) + " |")
    lines += ["", *(f"- {line}" for line in summary(matrix)), *(f"- left out: {reason}" for reason in skipped)]
    return "\n".join(lines) + "\n"


def _speed(row: TransferRow) -> str:
    return "-" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}"


def transfer_plot(path: Path, matrix: Sequence[Cell], title: str) -> None:
    """Draw the matrix, a panel per budget: the advantage over the best heuristic of each test model, in nats.

    Orange is better, purple worse; colours end at +-1 nat. Bold: the interval excludes zero. Framed: at home.
    """
    budgets = list(dict.fromkeys(cell.row.budget for cell in matrix))
    subjects = list(dict.fromkeys(cell.row.subject for cell in matrix))
    places = list(dict.fromkeys((cell.row.model, cell.row.task) for cell in matrix))
    labels = _labels(matrix)
    size = (max(7.5, 3.0 + 1.25 * len(places)), 1.5 + len(budgets) * (0.9 + 0.42 * len(subjects)))
    figure, panels = figure_with(title, rows=len(budgets), size=size)
    for axes, budget in zip(panels, budgets, strict=True):
        grid = [[math.nan] * len(places) for _ in subjects]
        for cell in matrix:
            if cell.row.budget != budget or cell.best is None or cell.best.difference is None:
                continue
            down, across = subjects.index(cell.row.subject), places.index((cell.row.model, cell.row.task))
            value = grid[down][across] = cell.best.difference
            axes.text(
                across, down, f"{value:+.2f}", ha="center", va="center", fontsize=9,
                color="white" if abs(value) > 0.55 else "#222222",
                fontweight="bold" if cell.verdict in ("wins", "loses") else "normal",
            )  # fmt: skip
            if cell.row.model in cell.row.train_model.split(" + "):
                corner = (across - 0.46, down - 0.44)
                axes.add_patch(_frame(corner))
        axes.imshow(grid, cmap="PuOr_r", vmin=-1, vmax=1, aspect="auto")
        axes.set_xticks(range(len(places)), [labels[place] for place in places], fontsize=8)
        axes.set_yticks(range(len(subjects)), subjects, fontsize=9)
        axes.set_ylabel(f"budget {budget_text(budget)}", fontsize=9)
        axes.grid(visible=False)
        axes.tick_params(length=0)
    save_figure(figure, path)


def _short(name: str) -> str:
    """Of a path, the last part."""
    return name.rpartition("/")[2]


def _frame(corner: tuple[float, float]) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, 0.92, 0.88, fill=False, edgecolor="#222222", linewidth=1.2)
