"""Manager: from a text or a description to a manager."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NoReturn

from evomem.errors import ConfigError
from evomem.managers.base import MemoryManager, managers
from evomem.modes import outside_inference_mode

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<text>"[^"]*"|'[^']*')
      | (?P<mark>[()\[\],=])
      | (?P<word>[^\s()\[\],="']+)
    )""",
    re.VERBOSE,
)
_CONSTANTS = {"true": True, "false": False, "none": None, "null": None}


def build(spec: str | Mapping[str, Any], **options: Any) -> MemoryManager:
    """Build a manager from what a user wrote, or from `MemoryManager.describe`.

    >>> build("snapkv(window=64)", budget=128).describe() == build("snapkv", window=64, budget=128).describe()
    True

    Parameters
    ----------
    spec :
        ``"snapkv"``, ``"snapkv(window=64)"``, ``"adakv(keydiff, safeguard=0.3)"``, or
        ``{"name": ..., "options": {...}}``. In a text, values are numbers, true, false, none, words, quoted texts,
        lists ``[a, b]`` and managers; a value without a name is the inner manager.
    **options :
        Override those of the spec.

    Raises
    ------
    ConfigError : the text cannot be read, or an option is wrong; `UnknownNameError` for a manager that does not exist.
    """
    described = parse(spec) if isinstance(spec, str) else _checked(spec)
    with outside_inference_mode():  # its parameters may be trained later
        manager: MemoryManager = managers.get(described["name"])(**{**described["options"], **options})
    return manager


def parse(text: str) -> dict[str, Any]:
    """Read a manager written as text into ``{"name": ..., "options": {...}}``; see `build`."""
    return _Parser(text).whole()


def names() -> list[str]:
    """Return the names of all managers, sorted."""
    return managers.names()


def summary(name: str) -> str:
    """Return the first line of a manager's docstring: what ``evomem list managers`` shows."""
    lines = (managers.get(name).__doc__ or "").strip().splitlines()
    return lines[0] if lines else ""


def _checked(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return a description with both its keys, or say what is wrong with it."""
    if not isinstance(spec, Mapping):
        raise ConfigError(f"manager: {spec!r} is neither a text like 'snapkv(window=64)' nor a mapping with a name")
    unknown = set(spec) - {"name", "options"}
    options = spec.get("options") or {}
    if unknown or not isinstance(spec.get("name"), str) or not isinstance(options, Mapping):
        raise ConfigError(
            f'manager: {dict(spec)!r} is not of the form {{"name": "snapkv", "options": {{"window": 64}}}}'
        )
    return {"name": spec["name"], "options": dict(options)}


class _Parser:
    """Recursive descent over ``spec = word ["(" [[word "="] value {"," ...}] ")"]``."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str, int]] = []
        self.at = 0
        end = 0
        stripped = text.rstrip()
        while end < len(stripped):
            match = _TOKEN.match(stripped, end)
            if match is None:
                self.fail("a quotation mark has no partner", end)
            kind = str(match.lastgroup)
            self.tokens.append((kind, match.group(kind), match.start(kind)))
            end = match.end()
        self.tokens += [("end", "", len(stripped))] * 2  # two, because `arguments` looks one ahead

    def fail(self, problem: str, position: int | None = None) -> NoReturn:
        position = self.tokens[self.at][2] if position is None else position
        raise ConfigError(
            f"manager {self.text!r}, character {position + 1}: {problem}; write e.g. 'snapkv', 'snapkv(window=64)' or "
            "'adakv(keydiff, safeguard=0.3)'"
        )

    def next_is(self, mark: str) -> bool:
        return self.tokens[self.at][:2] == ("mark", mark)

    def accept(self, mark: str) -> bool:
        found = self.next_is(mark)
        self.at += found
        return found

    def expect(self, mark: str) -> None:
        if not self.accept(mark):
            self.fail(f"expected {mark!r}")

    def word(self, what: str) -> str:
        kind, word, _ = self.tokens[self.at]
        if kind != "word":
            self.fail(f"expected {what}")
        self.at += 1
        return word

    def whole(self) -> dict[str, Any]:
        name = self.word("the name of a manager")
        options = self.arguments() if self.next_is("(") else {}
        if self.tokens[self.at][0] != "end":
            self.fail("something follows the manager")
        return {"name": name, "options": options}

    def arguments(self) -> dict[str, Any]:
        self.expect("(")
        options: dict[str, Any] = {}
        while not self.accept(")"):
            if options:
                self.expect(",")
            position = self.tokens[self.at][2]
            if self.tokens[self.at + 1][:2] == ("mark", "="):
                key = self.word("the name of an option")
                self.expect("=")
            else:
                key = "inner"
            value = self.value()
            if key in options:
                self.fail(f"option {key!r} is given twice", position)
            options[key] = value
        return options

    def value(self) -> Any:
        kind, text, _ = self.tokens[self.at]
        if kind == "text":
            self.at += 1
            return text[1:-1]
        if self.accept("["):
            values: list[Any] = []
            while not self.accept("]"):
                if values:
                    self.expect(",")
                values.append(self.value())
            return values
        word = self.word("a value")
        if self.next_is("("):
            return {"name": word, "options": self.arguments()}
        return _scalar(word)


def _scalar(word: str) -> Any:
    """Return the number or constant that a word stands for, or the word."""
    if word.lower() in _CONSTANTS:
        return _CONSTANTS[word.lower()]
    for number in (int, float):
        try:
            return number(word)
        except ValueError:
            continue
    return word
