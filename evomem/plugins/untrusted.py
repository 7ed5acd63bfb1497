"""Plug-in: files that somebody else wrote: bounded before they are read, strict, and nothing in them is executed."""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from evomem.errors import PluginError
from evomem.files.strict_json import DEPTH as DEPTH
from evomem.files.strict_json import NotStrictError, parse_strict
from evomem.files.strict_json import shown as shown

CONFIG, TENSORS, PROVENANCE, CARD = FILES = ("config.json", "model.safetensors", "provenance.json", "README.md")
PICTURES = "assets"
LIMITS = {
    CONFIG: 64 << 10,
    TENSORS: 64 << 20,
    PROVENANCE: 2 << 20,
    CARD: 1 << 20,
    f"{PICTURES}/*.png": 1 << 20,
}
"""Bytes that each file may have. A manager is some kilobytes; what is much larger is none, or means harm."""

HEADER, PICTURE_COUNT = 1 << 20, 8
"""Bytes of a safetensors header, and pictures."""
ENTRIES, INTEGER = 4096, 2**63 - 1
"""Entries of a list and size of an integer in ``config.json``."""

PICTURE = re.compile(r"[A-Za-z0-9][\w-]{0,63}\.png", re.ASCII)
_PNG = b"\x89PNG\r\n\x1a\n"


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the contents of a regular file of a plug-in's folder.

    Raises
    ------
    PluginError : it is missing, larger than ``limit`` bytes, no regular file, or a link that leads elsewhere. Links
        into the ``blobs`` of the hub's cache, where the snapshots' files really are, are followed.
    """
    try:
        folder, target = path.parent.resolve(), path.resolve()
        snapshot = next((place for place in folder.parents if place.name == "snapshots"), None)
        if target.parent != folder and (snapshot is None or target.parent != snapshot.parent / "blobs"):
            raise PluginError(f"{path}: is a link that leads out of the plug-in's folder")
        # Opening a pipe would wait for somebody to write into it.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise PluginError(f"{path}: is no regular file")
            content = b"" if status.st_size > limit else file.read(limit + 1)
            if status.st_size > limit or len(content) > limit:
                raise PluginError(f"{path}: has {status.st_size:,} bytes; a plug-in's has at most {limit:,}")
            return content
    except FileNotFoundError:
        raise PluginError(f"{path}: is missing; a plug-in folder holds {', '.join(FILES)}") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise PluginError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


# ---- JSON ----------------------------------------------------------------------------------------------------------


def read_object(path: Path) -> dict[str, Any]:
    """Return a JSON object: UTF-8, no key twice, numbers finite, at most `DEPTH` levels deep.

    Raises
    ------
    PluginError : it is none; see also `read_bytes`.
    """
    return parse_object(path, read_bytes(path, LIMITS[path.name]))


def parse_object(path: Path, content: bytes) -> dict[str, Any]:
    """Return the JSON object that the content of a file is; see `read_object`."""
    try:
        data = parse_strict(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise PluginError(f"{path}: is not JSON: {shown(str(error))}") from None
    except NotStrictError as error:
        raise PluginError(f"{path}: {_fault(error)}") from None
    if not isinstance(data, dict):
        raise PluginError(f"{path}: an object is expected, this is {type(data).__name__}")
    if path.name == CONFIG:
        for field, value in data.items():
            _check_sizes(f"{path}: {shown(field)}", value)
    return data


def _fault(error: NotStrictError) -> str:
    text = str(error)
    return f"is {text}" if text.startswith("not JSON") else text


def _check_sizes(where: str, value: Any) -> None:
    """Check the entries of lists and the sizes of integers, at any depth (`parse_strict` has bounded it)."""
    level = [value]
    while level:
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict | list):
                if len(one) > ENTRIES:
                    raise PluginError(f"{where}: has {len(one):,} entries; at most {ENTRIES:,}")
                below += one.values() if isinstance(one, dict) else one
            elif isinstance(one, int) and abs(one) > INTEGER:
                raise PluginError(f"{where}: {shown(str(one))} is beyond the integers of tensors")
        level = below


# ---- tensors and pictures ------------------------------------------------------------------------------------------


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises
    ------
    PluginError : it is damaged, or none; see also `read_bytes`.
    """
    if not path.exists() and (path.parent / "pytorch_model.bin").exists():
        raise PluginError(f"{path}: is missing; pytorch_model.bin is a pickle, which could run code and is never read")
    # Into memory: a mapped file that shrinks while it is read would end the process.
    return parse_tensors(path, read_bytes(path, LIMITS[path.name]))


def parse_tensors(path: Path, content: bytes) -> dict[str, Tensor]:
    """Return the tensors that the content of a safetensors file holds; see `read_tensors`."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        raise PluginError(f"{path}: is damaged: a header of {length:,} bytes in a file of {len(content):,}")
    if length > HEADER:
        raise PluginError(f"{path}: is damaged: a header of {length:,} bytes; a plug-in's has at most {HEADER:,}")
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, ValueError, LookupError, TypeError, RuntimeError, ArithmeticError) as error:
        raise PluginError(f"{path}: is damaged: {shown(str(error), 200)}") from None


def read_pictures(folder: Path) -> dict[str, bytes]:
    """Return the card's pictures by file name; what cannot be read, or is none, is left out."""
    pictures: dict[str, bytes] = {}
    place = folder / PICTURES
    if place.is_symlink():
        return {}
    for path in sorted(place.glob("*.png")):
        if len(pictures) == PICTURE_COUNT:
            break
        with suppress(PluginError):
            pictures[path.name] = checked_picture(folder, path.name, read_bytes(path, LIMITS[f"{PICTURES}/*.png"]))
    return pictures


def checked_picture(folder: Path, name: str, content: bytes) -> bytes:
    """Return the contents of a picture; raise `PluginError` if it is none that a plug-in may have."""
    limit = LIMITS[f"{PICTURES}/*.png"]
    if not PICTURE.fullmatch(name) or not content.startswith(_PNG) or len(content) > limit:
        raise PluginError(
            f"{folder}: picture {shown(name)}: is no PNG of at most {limit:,} bytes with a plain name like fitness.png"
        )
    return content
