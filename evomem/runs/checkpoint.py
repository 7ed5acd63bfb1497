"""Run: checkpoints, the search's state after every ask (write-ahead) and every tell.

A checkpoint is a local file of the run that made it: a checksum, then a pickle (the running CMA-ES strategy has no
other exact form). Do not load checkpoints of strangers; winners travel as plug-ins, which hold no code.
"""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomem.errors import RunError
from evomem.runs.files import write_atomically

_MAGIC = b"evomem checkpoint 1\n"
_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """The state of a search.

    Attributes
    ----------
    generation : generations that have been told.
    asked : the next generation has been asked, and is in the driver's state.
    driver : the driver's ``state_dict``.
    archive : the search's memory of good candidates.
    """

    generation: int
    asked: bool
    driver: dict[str, Any]
    archive: dict[str, Any]

    @property
    def name(self) -> str:
        """File name; names sort by time."""
        return f"{self.generation:06d}-{'asked' if self.asked else '0told'}.ckpt"


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint and remove all but the last two."""
    content = pickle.dumps(checkpoint, protocol=pickle.HIGHEST_PROTOCOL)
    write_atomically(folder / checkpoint.name, _MAGIC + hashlib.sha256(content).digest() + content)
    for old in _files(folder)[:-_KEPT]:
        old.unlink(missing_ok=True)


def latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint that is whole, and a message for every one that is not.

    With None the search starts at the beginning, and takes every evaluation from the journal.
    """
    messages: list[str] = []
    for path in reversed(_files(folder)):
        try:
            return _load(path), messages
        except RunError as error:
            messages.append(f"{error}; falling back on the one before and the journal")
            path.unlink(missing_ok=True)
    return None, messages


def _load(path: Path) -> Checkpoint:
    content = path.read_bytes()
    start = len(_MAGIC) + hashlib.sha256().digest_size
    if not content.startswith(_MAGIC):
        raise RunError(f"checkpoint {path} is damaged (no header)")
    if hashlib.sha256(content[start:]).digest() != content[len(_MAGIC) : start]:
        raise RunError(f"checkpoint {path} is damaged (checksum)")
    try:
        checkpoint = pickle.loads(content[start:])
    except Exception as error:  # a pickle of other library versions raises anything
        raise RunError(f"checkpoint {path} cannot be read by these library versions ({error})") from error
    if not isinstance(checkpoint, Checkpoint):
        raise RunError(f"checkpoint {path} holds {type(checkpoint).__name__}")
    return checkpoint


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.ckpt"))
