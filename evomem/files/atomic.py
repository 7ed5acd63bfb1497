"""Run: files that survive a kill: whole or not there, never half."""

from __future__ import annotations

import errno
import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from evomem.errors import RunError

_MARK = ".evomem.tmp"
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


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that after a kill at any moment it is the old one or the new one, whole and on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_MARK}")
    with disk_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


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


def sync_folder(folder: Path) -> None:
    """Make a rename in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_vector(path: Path, vector: NDArray[np.float64]) -> None:
    """Write a .npy file atomically."""
    buffer = io.BytesIO()
    np.save(buffer, vector, allow_pickle=False)
    write_atomically(path, buffer.getvalue())
