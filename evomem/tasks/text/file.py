"""Task: a user's own questions, read from a JSONL file."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from pydantic import Field

from evomem.bounds import LENGTH
from evomem.errors import TaskError
from evomem.files.reading import user_path
from evomem.files.strict_json import shown
from evomem.tasks.base import Sample, Split, Tokenizer, tasks
from evomem.tasks.chat import ChatTemplate
from evomem.tasks.encoding import TextEncoder
from evomem.tasks.generated import TaskOptions, validate_options
from evomem.tasks.metrics import exact_match, rouge_l, substring_share, token_f1
from evomem.tasks.text.cutting import cut_middle
from evomem.tasks.text.file_rows import Entry, Text, divide, read_entries

METRICS: dict[str, Callable[[Sequence[str], str], float]] = {
    "substring": substring_share,
    "exact": exact_match,
    "f1": token_f1,
    "rouge_l": rouge_l,
}


class FileOptions(TaskOptions):
    """Options of a file task."""

    path: Text = Field(description="JSONL file, one question a line")
    length: int | None = Field(
        default=None,
        ge=1,
        le=LENGTH,
        description="tokens of a sample, at most: longer contexts are cut in the middle; none: whole",
    )
    chat_template: bool = Field(
        default=False, description="ask in the words of the model's chat template: one turn of the user, one answer"
    )


@tasks.register("file")
class File:
    """Questions of a JSONL file with the fields ``context``, ``question``, ``answers``, ``metric`` and ``id``.

    ``answers[0]`` is the answer whose likelihood is scored; all of them are references. Metrics: ``substring`` (share
    of the answers that are found), ``exact`` (normalised equality), ``f1`` (SQuAD's token F1) and ``rouge_l`` (both
    the best over the answers), ``loglik`` (none). A row may name its ``split`` and its ``max_new_tokens``; without
    ``split``, rows are divided 60/20/20 by the hash of their ``id`` (the line number where there is none). Files of few
    rows: `evomem.tasks.text.file_rows.divide`.

    Attributes
    ----------
    note : how the rows were divided, if that was not as usual; else "".

    Raises
    ------
    TaskError : the file cannot be read, or a line is damaged; the message names file, line and field.
    ConfigError : ``chat_template`` for a model that has none.
    """

    name = "file"
    Options = FileOptions
    main_option = "path"
    uniform_chance: float = 0.0

    def __init__(self, tokenizer: Tokenizer, length: int | None = None, **options: Any) -> None:
        if length is not None:
            options["length"] = length
        self.options = validate_options(self.name, FileOptions, options)
        self.tokenizer = tokenizer
        self.encoder = TextEncoder(tokenizer)
        self.chat = ChatTemplate(tokenizer, self.name) if self.options.chat_template else None
        entries = read_entries(user_path(self.options.path))
        division = divide(entries)
        self._entries, self.note = division.entries, division.note
        self.has_exact: bool = any(entry.row.metric != "loglik" for entry in entries)

    def available(self, split: Split) -> int:
        """Return the number of rows of a split."""
        return len(self._entries[Split(split)])

    def samples(self, split: Split, n: int, seed: int) -> list[Sample]:
        """Return ``n`` samples of a split, in an order that the seed shuffles.

        Raises
        ------
        TaskError : the split has fewer rows than that, or a row's question and answer leave no room for a context.
        """
        split = Split(split)
        entries = list(self._entries[split])
        if len(entries) < n:
            problem = "is empty" if not entries else f"has only {len(entries)} rows"
            raise TaskError(
                f"task file: the {split} split of {self.options.path} {problem}, {n} were asked for; "
                'add rows, or divide them by a field "split"'
            )
        # The line order of the file is not ours to trust: questions about one text often stand together.
        Random(f"file {split} {seed}").shuffle(entries)
        return [self._sample(entry, split) for entry in entries[:n]]

    def score(self, sample: Sample, output: str) -> float:
        """Return the row's metric of a generated text.

        Raises
        ------
        TaskError : the row's metric is ``loglik``.
        """
        metric = METRICS.get(sample.meta["metric"])
        if metric is None:
            raise TaskError(f"task file: row {sample.id} measures likelihood only; it has no exact metric")
        return metric(sample.references, output)

    def describe(self) -> dict[str, Any]:
        """Return the options that rebuild this task, JSON-serialisable, wherever that is: the path is absolute.

        ``chat_template`` is among them only where it is on.
        """
        options = self.options.model_dump(mode="json", exclude=None if self.chat else {"chat_template"})
        return {**options, "path": os.path.abspath(user_path(self.options.path))}

    def _sample(self, entry: Entry, split: Split) -> Sample:
        row = entry.row
        question = row.question if row.question[0].isspace() or row.context[-1].isspace() else f"\n{row.question}"
        answer = row.answers[0]
        if not answer[0].isspace() and not question[-1].isspace():
            answer = f" {answer}"
        tokens = len(self.encoder.following(answer))
        where = f"{self.options.path}:{entry.line}"
        if not tokens:
            raise TaskError(
                f"{where}: field answers.0: {shown(row.answers[0])!r} has no token for this model's tokenizer; "
                "give another answer"
            )

        def with_context(context: str) -> Sample:
            plain = Sample(
                id=f"{self.name}/{split}/{entry.identity}",
                context=context,
                question=question,
                answer=answer,
                references=tuple(row.answers),
                max_new_tokens=0 if row.metric == "loglik" else row.max_new_tokens or tokens + 8,
                meta={"metric": row.metric},
            )
            return plain if self.chat is None else self.chat.as_turn(plain)

        whole = with_context(row.context)
        length = self.options.length
        if length is not None and self._size(whole) > length:
            max_tokens = length

            def fits(context: str) -> bool:
                return self._size(with_context(context)) <= max_tokens

            context = cut_middle(self.tokenizer, row.context, fits, length)
            if context is None:
                raise TaskError(
                    f"task file: {self.options.path}, row {shown(entry.identity)}: question and answer leave no room "
                    f"for the context in a length of {length} tokens; ask for a greater length"
                )
            whole = with_context(context)
        return whole if self.chat is None else self.chat.with_id_check(whole)

    def _size(self, sample: Sample) -> int:
        if self.chat is not None:
            return self.chat.size(sample)
        # Apart, as they are read: blanks at the end of a context and before a question are a token fewer together.
        following = self.encoder.following
        parts = (self.encoder.context(sample), following(sample.question), following(sample.answer))
        return sum(map(len, parts))
