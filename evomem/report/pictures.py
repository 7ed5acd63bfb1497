"""Report: the pictures of a comparison, a front of score against bytes and a heat map of heads for each task."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from evomem.errors import ConfigError
from evomem.evaluation.rows import Row
from evomem.files.reading import user_path
from evomem.installing import require
from evomem.report.heads import head_plot
from evomem.report.plots import memory_plot

MEMORY, HEADS = "memory", "heads"
"""Names of the pictures."""


def claim_folder(option: str, path: str | Path | None) -> Path | None:
    """Return the folder for pictures, made if it is not there; None stays None.

    Parameters
    ----------
    option : as the user knows it, for messages.

    Raises
    ------
    ConfigError : it is a file, or cannot be written, or the text is empty.
    MissingPackagesError : nothing is installed that draws.
    """
    if path is None:
        return None
    if not str(path).strip():  # a variable of the user's shell may be empty
        raise ConfigError(f"{option} {path!r}: names no folder; leave the option out for no pictures")
    require([("matplotlib", "plots")])
    try:
        folder = user_path(str(path))
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{option} {path}: is no folder and cannot become one: {getattr(error, 'strerror', None) or error}"
        ) from None
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{option} {path}: the folder cannot be written")
    return folder


def draw_comparison(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Write ``memory.png`` and ``heads.png`` into a folder; with several models and tasks a number follows the name.

    Parameters
    ----------
    rows : of a comparison. Rows that were not measured by head are in no heat map.

    Returns
    -------
    The files: score against bytes of every model and task, then the heat maps.
    """
    places = list(dict.fromkeys((row.model, row.task) for row in rows))
    memory, heads = [], []
    for number, (model, task) in enumerate(places, 1):
        here = [row for row in rows if (row.model, row.task) == (model, task)]
        title = f"{task} on {model}, {here[0].samples} {here[0].split} samples"
        ending = ".png" if len(places) == 1 else f"-{number}.png"
        if any(row.role != "full" for row in here):
            memory.append(folder / f"{MEMORY}{ending}")
            memory_plot(memory[-1], here, title)
        if head_plot(folder / f"{HEADS}{ending}", here, f"Slots per layer and KV head: {title}"):
            heads.append(folder / f"{HEADS}{ending}")
    return memory + heads
