"""Task: a user's own questions, read from a JSONL file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from evomem.errors import TaskError
from evomem.tasks.base import Sample, Split, Tokenizer, tasks
from evomem.tasks.fitting import count_tokens
from evomem.tasks.generated import TaskOptions, validate_options
from evomem.tasks.metrics import exact_match, rouge_l, substring_share, token_f1
from evomem.tasks.words import split_of

METRICS: dict[str, Callable[[Sequence[str], str], float]] = {
    "substring": substring_share,
    "exact": exact_match,
    "f1": token_f1,
    "rouge_l": rouge_l,
}

Text = Annotated[str, StringConstraints(min_length=1)]


class FileOptions(TaskOptions):
    """Options of a file task."""

    path: Text = Field(description="JSONL file, one question a line")
    length: int | None = Field(
        default=None,
        ge=1,
        description="tokens of a sample, at most: longer contexts are cut in the middle; none: whole",
    )


class Row(BaseModel):
    """One line of the file; fields of other names are the user's own, unless they look like a misspelling."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    context: Text
    question: Text
    answers: Annotated[list[Text], Field(min_length=1)]
    metric: Literal["substring", "exact", "f1", "rouge_l", "loglik"] = "substring"
    id: Text | int | None = None
    split: Literal["train", "select", "sealed"] | None = None
    max_new_tokens: int | None = Field(default=None, ge=1)


@dataclass(frozen=True)
class _Entry:
    row: Row
    identity: str
    split: Split


@tasks.register("file")
class File:
    """Questions of a JSONL file with the fields ``context``, ``question``, ``answers``, ``metric`` and ``id``.

    ``answers[0]`` is the answer whose likelihood is scored; all of them are references. Metrics: ``substring`` (share
    of the answers that are found), ``exact`` (normalised equality), ``f1`` (SQuAD's token F1) and ``rouge_l`` (both
    the best over the answers), ``loglik`` (none). A row may name its ``split`` and its ``max_new_tokens``; without
    ``split``, rows are divided 60/20/20 by the hash of their ``id`` (the line number where there is none).

    Raises
    ------
    TaskError : the file cannot be read, or a line is damaged; the message names file, line and field.
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
        self._entries = _read(Path(self.options.path).expanduser())
        self.has_exact: bool = any(entry.row.metric != "loglik" for entry in self._entries)

    def samples(self, split: Split, n: int, seed: int) -> list[Sample]:
        """Return ``n`` samples of a split, in an order that the seed shuffles.

        Raises
        ------
        TaskError : the split has fewer rows than that.
        """
        split = Split(split)
        entries = [entry for entry in self._entries if entry.split is split]
        if len(entries) < n:
            problem = "is empty" if not entries else f"has only {len(entries)} rows"
            raise TaskError(
                f"task file: the {split} split of {self.options.path} {problem}, {n} were asked for; "
                'add rows, or divide them by a field "split"'
            )
        # The line order of the file is not ours to trust: questions about one text often stand together.
        Random(f"file {split} {seed}").shuffle(entries)
        return [self._sample(entry) for entry in entries[:n]]

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
        """Return the options that rebuild this task, JSON-serialisable."""
        return self.options.model_dump(mode="json")

    def _sample(self, entry: _Entry) -> Sample:
        row = entry.row
        question = row.question if row.question[0].isspace() or row.context[-1].isspace() else f"\n{row.question}"
        answer = row.answers[0]
        if not answer[0].isspace() and not question[-1].isspace():
            answer = f" {answer}"
        new = 0
        if row.metric != "loglik":
            new = row.max_new_tokens or count_tokens(self.tokenizer, answer) + 8
        return Sample(
            id=f"{self.name}/{entry.split}/{entry.identity}",
            context=self._cut(row.context, question + answer, entry.identity),
            question=question,
            answer=answer,
            references=tuple(row.answers),
            max_new_tokens=new,
            meta={"metric": row.metric},
        )

    def _cut(self, context: str, rest: str, identity: str) -> str:
        """Return a context of which words in the middle are left out until the sample fits the length."""
        length = self.options.length
        if length is None or count_tokens(self.tokenizer, context + rest) <= length:
            return context
        words = context.split(" ")

        def keep(n: int) -> str:
            return " ".join(words[: (n + 1) // 2] + words[len(words) - n // 2 :])

        low, high = 0, len(words)
        while high - low > 1:
            middle = (low + high) // 2
            fits = count_tokens(self.tokenizer, keep(middle) + rest) <= length
            low, high = (middle, high) if fits else (low, middle)
        if low == 0:
            raise TaskError(
                f"task file: {self.options.path}, row {identity}: question and answer leave no room for the context "
                f"in a length of {length} tokens; ask for a greater length"
            )
        return keep(low)


def _read(path: Path) -> list[_Entry]:
    """Return the rows of a file; blank lines are skipped."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"task file: cannot read {path} as UTF-8 text: {error}") from error
    entries: list[_Entry] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _row(line, f"{path}:{number}")
        identity = str(number if row.id is None else row.id)
        if identity in seen:
            raise TaskError(f"{path}:{number}: field id: {identity!r} is the id of line {seen[identity]} already")
        seen[identity] = number
        entries.append(_Entry(row, identity, split_of(identity) if row.split is None else Split(row.split)))
    if not entries:
        raise TaskError(f"task file: {path} has no rows; write one JSON object a line")
    return entries


def _row(line: str, where: str) -> Row:
    try:
        found = json.loads(line)
        row = Row.model_validate(found)
    except json.JSONDecodeError as error:
        raise TaskError(f"{where}: not JSON: {error}") from error
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"]) or "the whole line"
        value = repr(problem.get("input"))
        shown = value if len(value) <= 60 else f"{value[:57]}..."
        raise TaskError(f"{where}: field {field}: {problem['msg']} (got {shown})") from error
    absent = sorted(set(Row.model_fields) - set(found))
    for name in found:
        close = [] if name in Row.model_fields else get_close_matches(name, absent, n=1, cutoff=0.8)
        if close:
            raise TaskError(f"{where}: field {name}: unknown; did you mean {close[0]!r}? Rename the field")
    return row
