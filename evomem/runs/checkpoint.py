"""Run: checkpoints, the search's state after every ask (write-ahead) and every tell.

A checkpoint is JSON and arrays of numbers behind a checksum. Nothing in it is run, so that a run folder of somebody
else may be resumed; it says which run it belongs to and how far the journal was, and counts for nothing elsewhere. All
that it holds follows from the journal too: without one, the search is run again on what was evaluated.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evomem.drivers.base import Population
from evomem.drivers.restarts import Regime, RestartState
from evomem.drivers.state import Tree, overlay, snapshot
from evomem.errors import RunError
from evomem.files.atomic import disk_errors, write_atomically
from evomem.runs.front import Candidate

_MAGIC = b"evomem checkpoint 2\n"
_PICKLED = b"evomem checkpoint 1\n"
_KEPT = 2
_LARGEST = 2 << 30
_TYPE = re.compile(r"[<|][biuf][1248]")
_KINDS = (Population, RestartState, Regime, Candidate)
"""Classes that a state may hold, besides plain values and arrays."""

ALL_FROM_JOURNAL = "the search is run again on its journal"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a search.

    Attributes
    ----------
    generation : generations that have been told.
    asked : the next generation has been asked, and is in the driver's state.
    driver : the driver's ``state_dict``.
    archive : the search's memory of good candidates.
    identity : of the run (`evomem.runs.identity`).
    lines, generations : lines of the journal, and generations among them, when it was written.
    """

    generation: int
    asked: bool
    driver: dict[str, Any]
    archive: dict[str, Any]
    identity: Mapping[str, str]
    lines: int
    generations: int

    @property
    def name(self) -> str:
        """File name; names sort by time."""
        return f"{self.generation:06d}-{'asked' if self.asked else '0told'}.ckpt"


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint and remove all but the last two."""
    states = {"driver": snapshot(checkpoint.driver), "archive": snapshot(checkpoint.archive)}
    content = _packed({**vars(checkpoint), **states})
    write_atomically(folder / checkpoint.name, _MAGIC + hashlib.sha256(content).digest() + content)
    for old in _files(folder)[:-_KEPT]:
        with disk_errors(old):
            old.unlink(missing_ok=True)


def newest(folder: Path, identity: Mapping[str, str], lines: int, generations: list[int]) -> Iterator[Checkpoint | str]:
    """Yield the checkpoints of a run, the newest first, and a message in the place of every one that does not count.

    Those are removed. After the last one the search begins at the beginning, with every evaluation of the journal.

    Parameters
    ----------
    identity, lines, generations : of the run, of its journal, and those that the journal has a line of.
    """
    for path in reversed(_files(folder)):
        try:
            checkpoint = load(path)
            if checkpoint.identity != dict(identity):
                raise RunError(f"checkpoint {path} belongs to another run (configuration, seed, model or start)")
            there = sum(generation < checkpoint.generation for generation in generations)
            if lines < checkpoint.lines or there < checkpoint.generations:
                raise RunError(
                    f"journal.jsonl is shorter than when checkpoint {path.name} was written ({lines} of "
                    f"{checkpoint.lines} lines, {there} of {checkpoint.generations} generations); what is lost is "
                    "evaluated again"
                )
        except RunError as error:
            with disk_errors(path):
                path.unlink(missing_ok=True)
            yield f"{error}; falling back on the one before, or {ALL_FROM_JOURNAL}"
            continue
        yield checkpoint


def load(path: Path) -> Checkpoint:
    """Return a checkpoint; raise `RunError` if the file is damaged, or none."""
    with disk_errors(path, "read"):
        if not path.is_file() or path.stat().st_size > _LARGEST:
            raise RunError(f"checkpoint {path} is damaged (no regular file, or too large)")
        content = path.read_bytes()
    start = len(_MAGIC) + hashlib.sha256().digest_size
    if content.startswith(_PICKLED):
        raise RunError(f"checkpoint {path} is of an earlier evomem and pickled, and pickles are not read")
    if not content.startswith(_MAGIC):
        raise RunError(f"checkpoint {path} is damaged (no header)")
    if hashlib.sha256(content[start:]).digest() != content[len(_MAGIC) : start]:
        raise RunError(f"checkpoint {path} is damaged (checksum)")
    try:
        data = _unpacked(content[start:])
        driver, archive = (overlay(None, data[name], _KINDS) for name in ("driver", "archive"))
        checkpoint = Checkpoint(**{**data, "driver": driver, "archive": archive})
        numbers = (checkpoint.generation, checkpoint.lines, checkpoint.generations)
        if any(type(number) is not int or number < 0 for number in numbers) or type(checkpoint.asked) is not bool:
            raise TypeError("counts are no numbers")
        if not isinstance(driver, dict) or not isinstance(archive, dict) or not isinstance(checkpoint.identity, dict):
            raise TypeError("states are no dictionaries")
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError, MemoryError, struct.error) as error:
        raise RunError(f"checkpoint {path} is damaged ({type(error).__name__}: {error})") from None
    return checkpoint


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[0-9]*.ckpt") if path.is_file() and not path.is_symlink())


# ---- JSON and arrays ------------------------------------------------------------------------------------------------


def _packed(data: Mapping[str, Any]) -> bytes:
    """Return the length of a JSON text, the text, and the numbers of the arrays that it speaks of."""
    arrays: list[bytes] = []
    place = 0

    def described(value: Any) -> dict[str, Any]:
        nonlocal place
        if not isinstance(value, np.ndarray):
            raise TypeError(f"{type(value).__name__} has no place in a checkpoint")
        plain = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<"))
        arrays.append(plain.tobytes())
        place += len(arrays[-1])
        return {"type": plain.dtype.str, "shape": list(value.shape), "at": place - len(arrays[-1])}

    text = json.dumps(data, default=described).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(arrays)


def _unpacked(content: bytes) -> dict[str, Any]:
    (length,) = struct.unpack_from("<Q", content)
    begin = 8 + length
    view = memoryview(content)

    def array(described: dict[str, Any]) -> Any:
        if described.keys() != {"type", "shape", "at"}:
            return Tree(described) if "is" in described else described
        if not _TYPE.fullmatch(described["type"]):
            raise ValueError(f"{described['type']!r} is no type of numbers")
        count = 1
        for size in described["shape"]:
            if type(size) is not int or not 0 <= size <= len(content):
                raise ValueError(f"{size!r} is no size")
            count *= size
        numbers = np.frombuffer(view[begin:], dtype=described["type"], count=count, offset=described["at"])
        return numbers.reshape(described["shape"]).copy()

    data = json.loads(content[8:begin].decode(), object_hook=array)
    if not isinstance(data, dict):
        raise TypeError("an object is expected")
    return data
