"""Files: those of users and strangers, read with a bound: a regular file, so many bytes, and a plain error.

`/dev/zero` has no end, a pipe waits for somebody who writes, and a folder is no file. Each is an error here, at once.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from evomem.errors import EvomemError

TEXT = 1 << 20
"""Bytes of a file that a person writes: an experiment, a search space, a configuration."""


def read_bytes(path: Path, limit: int, error: type[EvomemError]) -> bytes:
    """Return the contents of a regular file of at most ``limit`` bytes.

    Raises
    ------
    EvomemError : of the class ``error``: it is missing, no regular file, larger, or cannot be read.
    """
    try:
        with open_regular(path, error) as file:
            status = os.fstat(file.fileno())
            content = b"" if status.st_size > limit else file.read(limit + 1)
    except EvomemError:
        raise
    except (OSError, ValueError) as problem:  # ValueError: a name with NUL
        raise error(f"{path}: cannot be read: {getattr(problem, 'strerror', None) or problem}") from None
    if status.st_size > limit or len(content) > limit:
        raise error(f"{path}: has {max(status.st_size, len(content)):,} bytes; at most {limit:,} are read")
    return content


def open_regular(path: Path, error: type[EvomemError]) -> BinaryIO:
    """Return a regular file, open for reading; see `read_bytes`. Errors of the system are passed on."""
    # Opening a pipe would wait for somebody to write into it.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise error(f"{path}: is {_kind(mode)}; a file is expected")
    return open(descriptor, "rb")


def read_text(path: Path, limit: int, error: type[EvomemError]) -> str:
    """Return the text of a file in UTF-8, see `read_bytes`."""
    try:
        return read_bytes(path, limit, error).decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{path}: is not UTF-8 text (byte {problem.start})") from None


def _kind(mode: int) -> str:
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
    return next((name for holds, name in kinds.items() if holds(mode)), "a device")


# ---- what users write on a command line ----------------------------------------------------------------------------


def user_path(text: str | os.PathLike[str]) -> Path:
    """Return the path that a user writes, ``~`` followed where there is such a user."""
    return Path(os.path.expanduser(text))


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether there is a regular file; no error for a name that none can have (too long, with a NUL)."""
    return os.path.isfile(path)


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether there is a folder; see `is_file`."""
    return os.path.isdir(path)


def is_there(path: str | os.PathLike[str]) -> bool:
    """Whether there is anything; see `is_file`."""
    return os.path.exists(path)


def whole_number(text: str) -> int | None:
    """Return a whole number that is written with the digits 0 to 9, at most 18 of them; None for any other text."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None
