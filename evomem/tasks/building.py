"""Task: building one from a short text such as ``"passkey:length=1000,haystack=noise"``."""

from __future__ import annotations

from typing import Any

from evomem.spec import is_call, name_of, parse_call, parse_settings
from evomem.tasks.base import Task, Tokenizer, tasks
from evomem.tasks.streams.base import StreamTask

EXAMPLES = "'passkey:length=1000,haystack=noise' or 'passkey(length=1000, haystack=noise)'"
"""How tasks are written, for messages."""


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """Return the task's name and the options that a spec gives it.

    A spec is written in either way of `evomem.spec`: ``passkey:length=1000,haystack=noise``, whose values are texts, or
    ``passkey(length=1000, haystack=noise)``. A task with a main option, such as the path of ``file``, takes its value
    without a name: ``file:mine.jsonl,length=500``, ``file("mine.jsonl", length=500)``.

    Raises
    ------
    UnknownNameError : no task has that name.
    ConfigError : the text is of neither form, or an option is given twice.
    """
    cls = tasks.get(name_of(spec))
    main = getattr(cls, "main_option", None)
    if is_call(spec):
        call = parse_call(spec, "task", EXAMPLES, main)
    else:
        known = getattr(getattr(cls, "Options", None), "model_fields", ())
        call = parse_settings(spec, "task", main, known)
    return call.name, call.options


def is_stream(spec: str) -> bool:
    """Whether a spec names a task of streams, which memories read and no language models.

    Raises
    ------
    UnknownNameError : no task has that name.
    """
    return issubclass(tasks.get(name_of(spec)), StreamTask)


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
    name, spec_options = parse(spec)
    if length is not None:
        spec_options.setdefault("length", length)
    task: Task = tasks.get(name)(tokenizer, **{**options, **spec_options})
    return task


def check_options(spec: str, length: int | None = None, **options: Any) -> None:
    """Check a task's name and options as `build` does, as far as that needs no tokenizer.

    Raises
    ------
    UnknownNameError : no task has that name.
    ConfigError : an option is unknown or not allowed.
    """
    from evomem.tasks.generated import TaskOptions, validate_options

    name, spec_options = parse(spec)
    model = getattr(tasks.get(name), "Options", None)
    if length is not None:
        spec_options.setdefault("length", length)
    if isinstance(model, type) and issubclass(model, TaskOptions):
        validate_options(name, model, {**options, **spec_options})
