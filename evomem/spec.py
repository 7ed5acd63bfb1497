"""Base: one line that names a thing with its options: ``snapkv(window=64)``, ``passkey:length=1000``.

Managers, allocations and tasks are written in this language, on the command line, in YAML and in programs:

========================  ===========================================================================================
``name``                  all options at their defaults
``name(a=1, b=[x, y])``   values are numbers, true, false, none, words, texts in quotation marks, lists, and calls
``outer(inner(a=1))``     a call is a value; one without a name is the option that ``positional`` names
``name:a=1,b=words``      for tasks: no brackets, no quotation marks; every value is the text up to the next comma
========================  ===========================================================================================

A word is what holds no space and none of ``()[],="'``, so ``window_attention:32`` needs no quotation marks. Inside
quotation marks every character stands for itself; the mark itself is written twice.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from evomem.errors import ConfigError
from evomem.files.strict_json import shown

LENGTH = 10_000
"""Characters of a spec, at most."""
DEPTH = 16
"""Calls and lists inside each other, at most."""

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<text>"(?:[^"]|"")*"|'(?:[^']|'')*')
      | (?P<mark>[()\[\],=])
      | (?P<word>[^\s()\[\],="']+)
    )""",
    re.VERBOSE,
)
_CONSTANTS = {"true": True, "false": False, "none": None, "null": None}


@dataclass(frozen=True)
class Spec:
    """A name and its options.

    Attributes
    ----------
    options : by name; a call among the values is ``{"name": ..., "options": {...}}``.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)


def parse_call(text: str, kind: str, example: str, positional: str | None = "inner") -> Spec:
    """Read ``name`` or ``name(option=value, ...)``.

    Parameters
    ----------
    kind : what is named, for messages: "manager".
    example : specs of that kind as they are written, for messages.
    positional : the option that a value without a name sets; None: every value needs a name.

    Raises
    ------
    ConfigError : the text is not of that form, or longer or deeper than allowed; says at which character, and why.
    """
    return _Parser(text, kind, example, positional).whole()


def parse_settings(text: str, kind: str, main: str | None = None, known: Collection[str] = ()) -> Spec:
    """Read ``name`` or ``name:option=value,option=value``, values as texts.

    Parameters
    ----------
    main : an option whose value may stand first and alone, commas and all: it ends where the first of the ``known``
        options is set.

    Raises
    ------
    ConfigError : a part is not ``option=value``, an option is given twice, or the text is too long.
    """
    _check_length(text, kind)
    name, _, rest = text.strip().partition(":")
    options: dict[str, Any] = {}
    parts = rest.split(",") if rest else []
    if main is not None and parts and not _sets(parts[0], known):
        end = next((i for i, part in enumerate(parts) if _sets(part, known)), len(parts))
        options[main] = ",".join(parts[:end])
        parts = parts[end:]
    for part in parts:
        option, equals, value = (piece.strip() for piece in part.partition("="))
        if not option or not equals:
            raise ConfigError(
                f"{kind} {shown(text)!r}: {shown(part)!r} is not option=value; write {name}:option=value,option=value"
            )
        if option in options:
            raise ConfigError(f"{kind} {shown(text)!r}: option {shown(option)!r} is given twice")
        options[option] = value
    return Spec(name, options)


def is_call(text: str) -> bool:
    """Whether a spec has brackets, not a colon, after its name."""
    return re.match(r"[^:(]*\(", text) is not None


def name_of(text: str) -> str:
    """Return the name that a spec begins with, in either spelling."""
    return re.split(r"[:(]", text, maxsplit=1)[0].strip()


def format_call(name: str, options: Mapping[str, Any]) -> str:
    """Return the text that `parse_call` reads as this name and these options.

    Raises
    ------
    ConfigError : a name or value cannot be written: a mapping that is no call, an object, a name with a bracket.
    """
    given = ", ".join(f"{_name(key)}={_value(value)}" for key, value in options.items())
    return f"{_name(name)}({given})" if options else _name(name)


def format_settings(name: str, options: Mapping[str, str], main: str | None = None) -> str:
    """Return the text that `parse_settings` reads as this name and these options."""
    first = [options[main]] if main is not None and main in options else []
    given = ",".join(first + [f"{key}={options[key]}" for key in options if key != main])
    return f"{name}:{given}" if options else name


def split(text: str) -> list[str]:
    """Split a text at the commas that are outside of brackets and quotation marks; empty parts are left out."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        else:
            depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _check_length(text: str, kind: str) -> None:
    if len(text) > LENGTH:
        raise ConfigError(f"{kind} {shown(text)!r}: has {len(text):,} characters; at most {LENGTH:,}")


