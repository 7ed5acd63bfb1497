"""Files: JSON lines with a number and a checksum each, by which a reader sees whether they are as they were written.

A checksummed line is a JSON object whose last two fields are ``line``, its number in the file counted from 1, and
``check``, the BLAKE2b hash (8 bytes) of all that stands before it. A changed digit is seen by the checksum; a line that
is gone, there twice, or in another place, by the numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from evomem.errors import RunError
from evomem.files.strict_json import to_json

Record = dict[str, Any]

_MARK = b',"check":"'
_END = 16 + len(b'"}\n')
_TAIL = len(_MARK) + _END
_FARTHEST = 1_000_000
"""Numbers that may be missing in one place; what is farther is no line of this file."""
_LONGEST = 256 << 20
"""Bytes of a line, at most."""


def checksummed(record: Record, number: int) -> bytes:
    """Return a record as line ``number`` of a file, with its checksum and newline."""
    body = to_json({**record, "line": number})[:-1].encode()
    return body + _MARK + _hash(body) + b'"}\n'


def _hash(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=8).hexdigest().encode()


@dataclass
class LineChecks:
    """Checks the lines of a file one after the other, and counts what is wrong with them.

    Attributes
    ----------
    number : of the last line that counts.
    checked : lines whose checksum holds.
    unchecked : lines without a checksum, from before there were any.
    damaged : positions in the file of lines that cannot be read, or are not as they were written.
    skipped : numbers that no line has had yet; where they outnumber the damaged lines, lines are missing.
    misplaced : numbers of lines that come twice, or stand where another belongs.
    """

    number: int = 0
    checked: int = 0
    unchecked: int = 0
    damaged: list[int] = field(default_factory=list)
    skipped: set[int] = field(default_factory=set)
    misplaced: list[int] = field(default_factory=list)
    _position: int = 0

    def take(self, line: bytes) -> Record | None:
        """Return the record of the next line, without number and checksum; None if it does not count."""
        self._position += 1
        record = _object(line)
        if record is not None and "check" in record:
            return self._numbered(line, record)
        if record is None or self.checked:  # it had a checksum, like those before it
            self.reject()
            return None
        self.number += 1
        self.unchecked += 1
        return record

    def _numbered(self, line: bytes, record: Record) -> Record | None:
        number = record.pop("line", None)
        del record["check"]
        holds = line[-_TAIL:-_END] == _MARK and _hash(line[:-_TAIL]) == line[-_END:-3]
        if not holds or type(number) is not int or not 1 <= number <= self.number + _FARTHEST:
            self.reject()
            return None
        if number > self.number:
            self.skipped.update(range(self.number + 1, number))
            self.number = number
        else:
            self.misplaced.append(number)
            if number not in self.skipped:
                return None
            self.skipped.discard(number)
        self.checked += 1
        return record

    def reject(self) -> None:
        """Count the line that was taken last as damaged."""
        self.damaged.append(self._position)

    def problems(self) -> list[str]:
        """Return what is wrong with the file, in words; nothing if all is as it was written."""
        problems = []
        if self.damaged:
            problems.append(f"{_lines(self.damaged)} damaged and left out")
        missing = len(self.skipped) - len(self.damaged)
        if missing > 0:
            problems.append(f"{missing} of its lines missing, the first near line {min(self.skipped)}")
        if self.misplaced:
            problems.append(f"{_lines(self.misplaced)} there twice or in another place, and counts once")
        return problems


def _lines(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:3])) + (f" and {len(numbers) - 3} more" if len(numbers) > 3 else "")
    return f"line {shown} is" if len(numbers) == 1 else f"lines {shown} are"


def _object(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def whole_lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Yield the lines of a file that end with a newline; a last one that a kill has torn is left out.

    Raises
    ------
    RunError : a line is longer than any that we write.
    """
    while line := file.readline(_LONGEST):
        if not line.endswith(b"\n"):
            if len(line) == _LONGEST:
                raise RunError(f"{path}: a line has more than {_LONGEST:,} bytes: this is no file of evomem")
            return
        yield line
