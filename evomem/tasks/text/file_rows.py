"""Task: the rows of a user's JSONL file, read with suspicion and divided over the splits."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Annotated, Any, Literal
from unicodedata import category

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from evomem.bounds import SEED
from evomem.errors import TaskError
from evomem.files.strict_json import NotStrictError, parse_strict, shown
from evomem.tasks import splits
from evomem.tasks.base import Split
from evomem.validation import faults

FILE_BYTES, LINE_BYTES, ROWS = 256 << 20, 32 << 20, 1_000_000
"""What a file may have at most: it is held in memory as a whole."""


_INVISIBLE = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Letters by their category that nobody sees: fillers of Hangul, and the empty pattern of Braille."""


def _not_blank(text: str) -> str:
    if all(category(letter)[0] in "ZC" or letter in _INVISIBLE for letter in text):
        raise ValueError("is blank; give a text")
    return text


Text = Annotated[str, StringConstraints(min_length=1), AfterValidator(_not_blank)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class Row(BaseModel):
    """One line of the file; fields of other names are the user's own, unless they look like a misspelling."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)

    context: Text
    question: Text
    answers: Annotated[list[Text], Field(min_length=1, max_length=1000)]
    metric: Literal["substring", "exact", "f1", "rouge_l", "loglik"] = "substring"
    id: Name | Annotated[int, Field(ge=-SEED, le=SEED)] | None = None
    split: Literal["train", "select", "sealed"] | None = None
    max_new_tokens: int | None = Field(default=None, ge=1, le=1_000_000)


@dataclass(frozen=True)
class Entry:
    """A row, what it is called, and where it stands."""

    row: Row
    identity: str
    line: int


@dataclass(frozen=True)
class Division:
    """Rows by split.

    Attributes
    ----------
    entries : of each split, in the order of the file.
    note : how they were divided, if that was not as usual; else "".
    """

    entries: dict[Split, list[Entry]]
    note: str


def read_entries(path: Path) -> list[Entry]:
    """Return the rows of a JSONL file; blank lines are skipped.

    Raises
    ------
    TaskError : the file cannot be read, is too large, or a line is damaged; the message names file, line and field.
    """
    entries: list[Entry] = []
    seen: dict[str, int] = {}
    for number, line in _lines(path):
        row = _row(line, f"{path}:{number}")
        identity = str(number if row.id is None else row.id)
        if identity in seen:
            raise TaskError(
                f"{path}:{number}: field id: {shown(identity)!r} is the id of line {seen[identity]} already"
            )
        seen[identity] = number
        entries.append(Entry(row, identity, number))
    if not entries:
        raise TaskError(f"task file: {path} has no rows; write one JSON object a line")
    return entries


def divide(entries: Sequence[Entry]) -> Division:
    """Divide rows over the splits, see `evomem.tasks.splits.divide`."""
    by_split, note = splits.divide(
        entries,
        lambda entry: entry.identity,
        lambda entry: None if entry.row.split is None else Split(entry.row.split),
    )
    return Division(by_split, note)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, with their numbers; they end at line feeds and nothing else."""
    total = 0
    try:
        with _regular(path) as file:
            number = 0
            while raw := file.readline(LINE_BYTES + 1):
                number, total = number + 1, total + len(raw)
                if len(raw) > LINE_BYTES:
                    raise TaskError(f"{path}:{number}: the line has more than {LINE_BYTES:,} bytes; split the row")
                if total > FILE_BYTES or number > ROWS:
                    raise TaskError(
                        f"task file: {path} has more than {FILE_BYTES:,} bytes or {ROWS:,} lines; split the file"
                    )
                text = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw  # a byte order mark
                line = _decoded(text, f"{path}:{number}")
                if line.strip():
                    yield number, line
    except OSError as error:
        raise TaskError(f"task file: cannot read {path} as UTF-8 text: {error.strerror or error}") from None
    except ValueError as error:
        if isinstance(error, TaskError):
            raise
        raise TaskError(f"task file: cannot read {shown(str(path))}: {error}") from None  # a NUL in the path


def _regular(path: Path) -> IO[bytes]:
    """Open a regular file; a pipe would wait for somebody to write into it, a device may never end."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise TaskError(f"task file: {path} is no regular file; give a JSONL file")
    return open(descriptor, "rb")


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TaskError(f"{where}: is not UTF-8 text ({error.reason}, byte {error.start}); save it as UTF-8") from None


def _row(line: str, where: str) -> Row:
    try:
        fields: Any = parse_strict(line)
        row = Row.model_validate(fields)
    except NotStrictError as error:
        raise TaskError(f"{where}: {error}") from None
    except ValidationError as error:
        raise TaskError(f"{where}: field {faults(error, Row, 'the whole line')[0]}") from None
    absent = sorted(set(Row.model_fields) - set(fields))
    for name in fields:
        close = [] if name in Row.model_fields else get_close_matches(name[:100], absent, n=1, cutoff=0.8)
        if close:
            raise TaskError(f"{where}: field {shown(name)}: unknown; did you mean {close[0]!r}? Rename the field")
    return row
