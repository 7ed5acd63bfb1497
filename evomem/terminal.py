"""Base: consoles on which no character of a file by somebody else does more than be seen."""

from __future__ import annotations

from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment

from evomem.plain_text import plain


class _Plain(RenderHook):
    """Spells such characters out in everything that a console prints; rich's own control codes stay."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_PlainRenderable(one) for one in renderables]


class _PlainRenderable:
    def __init__(self, inner: ConsoleRenderable) -> None:
        self.inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.inner, options):
            yield segment if segment.control else Segment(plain(segment.text), segment.style)


def plain_console(**options: Any) -> Console:
    """Return a rich console whose output went through `plain`; ``options`` are the console's."""
    console = Console(**options)
    console.push_render_hook(_Plain())
    return console


def wide_console(*, stderr: bool = False) -> Console:
    """Return a plain console that does not cut tables where output goes to a file."""
    console = plain_console(stderr=stderr)
    return console if console.is_terminal else plain_console(stderr=stderr, width=max(console.width, 140))


def clock(seconds: float) -> str:
    """Return a time span as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"