def _sets(part: str, known: Collection[str]) -> bool:
    match = re.match(r"\s*(\w+)\s*=", part)
    return match is not None and match.group(1) in known


def _name(name: object) -> str:
    match = _TOKEN.fullmatch(name) if isinstance(name, str) else None
    if match is None or match.lastgroup != "word" or match.group("word") != name:
        raise ConfigError(
            f"spec: {shown(name)!r} cannot be a name: it is empty or has a space, bracket, quote, comma or ="
        )
    return name if isinstance(name, str) else ""


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        plain = re.fullmatch(r"[\w:./-]+", value) is not None and isinstance(_scalar(value), str)
        return value if plain else '"' + value.replace('"', '""') + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, Mapping) and set(value) == {"name", "options"} and isinstance(value["options"], Mapping):
        text = format_call(value["name"], value["options"])
        return text if value["options"] else f"{text}()"  # without brackets it would be a word
    raise ConfigError(f"spec: {shown(value)} cannot be written as a value; give numbers, words, texts, lists or calls")


class _Parser:
    """Recursive descent over ``spec = word ["(" [[word "="] value {"," ...}] ")"]``."""

    def __init__(self, text: str, kind: str, example: str, positional: str | None) -> None:
        _check_length(text, kind)
        self.text, self.kind, self.example, self.positional = text, kind, example, positional
        self.tokens: list[tuple[str, str, int]] = []
        self.at = self.depth = 0
        end = 0
        stripped = text.rstrip()
        while end < len(stripped):
            match = _TOKEN.match(stripped, end)
            if match is None:
                self.fail("a quotation mark has no partner", end)
            token = str(match.lastgroup)
            self.tokens.append((token, match.group(token), match.start(token)))
            end = match.end()
        self.tokens += [("end", "", len(stripped))] * 2  # two, because `arguments` looks one ahead

    def fail(self, problem: str, position: int | None = None) -> NoReturn:
        position = self.tokens[self.at][2] if position is None else position
        raise ConfigError(
            f"{self.kind} {shown(self.text)!r}, character {position + 1}: {problem}; write e.g. {self.example}"
        )

    def next_is(self, mark: str) -> bool:
        return self.tokens[self.at][:2] == ("mark", mark)

    def accept(self, mark: str) -> bool:
        accepted = self.next_is(mark)
        self.at += accepted
        return accepted

    def open(self, mark: str) -> None:
        self.expect(mark)
        self.depth += 1
        if self.depth > DEPTH:
            self.fail(f"more than {DEPTH} brackets inside each other")

    def close(self, mark: str) -> bool:
        closed = self.accept(mark)
        self.depth -= closed
        return closed

    def expect(self, mark: str) -> None:
        if not self.accept(mark):
            self.fail(f"expected {mark!r}")

    def word(self, what: str) -> str:
        token, word, _ = self.tokens[self.at]
        if token != "word":
            self.fail(f"expected {what}")
        self.at += 1
        return word

    def whole(self) -> Spec:
        article = "an" if self.kind[0] in "aeiou" else "a"
        name = self.word(f"the name of {article} {self.kind}")
        options = self.arguments() if self.next_is("(") else {}
        if self.tokens[self.at][0] != "end":
            self.fail(f"something follows the {self.kind}")
        return Spec(name, options)

    def arguments(self) -> dict[str, Any]:
        self.open("(")
        options: dict[str, Any] = {}
        while not self.close(")"):
            if options:
                self.expect(",")
            position = self.tokens[self.at][2]
            key = self.positional
            if self.tokens[self.at + 1][:2] == ("mark", "="):
                key = self.word("the name of an option")
                self.expect("=")
            value = self.value()
            if key is None:
                self.fail("a value without the name of its option", position)
            if key in options:
                self.fail(f"option {shown(key)!r} is given twice", position)
            options[key] = value
        return options

    def value(self) -> Any:
        token, text, _ = self.tokens[self.at]
        if token == "text":
            self.at += 1
            return text[1:-1].replace(text[0] * 2, text[0])
        if self.next_is("["):
            self.open("[")
            values: list[Any] = []
            while not self.close("]"):
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
