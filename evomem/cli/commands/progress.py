"""CLI: how far a command is, on standard error."""

from __future__ import annotations

import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from evomem.terminal import clock, plain_console

SECONDS = 30.0
"""Between two lines where output goes to a file."""


class ProgressBar:
    """A bar with the time left on a terminal; a line every half minute where output goes to a file.

    Parameters
    ----------
    what : is done, in one word, for example "comparing".
    """

    def __init__(self, what: str) -> None:
        columns = (TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn())
        self._what = f"{what}, samples"
        self._console = plain_console(stderr=True)
        live = self._console.is_terminal
        self._bar = Progress(
            *columns, TextColumn("left"), TimeRemainingColumn(), console=self._console, disable=not live
        )
        self._task = self._bar.add_task(self._what, total=None)
        self._live = live
        self._began = self._said = time.monotonic()

    def __enter__(self) -> ProgressBar:
        self._began = self._said = time.monotonic()
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def report(self, done: int, total: int) -> None:
        """Show how far it is."""
        self._bar.update(self._task, completed=done, total=total)
        now = time.monotonic()
        if self._live or done >= total or now - self._said < SECONDS:
            return
        self._said = now
        left = f"  left {clock((now - self._began) / done * (total - done))}" if done else ""
        self._console.print(f"{self._what} {done}/{total}{left}", highlight=False, markup=False, soft_wrap=True)
