"""Files: temporary folders that do not outlive their process: if it is killed, the next process of evomem removes them.

Whoever makes a folder holds a lock in it, which the system lets go when the process ends, however it ends. A folder
whose lock is free belongs to nobody any more. Processes do not look at each other's numbers, so this also holds between
containers that share a temporary folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path

try:
    import fcntl
except ImportError:  # no such locks there: folders of killed processes stay
    fcntl = None  # type: ignore[assignment]

PREFIX, UNNAMED = "evomem-", ".evomem-new-"
"""How the names of folders begin, and how as long as they are not locked."""
LOCK = ".lock"
UNLOCKED_SECONDS = 60.0
"""Age of a folder that is not locked or not named after which its maker has died between two lines."""


class Scratch:
    """A folder of this process alone (mode 0700), with a lock that ends with the process.

    Parameters
    ----------
    purpose : part of the folder's name, after ``evomem-``.
    base : where the folder is made; the temporary folder if None.

    Attributes
    ----------
    path : the folder.

    Raises
    ------
    OSError : it cannot be made.
    """

    def __init__(self, purpose: str, base: Path | None = None) -> None:
        # It gets its name when it is locked: before, another process could take it for abandoned. On a disk without
        # locks it has none, and is never swept away.
        unnamed = Path(tempfile.mkdtemp(prefix=f"{UNNAMED}{purpose}-", dir=base))
        self._lock = _locked(unnamed, make=True)
        self.path = unnamed.rename(unnamed.with_name(unnamed.name.replace(UNNAMED, PREFIX, 1)))
        self._remove = weakref.finalize(self, _remove, self.path, self._lock, os.getpid())

    def close(self) -> None:
        """Remove the folder; it goes with this object, too, and at the latest when Python ends."""
        self._remove()


def _remove(folder: Path, lock: int | None, process: int) -> None:
    if os.getpid() != process:
        return  # a fork has a copy of the object, but not the folder
    shutil.rmtree(folder, ignore_errors=True)  # what cannot be removed now, another process will try to
    if lock is not None:
        os.close(lock)


def sweep(purpose: str, base: Path | None = None, before: Callable[[Path], None] = lambda folder: None) -> list[Path]:
    """Remove this user's folders for a purpose that dead processes have left; return them.

    Folders of other users, of living processes, and links are left alone.

    Parameters
    ----------
    base : where they are; the temporary folder if None.
    before : called with a folder that is about to be removed.
    """
    removed: list[Path] = []
    if fcntl is None:
        return removed
    root = base or Path(tempfile.gettempdir())
    for folder in [leftover for begin in (PREFIX, UNNAMED) for leftover in root.glob(f"{begin}{purpose}-*")]:
        with contextlib.suppress(OSError):  # it went away meanwhile, or is none of ours
            facts = folder.lstat()
            if facts.st_uid != os.getuid() or not folder.is_dir() or folder.is_symlink():
                continue
            if folder.name.startswith(UNNAMED) and time.time() - facts.st_mtime <= UNLOCKED_SECONDS:
                continue
            if not (folder / LOCK).exists():
                if time.time() - facts.st_mtime > UNLOCKED_SECONDS:
                    folder.rmdir()  # if it is empty
                continue
            lock = _locked(folder, make=False)
            if lock is None:
                continue
            try:
                before(folder)
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder)
            finally:
                os.close(lock)
    return removed


def _locked(folder: Path, make: bool) -> int | None:
    """Return the open lock of a folder; None if another process has it, or has removed it.

    The lock is let go by closing it, never by unlocking: a child that was forked shares it.
    """
    if fcntl is None:
        return None
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        lock = os.open(folder / LOCK, flags | (os.O_CREAT | os.O_EXCL if make else 0), 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.lstat(folder / LOCK)):
            return lock
    except OSError:
        pass
    os.close(lock)
    return None
