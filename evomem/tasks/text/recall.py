"""Task: multi-query associative recall (MQAR; Arora et al. 2023, "Zoology"), and its form with changing values."""

from __future__ import annotations

from functools import cached_property
from hashlib import blake2b
from random import Random
from typing import Any, ClassVar, Literal

from pydantic import Field

from evomem.bounds import LARGE, LENGTH
from evomem.errors import TaskError
from evomem.tasks.amounts import amounts, chance
from evomem.tasks.base import Sample, Split, Tokenizer, tasks
from evomem.tasks.generated import GeneratedTask, TaskOptions
from evomem.tasks.text.words import words

GRID = {64: 4, 128: 8, 256: 16, 512: 64}
"""Pairs for each length in tokens, as in Zoology."""

_ANCHOR = " the"
"""A word before the one that is looked at: some tokenizers treat the beginning of a text in a way of its own."""


class RecallOptions(TaskOptions):
    """Options of MQAR."""

    length: int = Field(
        default=256, ge=8, le=LENGTH, description="tokens of context, question and answer together, at most"
    )
    pairs: int | None = Field(
        default=None, ge=1, le=LENGTH, description="key-value pairs; none: Zoology's number for the length"
    )
    fewest_pairs: int | None = Field(
        default=None,
        ge=1,
        le=LENGTH,
        description="samples of equal length with fewest_pairs, twice as many, ..., or pairs; none: all have pairs",
    )
    separator: Literal["comma", "none"] = Field(
        default="comma",
        description="what stands behind each pair: a comma, or nothing, as in Zoology, where models are trained for it",
    )
    filler: Literal["dots", "words"] = Field(
        default="dots", description="what fills the gaps between the queries: dots, or random adjectives, as in Zoology"
    )
    power: float = Field(
        default=0.01, gt=0, le=LARGE, description="a in p(gap) ~ gap^(a-1): how far behind the pairs queries are"
    )


class ForgettingOptions(RecallOptions):
    """Options of the form with changing values."""

    restated: float = Field(default=0.5, gt=0, le=1, description="share of the keys that get a second value")


