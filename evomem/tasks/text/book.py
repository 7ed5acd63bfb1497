"""Task: book continuation, the log-likelihood of the text that follows a long context of prose."""

from __future__ import annotations

from random import Random

from pydantic import Field

from evomem.bounds import LENGTH
from evomem.errors import TaskError
from evomem.tasks.base import Sample, Split, tasks
from evomem.tasks.fitting import fit
from evomem.tasks.generated import FittedOptions, GeneratedTask
from evomem.tasks.text.cutting import cut_end
from evomem.tasks.text.prose import load_prose

LONGEST_WORD = 16
"""Tokens that a word may have; what is longer between two blanks is no word, and is cut between its tokens."""


class BookOptions(FittedOptions):
    """Options of the book continuation."""

    continuation: int = Field(
        default=128, ge=8, le=LENGTH, description="tokens of the answer, at most (a few less: whole words)"
    )
    essay: str | None = Field(default=None, description="text file, instead of the built-in text")


@tasks.register("book")
class Book(GeneratedTask[BookOptions]):
    """Prose as context, its next sentence as question, and what follows as answer.

    Likelihood only: there is no exact metric, and nothing to generate.
    """

    name = "book"
    divides = "sentences"
    Options = BookOptions
    has_exact = False

    def sample(self, random: Random, split: Split, number: int, identity: str) -> Sample:
        """Return one sample: the answer starts at a random sentence, the context reaches back from it."""
        sentences = load_prose(split, self.options.essay).sentences
        start = random.randrange(len(sentences))

        def at(i: int) -> str:
            return sentences[(start + i) % len(sentences)]

        question = f" {at(-1)}"
        answer, used = self._continuation(sentences, start)

        def before(n: int) -> str:
            if n + used + 1 >= len(sentences):
                raise TaskError(
                    f"task {self.name}: the prose of the {split} split is shorter than a length of "
                    f"{self.options.length} tokens; ask for less, or give a longer text with essay=PATH"
                )
            return at(-2 - n)

        def context(n: int) -> str:
            return " ".join(before(i) for i in reversed(range(n)))

        n = fit(self.options.length, lambda n: context(n) + question + answer, before, self.counts, self.name)
        if n == 0:
            raise TaskError(
                f"task {self.name}: length {self.options.length} leaves no room for a context before a continuation of "
                f"{self.options.continuation} tokens; ask for a greater length or a shorter continuation"
            )
        return Sample(
            id=identity,
            context=context(n),
            question=question,
            answer=answer,
            references=(),
            max_new_tokens=0,
            meta={"start": start, "units": n},
        )

    def score(self, sample: Sample, output: str) -> float:
        """Raise: a continuation has no exact metric."""
        raise TaskError(f"task {self.name} measures likelihood only; it has no exact metric for {sample.id}")

    def _continuation(self, sentences: tuple[str, ...], start: int) -> tuple[str, int]:
        """Return the answer, as many whole words as fit ``continuation`` tokens, and the sentences it takes."""
        text, used = "", 0
        while self.counts.following(text) <= self.options.continuation and used < len(sentences):
            text += f" {sentences[(start + used) % len(sentences)]}"
            used += 1
        max_tokens = self.options.continuation

        def fits(text: str) -> bool:
            return self.counts.following(text) <= max_tokens

        pieces = text.split(" ")
        low, high = 1, len(pieces) + 1  # pieces[0] is empty: the text begins with a space
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(" ".join(pieces[:middle])) else (low, middle)
        whole = " ".join(pieces[:low])
        if low == 1 or self.counts.following(whole) < max_tokens - LONGEST_WORD:  # text without blanks
            return cut_end(self.tokenizer, text, fits, max_tokens) or "", used
        return whole, used
