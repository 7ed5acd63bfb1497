"""Report: what a measurement on other models leaves in a plug-in: rows of its provenance, its card, and a picture."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import filelock
from pydantic import Field

from evomem import plugins
from evomem.bounds import BYTES, CONTEXTS, VALUE
from evomem.errors import ConfigError, EvomemError, PluginError
from evomem.evaluation.rows import budget_size
from evomem.files.strict_json import to_json
from evomem.managers.base import MemoryManager
from evomem.plugins.folder import check_replaceable
from evomem.plugins.replacing import located
from evomem.report.plots import figure_with, save_figure
from evomem.report.tables import budget_text
from evomem.report.transfer import Cell
from evomem.statistics import verdict
from evomem.validation import Settings, validate

FIELD, PICTURE = "transfer", "transfer.png"

_ROWS, _DRAWN = 1000, 60
"""Rows that a plug-in keeps, and that its picture shows, at most."""
_ROOM = 64 << 10
"""Bytes that a provenance must have left for rows."""
_COLORS = {"wins": "#D55E00", "loses": "#0072B2", "ties": "#8C8C8C", "unknown": "#8C8C8C"}


Value = Annotated[float, Field(ge=-VALUE, le=VALUE)]


class RecordedRow(Settings):
    """A cell of the matrix as a plug-in's provenance tells it: no more than its card shows.

    Attributes
    ----------
    train_model : the model, or models, that it was found on; "" if that is not known.
    samples, split, dtype : how many it was measured on, of which split, with which type of weights.
    recalibrated : with statistics that were collected anew on the model.
    loglik, full, best_loglik : nats per answer token, of the plug-in, of the full cache, of the best heuristic there.
    bytes_mean, best_bytes_mean : measured bytes of the cache, of the plug-in and of that heuristic.
    difference, interval : advantage over that heuristic in nats per answer token, with its 95 % interval.
    """

    train_model: str
    model: str
    task: str
    budget: int | float | None
    protocol: str
    split: str
    samples: int = Field(ge=0, le=CONTEXTS)
    dtype: str = "float32"
    recalibrated: bool = False
    loglik: Value | None
    bytes_mean: float = Field(ge=0, le=BYTES)
    full: Value | None = None
    best: str | None = None
    best_loglik: Value | None = None
    best_bytes_mean: float | None = Field(default=None, ge=0, le=BYTES)
    difference: Value | None = None
    interval: tuple[Value, Value] | None = None

    @property
    def cell(self) -> tuple[Any, ...]:
        """What makes two rows the same cell: the later one replaces the earlier one."""
        # One slot is 1, the whole context is 1.0.
        return self.model, self.task, type(self.budget), self.budget, self.protocol, self.recalibrated


@dataclass(frozen=True)
class Record:
    """A plug-in folder that rows are to be written into.

    Attributes
    ----------
    folder : where it really lies, links followed.
    manager : that it held when it was measured.
    """

    folder: Path
    manager: MemoryManager


def open_record(folder: Path) -> Record:
    """Return a plug-in folder into which rows can be written later.

    Raises
    ------
    PluginError : it is none, or damaged; it cannot be written, or holds files of others; its provenance is nearly as
        large as one may be, or holds something else where the rows go.
    """
    folder = located(folder)
    with _alone(folder):
        plugin = plugins.read(folder)
    _known(folder, plugin.provenance)
    _room(folder, plugin.provenance)
    check_replaceable(folder)
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".evomem-record-", dir=folder))
    except OSError as error:
        raise PluginError(
            f"{folder}: rows cannot be written into it: {error.strerror or error}. Measure a copy of it, or leave out "
            "--record"
        ) from None
    return Record(folder, plugin.manager)


def write_record(record: Record, cells: Sequence[tuple[Cell, bool]], dtype: str = "float32") -> list[str]:
    """Write cells into the provenance of a plug-in, and make its card and picture anew; the rest of it stays.

    Parameters
    ----------
    cells : the cells of the matrix that are about this plug-in, and whether its statistics were collected anew.
    dtype : type of the model's weights, of cells that do not say it.

    Returns
    -------
    What a user must know: rows or a picture that had no place.

    Raises
    ------
    PluginError : it holds another manager by now; it cannot be written.
    """
    with _alone(record.folder):  # who reads, adds rows and writes at the same time as another would lose the other's
        return _write(record, cells, dtype)


def _alone(folder: Path) -> filelock.BaseFileLock:
    """Return a lock for a plug-in folder; it lies where nobody looks for plug-ins."""
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    user = getattr(os, "getuid", int)()
    return filelock.FileLock(Path(tempfile.gettempdir()) / f"evomem-record-{user}-{name}.lock")


def _write(record: Record, cells: Sequence[tuple[Cell, bool]], dtype: str) -> list[str]:
    plugin = plugins.read(record.folder)  # again: others may have written into it in the meantime
    if not _same(plugin.manager, record.manager):
        raise PluginError(
            f"{record.folder}: holds another manager than the one that was measured; nothing was written into it"
        )
    known = _known(record.folder, plugin.provenance)
    new = [record_row(cell, dtype, recalibrated=anew) for cell, anew in cells]
    rows = merged(known, new)
    kept, notes = _fitting(rows, new, _room(record.folder, plugin.provenance)), []
    if len(kept) < len(rows):
        notes.append(f"{record.folder}: there is room for {len(kept)} of {len(rows)} rows; new ones come first")
    pictures = dict(plugin.pictures)
    if PICTURE in pictures or len(pictures) < plugins.PICTURE_COUNT:
        pictures.pop(PICTURE, None)  # an earlier one would contradict the table
        try:
            pictures[PICTURE] = _drawn(kept)
        except EvomemError as error:  # the plain install has no matplotlib
            notes.append(f"{record.folder}: no {PICTURE}: {error}")
    else:
        notes.append(f"{record.folder}: has {len(pictures)} pictures already; {PICTURE} is not among them")
    plugins.save(
        plugin.manager,
        record.folder,
        {**plugin.provenance, FIELD: [row.model_dump() for row in kept]},
        pictures=pictures,
    )
    return notes


def record_row(cell: Cell, dtype: str, *, recalibrated: bool) -> RecordedRow:
    """Return what a plug-in tells about a cell."""
    row, best = cell.row, cell.best
    low, high = (best.interval if best is not None else None) or (math.nan, math.nan)
    return RecordedRow(
        train_model=row.train_model,
        model=row.model,
        task=row.task,
        budget=row.budget,
        protocol=row.protocol,
        split=row.split,
        samples=row.samples,
        dtype=row.dtype or dtype,
        recalibrated=recalibrated,
        loglik=_finite(row.loglik),
        bytes_mean=row.bytes_mean,
        full=None if cell.full is None else _finite(cell.full.loglik),
        best=None if best is None else best.manager,
        best_loglik=None if best is None else _finite(best.loglik),
        best_bytes_mean=None if best is None else best.bytes_mean,
        difference=None if best is None else _finite(best.difference),
        interval=(low, high) if math.isfinite(low) and math.isfinite(high) else None,
    )


def merged(known: Sequence[RecordedRow], new: Sequence[RecordedRow]) -> list[RecordedRow]:
    """Return earlier and new rows; new ones replace earlier ones of the same cell.

    In the order of a table: by model and task, as these first came, then by budget, recalibrated ones last.
    """
    rows = list({row.cell: row for row in (*known, *new)}.values())
    models = list(dict.fromkeys(row.model for row in rows))
    tasks = list(dict.fromkeys(row.task for row in rows))

    def position(row: RecordedRow) -> tuple[Any, ...]:
        size = budget_size(row.budget)
        return models.index(row.model), tasks.index(row.task), row.protocol, size, row.recalibrated

    return sorted(rows, key=position)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _known(folder: Path, provenance: Mapping[str, Any]) -> list[RecordedRow]:
    rows, where = provenance.get(FIELD) or [], f"{folder}/provenance.json: {FIELD}"
    try:
        if not isinstance(rows, list):
            raise ConfigError(f"{where}: a list of rows is expected")
        return [validate(RecordedRow, row, f"{where}.{place}") for place, row in enumerate(rows)]
    except ConfigError as error:
        raise PluginError(f"{error}. Remove the field {FIELD!r}, and record again") from None


def _room(folder: Path, provenance: Mapping[str, Any]) -> int:
    """Return the bytes that a provenance has left for rows."""
    rest = {key: value for key, value in provenance.items() if key != FIELD}
    limit = plugins.LIMITS["provenance.json"]
    room = limit - _size(rest)
    if room < _ROOM:
        raise PluginError(
            f"{folder}/provenance.json: no room for rows: without them it has {limit - room:,} of {limit:,} bytes, and "
            f"{_ROOM:,} must be left"
        )
    return room


def _size(value: Any) -> int:
    """Return the bytes of a value in a file of a plug-in, indented a little more than it will be."""
    text = json.dumps(json.loads(to_json(value)), indent=4, ensure_ascii=False)
    return len(text.encode())


def _fitting(rows: Sequence[RecordedRow], new: Sequence[RecordedRow], room: int) -> list[RecordedRow]:
    """Return the rows that there is room for: earlier ones go first, from the top of the table."""
    latest = {row.cell for row in new}
    kept: set[tuple[Any, ...]] = set()
    for row in sorted(rows, key=lambda row: row.cell in latest)[: -_ROWS - 1 : -1]:
        room -= _size([row.model_dump()])
        if room < 0:
            break
        kept.add(row.cell)
    return [row for row in rows if row.cell in kept]


def _same(one: MemoryManager, other: MemoryManager) -> bool:
    mine, others = one.state_dict(), other.state_dict()
    return (
        one.describe() == other.describe()
        and list(mine) == list(others)
        and all(mine[name].equal(others[name]) for name in mine)
    )


def _drawn(rows: Sequence[RecordedRow]) -> bytes:
    folder = Path(tempfile.mkdtemp())
    try:
        record_plot(folder / PICTURE, rows)
        return (folder / PICTURE).read_bytes()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def record_plot(path: Path, rows: Sequence[RecordedRow]) -> None:
    """Draw the advantage over the best heuristic there, with its interval, a line per row.

    Orange is better, blue worse, grey cannot be told; hollow: the statistics were collected anew.
    """
    measured = [row for row in rows if row.difference is not None]
    shown = measured[:_DRAWN]
    title = "advantage over the best heuristic there"
    if len(shown) < len(measured):
        title += f" ({len(shown)} of {len(measured)})"
    figure, (axes,) = figure_with(title, size=(8.5, 1.4 + 0.27 * max(len(shown), 2)))
    for down, row in enumerate(shown):
        low, high = row.interval or (math.nan, math.nan)
        color = _COLORS[verdict(row.interval)]
        axes.plot([low, high], [down, down], color=color, linewidth=2, solid_capstyle="butt")
        axes.plot(
            row.difference, down, marker="o", color=color, markersize=6,
            markerfacecolor="white" if row.recalibrated else color,
        )  # fmt: skip
        if down and (row.model, row.task) != (shown[down - 1].model, shown[down - 1].task):
            axes.axhline(down - 0.5, color="#DDDDDD", linewidth=0.8, zorder=0)
    axes.axvline(0, color="#222222", linewidth=1, zorder=1)
    axes.set_yticks(range(len(shown)), [_label(row) for row in shown], fontsize=8, parse_math=False)
    axes.set_ylim(max(len(shown), 1) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("nats per answer token, above 0 better; 95 % intervals")
    save_figure(figure, path)


def _label(row: RecordedRow) -> str:
    """Return what a row is about, with the last parts of paths."""
    name = f"{row.model.rpartition('/')[2]}, {row.task.rpartition('/')[2]}"
    marks = (
        ", recalibrated" if row.recalibrated else ", found on it" if row.model in row.train_model.split(" + ") else ""
    )
    return f"{name[:70]}, {budget_text(row.budget)}{marks}"
