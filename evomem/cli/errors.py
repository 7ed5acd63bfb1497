"""CLI: how a command ends that fails, is interrupted, or is told to end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import typer

from evomem.errors import EvomemError
from evomem.plain_text import plain

ENDINGS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}
"""Signals that end a command, and how it says so; its exit code is 128 + the signal's number."""


class Stopped(KeyboardInterrupt):
    """A signal has come that ends the command: everything is cleaned up on the way out, as with Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def guarded(resume: str | None = None) -> Iterator[None]:
    """Show errors that are meant for users, and those of the disk, as one line, exit code 2.

    An interrupt says how to go on, exit code 130.

    SIGTERM and SIGHUP end a command as Ctrl-C does, with exit codes 143 and 129. A second signal does not wait until
    everything is cleaned up: the process ends at once, as if it was killed, which loses nothing that is finished.
    """
    with _signals(resume) as received:
        try:
            yield
        except EvomemError as error:
            typer.echo(plain(f"error: {error}"), err=True)
            raise typer.Exit(2) from None
        except (MemoryError, RuntimeError) as error:
            from evomem.devices import CURES, out_of_memory  # PyTorch takes a second to import

            ended = out_of_memory(error, "stopped")
            if ended is None:
                raise
            hint = f" Go on with: {resume}" if resume else ""
            typer.echo(plain(f"error: {ended} {CURES[ended.memory]}{hint}"), err=True)
            raise typer.Exit(2) from None
        except BrokenPipeError:
            raise
        except OSError as error:  # a folder that may not be written, a full disk
            where = f"{error.filename}: " if error.filename is not None else ""
            hint = f". What is finished is kept; go on with: {resume}" if resume else ""
            typer.echo(plain(f"error: {where}{error.strerror or error}{hint}"), err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as error:
            # Ray answers a signal that comes inside its calls with an interrupt of its own, which knows no number.
            number = error.number if isinstance(error, Stopped) else next(iter(received), signal.SIGINT)
            typer.echo(_said(number, resume), err=True)
            raise typer.Exit(128 + number) from None


def _said(number: int, resume: str | None) -> str:
    return f"\n{ENDINGS[signal.Signals(number).name]}" + (f"; resume with: {resume}" if resume else "")


@contextmanager
def _signals(resume: str | None) -> Iterator[list[int]]:
    """Raise `Stopped` inside the block at the first signal, end the process at the second; yield what was received.

    What somebody else has decided about a signal stands: a background job ignores Ctrl-C. After a signal the handlers
    stay, for Python is about to end, and another one is to find the same exit code.
    """
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if received:
            _leave(received[0], resume)
        received.append(number)
        raise Stopped(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ENDINGS:
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, stop)
    try:
        yield received
    finally:
        if not received:
            for number, handler in before.items():
                signal.signal(number, handler)


def _leave(number: int, resume: str | None) -> NoReturn:
    """End this process now, whatever it is doing."""
    os.write(2, f"{_said(number, resume)}\n".encode())
    os._exit(128 + number)
