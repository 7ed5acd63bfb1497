"""Arguments of the experiments' command lines: lists that commas separate."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence


def numbers(least: int) -> Callable[[str], list[int]]:
    """Return what reads different whole numbers of at least ``least`` that commas separate."""

    def read(text: str) -> list[int]:
        parts = text.split(",")
        values = [int(part) for part in parts if part.isdecimal()]
        if len(values) < len(parts) or min(values) < least or len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(
                f"{text!r}: give whole numbers of at least {least}, commas between them, none twice"
            )
        return values

    return read


def some_of(names: Sequence[str]) -> Callable[[str], list[str]]:
    """Return what reads some of ``names`` that commas separate."""

    def read(text: str) -> list[str]:
        parts = text.split(",")
        if set(parts) - set(names) or len(set(parts)) < len(parts):
            raise argparse.ArgumentTypeError(
                f"{text!r}: give some of {', '.join(names)}, commas between them, none twice"
            )
        return parts

    return read
