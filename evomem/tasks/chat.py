"""Task: a sample as one turn of a chat, by the chat template of the model's tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from hashlib import blake2b
from typing import Any

from evomem.errors import ConfigError, TaskError
from evomem.tasks.base import Sample, Tokenizer
from evomem.tasks.encoding import TextEncoder

TODAY = datetime(2024, 7, 26)
"""The date that templates are told which write today's: samples must be the same tomorrow."""

_NOW = "strftime_now("
_DATED = re.compile(r"strftime_now\(\s*(['\"])([^'\"]*)\1\s*\)")

_MARK, _REPLY = "evomemCONTEXTevomem", "evomemANSWERevomem"


def template_digest(tokenizer: Tokenizer) -> str:
    """Return a short hash of a tokenizer's chat template, for records; "" if it has none."""
    template = getattr(tokenizer, "chat_template", None)
    return blake2b(json.dumps(template, sort_keys=True).encode(), digest_size=8).hexdigest() if template else ""


class ChatTemplate:
    """A tokenizer's chat template around one turn: context and question are the user's, the answer is the model's.

    The user's turn is the context with the question at its end. The text that asks for the model's turn follows (the
    generation prompt), then the beginning of the answer, where a task gives one, and the answer. What the template puts
    before the context, a system prompt for example, is `Sample.head`; everything after the question goes to the
    question. The ids are those of ``tokenizer.apply_chat_template``, unless a token of that straddles the end of the
    context, of the question, or the beginning of the answer, which are encoded apart (``meta["same_ids"]`` tells).

    Parameters
    ----------
    tokenizer : of the model.
    task : name for messages.

    Attributes
    ----------
    digest : short hash of the template.
    head, tail : what it puts before the context and after the question.

    Raises
    ------
    ConfigError : the tokenizer has no chat template, or one that does not write a user's turn as it is.
    """

    def __init__(self, tokenizer: Tokenizer, task: str) -> None:
        self._task = task
        self._apply: Callable[..., Any] | None = getattr(tokenizer, "apply_chat_template", None)
        if self._apply is None or not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                f"task {task}: chat_template: the tokenizer of this model has no chat template; leave the option out, "
                "or take an instruct model"
            )
        self.digest = template_digest(tokenizer)
        self._template = _undated(tokenizer, task)
        self._tokenizer = tokenizer
        self._encoder = TextEncoder(tokenizer)
        text = self._render(_MARK)
        if text.count(_MARK) != 1:
            raise ConfigError(
                f"task {task}: chat_template: this model's template writes the user's text {text.count(_MARK)} times; "
                "leave the option out"
            )
        self.head, self.tail = text.split(_MARK)
        blanks = self._render(f"  {_MARK}  ").removeprefix(self.head).removesuffix(self.tail)
        self._keeps_leading_blanks, self._keeps_trailing_blanks = blanks.startswith("  "), blanks.endswith("  ")
        between = self._render(_MARK, _REPLY).partition(_MARK)[2].partition(_REPLY)[0]
        # What stands between the generation prompt and the first word of an answer: nothing, or a blank.
        self._gap = between.removeprefix(self.tail) if between.startswith(self.tail) else ""

    def as_turn(self, sample: Sample, answer_start: str = "") -> Sample:
        """Return a plain sample as a turn of a chat.

        Parameters
        ----------
        answer_start : words at the end of the question that open the model's turn; the answer goes on after them.

        Raises
        ------
        TaskError : the template changes the text.
        """
        question = sample.question.removesuffix(answer_start) if answer_start else sample.question
        context = sample.context if self._keeps_leading_blanks else sample.context.lstrip()
        question = question if self._keeps_trailing_blanks else question.rstrip()
        if self._render(sample.context + question) != f"{self.head}{context}{question}{self.tail}":
            raise TaskError(
                f"task {self._task}: sample {sample.id}: this model's chat template changes the text of context and "
                "question; leave chat_template out"
            )
        reply_start = self._gap + (answer_start.lstrip() if answer_start else sample.answer.lstrip())
        return replace(
            sample,
            context=context,
            question=question + self.tail + (reply_start if answer_start else ""),
            answer=sample.answer if answer_start else reply_start,
            head=self.head,
        )

    def size(self, sample: Sample) -> int:
        """Return the tokens of a sample of `as_turn`."""
        following = self._encoder.following
        return len(self._encoder.context(sample)) + len(following(sample.question)) + len(following(sample.answer))

    def with_id_check(self, sample: Sample) -> Sample:
        """Return a sample of `as_turn` with ``meta["same_ids"]``: whether its parts have the ids of the whole text."""
        following = self._encoder.following
        parts = self._encoder.context(sample) + following(sample.question) + following(sample.answer)
        whole = f"{sample.head}{sample.context}{sample.question}{sample.answer}"
        same = parts == self._tokenizer.encode(whole, add_special_tokens=False)
        return replace(sample, meta={**sample.meta, "same_ids": same})

    def _render(self, user: str, reply: str | None = None) -> str:
        turns = [{"role": "user", "content": user}]
        if reply is not None:
            turns.append({"role": "assistant", "content": reply})
        if self._apply is None:
            return user
        try:
            text: str = self._apply(
                turns, chat_template=self._template, tokenize=False, add_generation_prompt=reply is None
            )
        except Exception as error:  # templates are programs and raise what they like
            raise ConfigError(
                f"task {self._task}: chat_template: this model's template cannot be applied: "
                f"{str(error).strip() or type(error).__name__}; leave the option out"
            ) from error
        return text


def _undated(tokenizer: Any, task: str) -> str:
    """Return a tokenizer's chat template with the date of `TODAY` where it would write the one of the day."""
    try:
        template = str(tokenizer.get_chat_template())
    except ValueError as error:  # several templates, and none for plain chats
        raise ConfigError(f"task {task}: chat_template: {error}; leave the option out") from None
    undated = _DATED.sub(lambda match: json.dumps(TODAY.strftime(match[2])), template)
    if _NOW in undated:
        raise ConfigError(
            f"task {task}: chat_template: this model's template writes today's date in a way that cannot be held "
            "still, so samples would be others tomorrow; leave the option out"
        )
    return undated
