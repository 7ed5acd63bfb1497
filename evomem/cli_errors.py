"""Run: how a command ends that fails or is interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from evomem.errors import EvomemError


@contextmanager
def guarded(resume: str | None = None) -> Iterator[None]:
    """Show errors that are meant for users as one line, exit code 2; an interrupt says how to go on, exit code 130."""
    try:
        yield
    except EvomemError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("\ninterrupted" + (f"; resume with: {resume}" if resume else ""), err=True)
        raise typer.Exit(130) from None
