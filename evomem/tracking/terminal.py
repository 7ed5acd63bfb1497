"""Tracking: a tracker for the terminal: generation, best, mean, spread, time left."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from evomem.terminal import clock, plain_console
from evomem.tracking.base import GenerationRecord, logger


class _ToConsole(logging.Handler):
    """Sends the run's messages through the progress bar's console, which would otherwise write over them."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        self._console.print(self.format(record), style=style, highlight=False, markup=False)


class TerminalTracker:
    """A live bar on a terminal; one line per generation where output goes to a file.

    Parameters
    ----------
    console : where to; standard error by default, so that standard output stays free for results.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or plain_console(stderr=True)
        self._handler = _ToConsole(self._console)
        self._progress: Progress | None = None
        self._bar: TaskID | None = None
        self._generations = 0
        self._began = 0.0
        self._timed = 0
        self._level = logger.level

    def start(self, config: Mapping[str, Any], generations: int, done: Sequence[GenerationRecord]) -> None:
        """Show what runs."""
        logger.addHandler(self._handler)
        self._level = logger.level
        logger.setLevel(min(logging.INFO, logger.getEffectiveLevel()))
        logger.propagate = False
        self._generations, self._began, self._timed = generations, time.monotonic(), 0
        more = f", {len(done)} done before" if done else ""
        self._console.print(f"{config['name']}: {generations} generations{more}", highlight=False, markup=False)
        if self._console.is_terminal:
            columns = (TextColumn("generation"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
            self._progress = Progress(*columns, TimeElapsedColumn(), console=self._console)
            description = describe(done[-1]) if done else "first generation"
            self._bar = self._progress.add_task(description, total=generations, completed=len(done))
            self._progress.start()

    def log(self, generation: GenerationRecord) -> None:
        """Show a generation."""
        self._timed += 1
        each = (time.monotonic() - self._began) / self._timed
        left = each * (self._generations - generation.generation - 1)
        text = f"{describe(generation)}  left {clock(left)}"
        if self._progress is not None and self._bar is not None:
            self._progress.update(self._bar, description=text, completed=generation.generation + 1)
        else:
            count = f"{generation.generation + 1}/{self._generations}"
            self._console.print(f"generation {count}  {text}", highlight=False, markup=False, soft_wrap=True)

    def artifact(self, name: str, path: Path) -> None:
        """Show where something is."""
        self._console.print(f"{name}: {path}", highlight=False, markup=False, soft_wrap=True)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Show how it ended."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        logger.removeHandler(self._handler)
        logger.setLevel(self._level)
        logger.propagate = True
        for line in summary.get("lines", ()):
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def describe(generation: GenerationRecord) -> str:
    """Return a generation's numbers as a short text."""
    failed = f"  failed {generation.failed}" if generation.failed else ""
    words = {"signal_to_noise": "snr", "kl": "kl", "rank_correlation": "rank corr"}
    numbers = [(word, generation.diagnostics.get(name, math.nan)) for name, word in words.items()]
    more = "".join(f"  {word} {value:.2f}" for word, value in numbers if math.isfinite(value))
    spread = f"  spread {generation.spread:.3f}" if math.isfinite(generation.spread) else ""
    return f"best {generation.best:.3f}  mean {generation.mean:.3f}{spread}{more}{failed}"
