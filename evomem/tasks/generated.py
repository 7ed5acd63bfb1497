"""Task: the base of tasks that make their samples up, one random generator a sample."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from difflib import get_close_matches
from hashlib import blake2b
from random import Random
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from evomem.bounds import LENGTH
from evomem.errors import ConfigError
from evomem.tasks.base import Sample, Split, Tokenizer
from evomem.tasks.chat import ChatTemplate
from evomem.tasks.fitting import UnitCounts, fit
from evomem.tasks.metrics import substring_share
from evomem.tasks.splits import draw_of_split
from evomem.validation import faults


class TaskOptions(BaseModel):
    """Options that every task has; subclasses add theirs."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FittedOptions(TaskOptions):
    """Options of the tasks whose haystack is fitted to a length."""

    length: int = Field(
        default=500, ge=1, le=LENGTH, description="tokens of context, question and answer together, at most"
    )


class ChatOptions(FittedOptions):
    """Options of the tasks that an instruct model can be asked as a chat."""

    chat_template: bool = Field(
        default=False, description="ask in the words of the model's chat template: one turn of the user, one answer"
    )


Opts = TypeVar("Opts", bound=TaskOptions)


def validate_options(task: str, model: type[Opts], options: dict[str, Any]) -> Opts:
    """Return the validated options of a task.

    Raises
    ------
    ConfigError : an option is unknown or has a value that is not allowed; the message names it and what is allowed.
    """
    known = sorted(model.model_fields)
    for name in options:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"task {task} has no option {name!r}.{hint} It has: {', '.join(known) or 'none'}.")
    try:
        return model(**options)
    except ValidationError as error:
        raise ConfigError(f"task {task}: {'; '.join(faults(error, model, 'options'))}") from None


class GeneratedTask(ABC, Generic[Opts]):
    """Base of the tasks that make their samples up.

    Sample k of a split and seed is the same however many are asked for: its generator is seeded by the hash of (task,
    options that matter, split, seed, k). Length and text source do not count as such: the same needles are hidden in
    haystacks of every size.

    Class attributes
    ----------------
    name : registry name.
    Options : pydantic model of the options; ``task.options`` holds the validated values.
    has_exact : whether `score` means anything.
    immaterial : options that do not count in the hash.
    added : options that earlier versions did not have. At their defaults they are in neither hash nor `describe`, so
        that samples, runs and comparisons of those versions stay what they are.
    packages : that the task needs and the plain install does not have.
    divides : what `sample` itself divides over the splits with the functions of `evomem.tasks.splits`, in words. "",
        as long as a task does not say so: `samples` draws until the context belongs to the split.
    """

    name: ClassVar[str]
    Options: type[Opts]
    added: ClassVar[frozenset[str]] = frozenset()
    packages: ClassVar[tuple[str, ...]] = ()
    divides: ClassVar[str] = ""
    immaterial: ClassVar[frozenset[str]] = frozenset({"length", "essay", "chat_template"})
    has_exact: bool = True
    uniform_chance: float = 0.0

    def __init__(self, tokenizer: Tokenizer, length: int | None = None, **options: Any) -> None:
        if length is not None:
            options["length"] = length
        self.options = validate_options(self.name, self.Options, options)
        self.tokenizer = tokenizer
        self.counts = UnitCounts(tokenizer)
        chat = getattr(self.options, "chat_template", False)
        self.chat = ChatTemplate(tokenizer, self.name) if chat else None

    @abstractmethod
    def sample(self, random: Random, split: Split, number: int, identity: str) -> Sample:
        """Return one sample, drawn with its own generator."""

    def samples(self, split: Split, n: int, seed: int) -> list[Sample]:
        """Return the first ``n`` samples of a split and seed."""
        split = Split(split)
        return [self._of_split(split, seed, k) for k in range(n)]

    def _of_split(self, split: Split, seed: int, number: int) -> Sample:
        random, identity = self._random(split, seed, number), f"{self.name}/{split}/{seed}/{number}"

        def draw() -> Sample:
            return self.sample(random, split, number, identity)

        return draw() if self.divides else draw_of_split(draw, lambda sample: sample.context, split, "contexts")

    def score(self, sample: Sample, output: str) -> float:
        """Return the share of the reference values that occur in the lower-cased output."""
        return substring_share(sample.references, output)

    def describe(self) -> dict[str, Any]:
        """Return the options that rebuild this task, JSON-serialisable; ``chat_template`` only where it is on."""
        options = self.options.model_dump(
            mode="json", exclude=self._unused() | (set() if self.chat else {"chat_template"})
        )
        if options.get("essay"):  # wherever it is rebuilt
            options["essay"] = os.path.abspath(os.path.expanduser(options["essay"]))
        return options

    def _fitted(self, sample: Callable[[int], Sample], unit: Callable[[int], str], answer_start: str = "") -> Sample:
        """Return the longest sample that fits the length, in the words of the chat template if that is asked for.

        Parameters
        ----------
        sample : returns the sample with n units of haystack.
        unit : returns the n-th.
        answer_start : the end of its question that in a chat opens the model's turn.

        Raises
        ------
        TaskError : the sample without any haystack is longer already.
        """
        length = int(getattr(self.options, "length"))  # noqa: B009 (not every task has one)
        chat = self.chat
        if chat is None:

            def text(n: int) -> str:
                plain = sample(n)
                return plain.context + plain.question + plain.answer

            return sample(fit(length, text, unit, self.counts, self.name))

        def as_turn(n: int) -> Sample:
            return chat.as_turn(sample(n), answer_start)

        return chat.with_id_check(as_turn(fit(length, as_turn, unit, self.counts, self.name, chat.size)))

    def _random(self, split: Split, seed: int, number: int) -> Random:
        matter = self.options.model_dump(mode="json", exclude=set(self.immaterial) | self._unused())
        key = json.dumps([self.name, matter, split, seed, number], sort_keys=True)
        return Random(int.from_bytes(blake2b(key.encode(), digest_size=16).digest(), "big"))

    def _unused(self) -> set[str]:
        """Options of `added` that are at their defaults."""
        fields = type(self.options).model_fields
        return {name for name in self.added if getattr(self.options, name) == fields[name].default}

    def _answer_budget(self, answer: str) -> int:
        """Tokens that the model may generate: the answer's and a few for a different wording."""
        return self.counts.following(answer) + 8
