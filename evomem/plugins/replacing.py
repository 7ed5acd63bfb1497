"""Plug-in: its files on disk, replaced whole or not at all, and nothing beside them touched.

A folder that is there is never moved or removed: it may be a clone with a history, a mount, the working folder, or the
target of a link. What is to be written is first laid down whole in ``.evomem-new-PID`` inside it, which is then renamed
to ``.evomem-saved``: from here on readers take the plug-in from there. Then every file is put in its place, and the
folder inside goes. A writer that was killed in between is finished by the next one.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from evomem.errors import PluginError
from evomem.files.atomic import sync
from evomem.files.reading import is_folder, user_path, whole_number
from evomem.plugins.untrusted import FILES, PICTURE, PICTURES, shown

SAVED, _MOVING = ".evomem-saved", ".moving"
_NEW = re.compile(r"\.evomem-new-(\d+)", re.ASCII)


def located(folder: str | Path) -> Path:
    """Return where a folder really is: absolute, ``~`` and links followed.

    Raises
    ------
    PluginError : the name cannot be one (too long, with a NUL, links in a circle), or names no folder that may be
        written.
    """
    try:
        path = user_path(folder).resolve()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise PluginError(f"{shown(folder)}: {getattr(error, 'strerror', None) or error}") from None
    if not path.name:
        raise PluginError(f"{path}: is the root of the file system; choose another folder")
    return path


def current(folder: Path) -> Path:
    """Return where the files of a plug-in's folder are: a save that was interrupted left them in a folder inside."""
    saved = folder / SAVED
    return saved if is_folder(saved) and not os.path.islink(saved) else folder


def strangers(folder: Path) -> list[str]:
    """Return what is in a folder and none of a plug-in's files; what begins with a dot does not count."""
    names = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.name == PICTURES and path.is_dir() and not path.is_symlink():
            names += [f"{PICTURES}/{one.name}" for one in sorted(path.iterdir()) if not _ours(one, PICTURE)]
        elif path.name not in FILES or not _is_file(path):
            names.append(path.name)
    return names


def _ours(path: Path, pattern: re.Pattern[str]) -> bool:
    return path.name.startswith(".") or (pattern.fullmatch(path.name) is not None and _is_file(path))


def _is_file(path: Path) -> bool:
    """Whether a name may be replaced by a file: it is one, or a link, of which the target stays."""
    mode = path.lstat().st_mode
    return stat.S_ISREG(mode) or stat.S_ISLNK(mode)


def write_folder(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write the files of a plug-in by name (``README.md``, ``assets/fitness.png``) into a new folder or into one.

    The caller has made sure that nothing else in the folder has one of these names.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _recover(folder)
    if folder.exists():
        _write_into(folder, contents)
        return
    partial = folder.with_name(f"{_beside(folder)}partial-{os.getpid()}")
    try:
        _lay_down(partial, contents)
        partial.rename(folder)
        sync(folder.parent)
    finally:
        _discard(partial)


def _write_into(folder: Path, contents: Mapping[str, bytes]) -> None:
    new, saved = folder / f".evomem-new-{os.getpid()}", folder / SAVED
    try:
        _lay_down(new, contents)
        new.rename(saved)
    finally:
        _discard(new)
    _put_in_place(folder)


def _lay_down(folder: Path, contents: Mapping[str, bytes]) -> None:
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        _write(folder / name, content)
    sync(folder)


def _put_in_place(folder: Path) -> None:
    """Put what is in ``.evomem-saved`` in its place, and remove pictures that are no longer there."""
    sync(folder)
    saved = folder / SAVED
    names = {path.relative_to(saved).as_posix() for path in _plain_files(saved)}
    for name in sorted(names):
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        _write(saved / _MOVING, (saved / name).read_bytes())
        os.replace(saved / _MOVING, target)
    pictures = folder / PICTURES
    if pictures.is_dir() and not pictures.is_symlink():
        for path in pictures.iterdir():
            if PICTURE.fullmatch(path.name) and _is_file(path) and f"{PICTURES}/{path.name}" not in names:
                path.unlink()
        with suppress(OSError):  # not empty
            pictures.rmdir()
    sync(folder)
    done = folder / f".evomem-new-{os.getpid()}"
    saved.rename(done)
    _discard(done)


def _plain_files(folder: Path) -> Iterator[Path]:
    """The files of a plug-in in a folder of ours."""
    pictures = folder / PICTURES
    listed = [] if pictures.is_symlink() else sorted(pictures.glob("*.png"))
    yield from (path for path in (*map(folder.joinpath, FILES), *listed) if path.is_file())


def _recover(folder: Path) -> None:
    """Clear up what a killed process has left, and finish what it had nearly done."""
    prefix = _beside(folder)
    try:
        beside = sorted(path for path in folder.parent.iterdir() if path.name.startswith(prefix))
    except OSError:  # a folder around it that does not let us look
        beside = []
    for path in beside:
        kind, _, pid = path.name.removeprefix(prefix).rpartition("-")
        if kind not in ("partial", "replaced") or not _dead(pid):
            continue
        if kind == "replaced" and not folder.exists():  # of an evomem that moved the old plug-in away
            path.rename(folder)
        else:
            _discard(path)
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        match = _NEW.fullmatch(path.name)
        if match and _dead(match[1]):
            _discard(path)
    if current(folder) != folder:
        _put_in_place(folder)


def _beside(folder: Path) -> str:
    """What the names of folders begin with that lie beside a folder while it is made."""
    name = folder.name
    return f".{name if len(os.fsencode(name)) <= 200 else hashlib.sha256(os.fsencode(name)).hexdigest()}."


def _discard(folder: Path) -> None:
    """Remove a folder of ours: the files of a plug-in, and the folder if nothing else is in it."""
    if folder.is_symlink() or not folder.is_dir():
        return
    with suppress(OSError):
        for path in [*_plain_files(folder), folder / _MOVING]:
            path.unlink(missing_ok=True)
        with suppress(OSError):
            (folder / PICTURES).rmdir()
        folder.rmdir()


def _dead(pid: str) -> bool:
    """Whether no other process has this number; our own is not at work on another folder."""
    number = whole_number(pid)
    if number is None:
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return number == os.getpid()


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    sync(path)