class _Recall(GeneratedTask[Any]):
    """Pairs ``k v, k v, ...``, then queries ``k v`` among fillers; the last query's value is asked for.

    All are words of one token: keys and values from disjoint halves of the nouns, filler words from the adjectives,
    each divided over the splits. Commas and dots are for frozen language models: SmolLM2-135M recalls one of 16 pairs
    with -0.7 nats with both, -5.3 with filler words, and -9.7 without commas too, as models trained for MQAR read it.
    """

    divides = "words: keys, values and fillers"
    added: ClassVar[frozenset[str]] = frozenset({"fewest_pairs"})
    packages: ClassVar[tuple[str, ...]] = ("wonderwords",)
    options: RecallOptions

    def __init__(self, tokenizer: Tokenizer, length: int | None = None, **options: Any) -> None:
        super().__init__(tokenizer, length, **options)
        self._words: dict[Split, tuple[list[str], list[str], list[str]]] = {}
        self._comma = "," if self.options.separator == "comma" else ""
        self._width = width = 2 + len(self._comma)  # tokens of a pair
        stated = self.pairs + self._restated_keys
        prefix = len(self.counts.encoder.prefix)
        slots = (self.options.length - prefix) // width - stated
        if slots < self.pairs:
            raise TaskError(
                f"task {self.name}: length {self.options.length} is too short for {self.pairs} pairs and as many "
                f"queries; ask for a length of at least {prefix + width * (stated + self.pairs)} or fewer pairs"
            )
        self.slots = slots
        self.amounts = amounts(self.name, "fewest_pairs", self.options.fewest_pairs, self.pairs)
        self.uniform_chance = chance(self.amounts)

    @cached_property
    def pairs(self) -> int:
        """Number of keys, at most where it differs between samples."""
        if self.options.pairs is not None:
            return self.options.pairs
        fitting = [pairs for length, pairs in GRID.items() if length <= self.options.length]
        return fitting[-1] if fitting else max(1, self.options.length // 16)

    @property
    def _restated_keys(self) -> int:
        """Number of keys that get a second value, at most where it differs between samples."""
        return self._restated_of(self.pairs)

    def _restated_of(self, pairs: int) -> int:
        """Return how many of the keys of a sample get a second value."""
        return 0

    def sample(self, random: Random, split: Split, number: int, identity: str) -> Sample:
        """Return one sample."""
        all_keys, all_values, fillers = self._vocabulary(split)
        ranged = self.options.fewest_pairs is not None
        pairs = random.choice(self.amounts) if ranged else self.pairs
        keys = random.sample(all_keys, pairs)
        drawn = random.sample(all_values, pairs + self._restated_of(pairs))
        newest = dict(zip(keys, drawn, strict=False))
        order = random.sample(keys, pairs)  # of the queries; the last one is the question
        restated = self._restate(random, number, order)
        statements = self._statements(random, newest, restated, drawn[pairs:])
        newest.update(zip(restated, drawn[pairs:], strict=True))

        def blank() -> tuple[str, str]:
            return (".", ".") if self.options.filler == "dots" else (random.choice(fillers), random.choice(fillers))

        queried = dict(zip(self._gaps(random, pairs), order, strict=True))
        if ranged:  # as long as the longest sample with the most pairs: blanks stand anywhere among the pairs
            longest = self.pairs + self._restated_keys + self.slots
            for _ in range(longest - len(statements) - max(queried)):
                statements.insert(random.randint(0, len(statements)), blank())
        for gap in range(1, max(queried)):
            key = queried.get(gap)
            statements.append(blank() if key is None else (key, newest[key]))
        answer = " " + newest[order[-1]]
        context = "".join(self._spelled(key, value) for key, value in statements)
        if ranged:
            self._require_length(context, len(statements))
        return Sample(
            id=identity,
            context=context,
            question=f" {order[-1]}",
            answer=answer,
            references=(newest[order[-1]],),
            max_new_tokens=1,
            meta={"pairs": pairs, "gap": max(queried), "restated": order[-1] in restated},
        )

    def score(self, sample: Sample, output: str) -> float:
        """Return 1 if the first token of the output is the value's token, else 0."""
        expected = self._tokens(sample.references[0])
        return float(self._tokens(output.lstrip())[: len(expected)] == expected)

    def _restate(self, random: Random, number: int, order: list[str]) -> list[str]:
        """Keys that get a second value."""
        return []

    def _statements(
        self, random: Random, first: dict[str, str], restated: list[str], second: list[str]
    ) -> list[tuple[str, str]]:
        """Pairs in the order in which they are stated: every second value somewhere behind its first."""
        statements = list(first.items())
        for key, value in zip(restated, second, strict=True):
            stated = next(i for i, (other, _) in enumerate(statements) if other == key)
            statements.insert(random.randint(stated + 1, len(statements)), (key, value))
        return statements

    def _spelled(self, key: str, value: str) -> str:
        """Return a pair as it stands in the context, or a blank."""
        if key == "." and self.options.fewest_pairs is not None:
            return self._even_blank
        return f" {key} {value}{self._comma}"

    @cached_property
    def _even_blank(self) -> str:
        """A blank of as many tokens as a pair: some tokenizers make one token of a dot and a comma.

        The comma stays, apart if it must: with dots alone SmolLM2-135M recalls one of two pairs with -8.2 nats, with
        commas with -0.6.
        """
        blanks = [" . ." + self._comma, f" . . {self._comma}"]
        lengths = [len(self._tokens(f"{blank[1:]}{_ANCHOR}")) - len(self._tokens(_ANCHOR[1:])) for blank in blanks]
        return next((b for b, n in zip(blanks, lengths, strict=True) if n == self._width), blanks[0])

    def _require_length(self, context: str, statements: int) -> None:
        """Raise `TaskError` if a context has more or fewer tokens than every other with as many statements."""
        expected = len(self.counts.encoder.prefix) + self._width * statements
        length = self.counts.from_start(context)
        if length != expected:
            raise TaskError(
                f"task {self.name}: fewest_pairs needs samples of equal length, and this tokenizer makes {length} "
                f"tokens of a context in place of {expected}; try filler=words, or leave fewest_pairs out"
            )

    def _gaps(self, random: Random, pairs: int) -> list[int]:
        """Distinct gaps 1..slots in ascending order, p(g) ~ g^(a-1), without replacement."""
        # Efraimidis & Spirakis 2006: the largest u^(1/w) are a weighted sample without replacement.
        weights = ((gap, gap ** (self.options.power - 1)) for gap in range(1, self.slots + 1))
        marks = {gap: random.random() ** (1 / weight) for gap, weight in weights}
        return sorted(sorted(marks, key=lambda gap: -marks[gap])[:pairs])

    def _tokens(self, word: str) -> list[int]:
        """Token ids of a word in the middle of a text."""
        before = self.tokenizer.encode(_ANCHOR, add_special_tokens=False)
        return self.tokenizer.encode(f"{_ANCHOR} {word}", add_special_tokens=False)[len(before) :]

    def _vocabulary(self, split: Split) -> tuple[list[str], list[str], list[str]]:
        """Keys, values and fillers of a split, each one token long for this tokenizer."""
        if split not in self._words:
            nouns = [word for word in words("noun", split) if len(self._tokens(word)) == 1]
            half = [blake2b(word.encode(), person=b"recall", digest_size=1).digest()[0] % 2 for word in nouns]
            keys = [word for word, key in zip(nouns, half, strict=True) if key]
            values = [word for word, key in zip(nouns, half, strict=True) if not key]
            known = set(words("noun"))
            fillers = [word for word in words("adjective", split) if word not in known and len(self._tokens(word)) == 1]
            self._words[split] = keys, values, fillers
        keys, values, fillers = self._words[split]
        if len(keys) < self.pairs or len(values) < self.pairs + self._restated_keys or not fillers:
            raise TaskError(
                f"task {self.name}: this tokenizer has {len(keys)} keys, {len(values)} values and {len(fillers)} "
                f"fillers of a single token in the {split} split, too few for {self.pairs} pairs; ask for fewer pairs"
            )
        return keys, values, fillers


@tasks.register("mqar")
class Mqar(_Recall):
    """Which value belongs to the key?"""

    name: ClassVar[str] = "mqar"
    Options = RecallOptions


@tasks.register("forgetting_mqar")
class ForgettingMqar(_Recall):
    """MQAR in which some keys are stated again with a new value; the newest counts.

    The asked key is one of them in every sample with an even number, and by the share ``restated`` in the others.
    """

    name: ClassVar[str] = "forgetting_mqar"
    Options = ForgettingOptions
    options: ForgettingOptions

    def _restated_of(self, pairs: int) -> int:
        return max(1, round(self.options.restated * pairs))

    def _restate(self, random: Random, number: int, order: list[str]) -> list[str]:
        if number % 2 == 0:
            return [order[-1], *random.sample(order[:-1], self._restated_of(len(order)) - 1)]
        return random.sample(order, self._restated_of(len(order)))
