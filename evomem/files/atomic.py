"""Files: written so that they survive a kill: whole or not there, never half."""

from __future__ import annotations

import errno
import io
import itertools
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from evomem.errors import RunError

_MARK = ".evomem.tmp"
_NUMBER = itertools.count()
_TEMPORARY = re.compile(rf"\..+\.[0-9]+{re.escape(_MARK)}", re.DOTALL)


@contextmanager
def disk_errors(path: Path, what: Literal["written", "read"] = "written") -> Iterator[None]:
    """Turn a full or failing disk, or one that does not let us, into a `RunError` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(
                f"{path}: the disk is full; what is finished is kept. Free some space and resume the run"
            ) from error
        raise RunError(f"{path}: cannot be {what}: {error.strerror or error}") from error


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a file beside ``path`` to write to; it takes the place of ``path`` at the end, and is removed on an error.

    After a kill at any moment ``path`` is the old file or the new one, whole. Threads and processes that write the same
    file do not disturb each other; the last one counts.

    Parameters
    ----------
    durable : wait until the new file is on the disk, so that this is also true after a power cut.

    Raises
    ------
    OSError : the disk is full, or does not let us.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{next(_NUMBER)}{_MARK}")
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that after a kill at any moment it is the old one or the new one, whole and on the disk.

    Raises
    ------
    RunError : the disk is full, or does not let us.
    """
    with disk_errors(path), replacing(path) as temporary:
        temporary.write_bytes(content)


def is_temporary(path: Path) -> bool:
    """Whether a file is what `write_atomically` leaves when it is killed: by its name, and no link."""
    return _TEMPORARY.fullmatch(path.name) is not None and stat.S_ISREG(path.lstat().st_mode)


def sweep(*folders: Path) -> None:
    """Remove what killed processes left of `write_atomically` in these folders; not in what lies inside them."""
    for folder in folders:
        if folder.is_dir() and not folder.is_symlink():
            for path in list(folder.iterdir()):
                if is_temporary(path):
                    path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_vector(path: Path, vector: NDArray[np.float64]) -> None:
    """Write a .npy file atomically."""
    buffer = io.BytesIO()
    np.save(buffer, vector, allow_pickle=False)
    write_atomically(path, buffer.getvalue())
