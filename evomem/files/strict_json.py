"""Files: numbers as one line of strict JSON, and back; and strict JSON that somebody else wrote."""

from __future__ import annotations

import json
from typing import Any, NoReturn

DEPTH = 32
"""Levels that JSON of others may be nested."""
DIGITS = 308
"""Digits that an integer of others may have: with more it may be too large for a float."""


def to_json(value: Any) -> str:
    """Return one line of strict JSON: numbers that are not finite become the strings NaN, Infinity, -Infinity."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        if value != value:
            return "NaN"
        return value if abs(value) != float("inf") else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value


def as_float(value: Any) -> float:
    """Return the number that `to_json` wrote; None is NaN."""
    return float("nan") if value is None else float(value)


# ---- of others -----------------------------------------------------------------------------------------------------


class NotStrictError(ValueError):
    """A text that is no strict JSON; the message says what is wrong, without control characters."""


def shown(text: object, length: int = 80) -> str:
    """Return something that a file says as it may stand in a message: short, and without control characters."""
    plain = text if isinstance(text, str) and text.isprintable() else repr(text)
    return plain if len(plain) <= length else plain[: length - 3] + "..."


def parse_strict(text: str) -> Any:
    """Return what a JSON text says: no key twice, numbers finite, at most `DEPTH` levels deep, no half characters.

    Raises
    ------
    NotStrictError : it is not like that, or no JSON at all.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_no_key_twice,
            parse_constant=_no_number,
            parse_float=_finite_number,
            parse_int=_short_integer,
        )
    except NotStrictError:
        raise
    except RecursionError:
        raise NotStrictError(f"is nested more than {DEPTH} levels deep") from None
    except ValueError as error:
        raise NotStrictError(f"not JSON: {shown(str(error), 200)}") from None
    level, depth = [value], 0
    while level:  # not by recursion, which is what a deep text is made against
        below: list[Any] = []
        for one in level:
            if isinstance(one, str):
                _check_text(one)
            elif isinstance(one, dict | list):
                if depth >= DEPTH:
                    raise NotStrictError(f"is nested more than {DEPTH} levels deep")
                below += one.values() if isinstance(one, dict) else one
        level, depth = below, depth + 1
    return value


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for name, value in pairs:
        if name in mapping:
            raise NotStrictError(f"{shown(name)}: is given twice")
        _check_text(name)
        mapping[name] = value
    return mapping


def _check_text(text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise NotStrictError(f"{shown(text)}: holds half a character, which no text has") from None


def _no_number(text: str) -> NoReturn:
    raise NotStrictError(f"holds {text}, which is no JSON number")


def _finite_number(text: str) -> float:
    value = float(text)
    return value if abs(value) != float("inf") else _no_number(shown(text))


def _short_integer(text: str) -> int:
    if len(text) > DIGITS:
        raise NotStrictError(f"holds an integer of {len(text):,} digits ({shown(text, 20)}); at most {DIGITS}")
    return int(text)
