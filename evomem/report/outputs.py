"""Report: files that are written where the user says: what is there is looked at before anything is measured."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

from evomem.errors import ConfigError
from evomem.files.reading import read_bytes, user_path

_ROWS = 256 << 20
"""Bytes of a file of rows, at most."""


def claim(option: str, output: str | None, beside: Callable[[Path], list[Path]] = lambda path: []) -> str | None:
    """Return where rows will be written, links followed, having made sure that no file of another kind is lost.

    Parameters
    ----------
    option : as the user knows it, for messages.
    output : the file; None and ``-`` need no place.
    beside : gives the further files that will be written into the same folder.

    Raises
    ------
    ConfigError : it is a folder, a device, or a file that holds no rows; a file beside it is there and is not of an
        earlier comparison; the folder cannot be written.
    """
    if output is None or output == "-":
        return output
    try:
        given = user_path(output)
        path = given.resolve()
        kind = path.lstat().st_mode if os.path.lexists(path) else None
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.name:
            raise ValueError("is no file")
        others = beside(path)
        names = [path.name, *(other.name for other in others), f".{path.name}.{os.getpid()}.evomem.tmp"]
        long = next((name for name in names if len(os.fsencode(name)) > 255), None)
        taken = [other for other in others if os.path.lexists(other)]
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{option} {output!r}: {getattr(error, 'strerror', None) or error}") from None
    if kind is not None and stat.S_ISDIR(kind):
        raise ConfigError(f"{option} {output}: is a folder; name a file in it")
    if given.parts[:2] in (("/", "dev"), ("/", "proc")) or (kind is not None and not stat.S_ISREG(kind)):
        raise ConfigError(f"{option} {output}: is a device and no file; - writes to standard output")
    if long is not None:
        raise ConfigError(f"{option} {output[:40]}…: the name is too long")
    if path in others:
        raise ConfigError(f"{option} {output}: {path.suffix} is the ending of another file of this command; take .json")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{option} {output}: {path.parent} cannot be written")
    if kind is not None and not _holds_rows(path):
        raise ConfigError(f"{option} {output}: is there and holds no rows of a comparison; choose another name")
    if kind is None and taken:
        raise ConfigError(f"{option} {output}: {taken[0]} is there and would be lost; choose another name")
    return str(path)


def _holds_rows(path: Path) -> bool:
    """Whether a file is empty or a list of rows, which a later comparison may replace."""
    content = read_bytes(path, _ROWS, ConfigError)
    if not content:
        return True
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(rows, list) and all(isinstance(row, dict) and {"task", "loglik"} <= row.keys() for row in rows)
