"""Task: samples with a context, a question and an answer, in three disjoint splits, and an exact metric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from enum import StrEnum
from hashlib import blake2b
from typing import Any, ClassVar, Protocol, runtime_checkable

from evomem.registry import Registry


class Split(StrEnum):
    """`train` gives fitness, `select` chooses among winners, `sealed` is for the one report."""

    TRAIN = "train"
    SELECT = "select"
    SEALED = "sealed"


@dataclass(frozen=True)
class Sample:
    """One question about one context.

    Attributes
    ----------
    id : unique within the task; names split and number, e.g. ``"multikey_1/train/0/17"``.
    context : what is read before any decision in query-agnostic mode.
    question : what follows the context, up to where the model starts to answer (it includes the answer prefix).
    answer : the text whose log-likelihood is scored, starting right after ``question`` (usually with a space).
    references : the values that the exact metric looks for in the generated text.
    max_new_tokens : how many tokens the model may generate for the exact metric; 0 means likelihood only.
    meta : anything a task wants to keep (number of keys, depth, ...), JSON-serialisable.
    head : what a chat template puts before the context, and in the place of the tokenizer's prefix; None: the sample is
        plain text (`evomem.tasks.chat`).
    """

    id: str
    context: str
    question: str
    answer: str
    references: tuple[str, ...]
    max_new_tokens: int
    meta: dict[str, Any] = field(default_factory=dict)
    head: str | None = None

    @property
    def digest(self) -> str:
        """Short hash of all fields: two samples of one name are the same only if this is."""
        return blake2b(repr(astuple(self)).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


@runtime_checkable
class Tokenizer(Protocol):
    """What a task needs of a tokenizer to fit lengths."""

    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]:
        """Return the token ids of a text."""
        ...


@runtime_checkable
class Task(Protocol):
    """A generator of samples and their exact metric.

    ``samples`` is a pure function of (task options, split, n, seed): the first m of n samples are the m samples, and
    every sample has its own random generator, derived from (task name, split, seed, number).
    """

    name: ClassVar[str]
    uniform_chance: float
    """Exact score that guessing gets (0 where guessing is hopeless)."""
    has_exact: bool
    """Whether `score` means anything; False: the task is measured by the likelihood of its answers only."""

    def samples(self, split: Split, n: int, seed: int) -> list[Sample]:
        """Return ``n`` samples of a split."""
        ...

    def score(self, sample: Sample, output: str) -> float:
        """Return the exact metric of a generated text, in [0, 1]."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return the options that rebuild this task, JSON-serialisable."""
        ...


def at_hand(task: Task, split: Split, count: int) -> int:
    """Return how many of ``count`` samples a split of a task has: all, unless the task tells of fewer (``available``).

    One that tells of none gives ``count``, so that the task itself says what is missing.
    """
    available: Callable[[Split], int] | None = getattr(task, "available", None)
    return count if available is None else min(count, available(split)) or count


tasks: Registry[type] = Registry("task", "evomem.tasks")
"""Registry of tasks; classes take ``(tokenizer, length, **options)``."""
