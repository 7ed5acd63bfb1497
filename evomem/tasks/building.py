"""Task: building one from a short text such as ``"passkey:length=1000,haystack=noise"``."""

from __future__ import annotations

import re
from typing import Any

from evomem.errors import ConfigError
from evomem.tasks.base import Task, Tokenizer, tasks


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """Return the task's name and the options that a spec gives it, values as text.

    A spec is ``NAME``, ``NAME:option=value,option=value`` or, for a task with a main option such as the path of
    ``file``, ``NAME:VALUE`` and ``NAME:VALUE,option=value``.

    Raises
    ------
    UnknownNameError : no task has that name.
    ConfigError : a part is not ``option=value``, or an option is given twice.
    """
    name, _, rest = spec.strip().partition(":")
    cls = tasks.get(name)
    options: dict[str, Any] = {}
    main = getattr(cls, "main_option", None)
    known = set(getattr(getattr(cls, "Options", None), "model_fields", ()))
    parts = rest.split(",") if rest else []
    if main is not None and parts and not _is_setting(parts[0], known):
        # The value may hold commas: it ends where the first known option is set.
        end = next((i for i, part in enumerate(parts) if _is_setting(part, known)), len(parts))
        options[main] = ",".join(parts[:end])
        parts = parts[end:]
    for part in parts:
        option, equals, value = (piece.strip() for piece in part.partition("="))
        if not option or not equals:
            raise ConfigError(f"task {spec!r}: {part!r} is not option=value; write {name}:option=value,option=value")
        if option in options:
            raise ConfigError(f"task {spec!r}: option {option!r} is given twice")
        options[option] = value
    return name, options


def build(spec: str, tokenizer: Tokenizer, length: int | None = None, **options: Any) -> Task:
    """Return the task that a spec describes.

    Parameters
    ----------
    spec
        See `parse`.
    tokenizer
        Counts tokens; a tokenizer of ``transformers`` will do.
    length
        Tokens of context, question and answer together, at most; a length in the spec wins.
    **options
        Further options; those in the spec win.

    Raises
    ------
    UnknownNameError : no task has that name.
    ConfigError : an option is unknown or not allowed.
    TaskError : the task's text or file cannot be used.
    """
    name, given = parse(spec)
    if length is not None:
        given.setdefault("length", length)
    task: Task = tasks.get(name)(tokenizer, **{**options, **given})
    return task


def check_options(spec: str, length: int | None = None, **options: Any) -> None:
    """Check a task's name and options as `build` does, as far as that needs no tokenizer.

    Raises
    ------
    UnknownNameError : no task has that name.
    ConfigError : an option is unknown or not allowed.
    """
    from evomem.tasks.generated import TaskOptions, validate_options

    name, given = parse(spec)
    model = getattr(tasks.get(name), "Options", None)
    if length is not None:
        given.setdefault("length", length)
    if isinstance(model, type) and issubclass(model, TaskOptions):
        validate_options(name, model, {**options, **given})


def _is_setting(part: str, known: set[str]) -> bool:
    match = re.match(r"\s*(\w+)\s*=", part)
    return match is not None and match.group(1) in known
