"""Task: RULER's eight needle tasks (Hsieh et al. 2024), and a mix of few and many needles, in other text."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any, ClassVar, Literal, cast

from pydantic import Field

from evomem.tasks.amounts import amounts
from evomem.tasks.base import Sample, Split, Tokenizer, tasks
from evomem.tasks.generated import ChatOptions, GeneratedTask
from evomem.tasks.text.prose import load_prose
from evomem.tasks.text.words import draw_keys

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = 40
"""Depths at which needles may stand in an essay, evenly from its beginning to its end."""


class NeedleOptions(ChatOptions):
    """Options of the needle tasks."""

    essay: str | None = Field(default=None, description="text file for essay haystacks, instead of the built-in text")


@dataclass(frozen=True)
class NeedleKind:
    """What sets RULER's needle tasks apart.

    Attributes
    ----------
    haystack : ``noise`` (one line repeated), ``essay`` (prose), ``needle`` (needles that nobody asks for).
    key, value : ``word`` is adjective-noun, ``number`` has 7 digits, ``uuid`` is a random UUID.
    keys, values, queries : how many keys are hidden, values per key, and keys asked for.
    """

    haystack: Literal["noise", "essay", "needle"]
    key: Literal["word", "uuid"] = "word"
    value: Literal["number", "uuid"] = "number"
    keys: int = 1
    values: int = 1
    queries: int = 1


@dataclass(frozen=True)
class Needle:
    """A value under a key."""

    key: str
    value: str
    kind: Literal["number", "uuid"]

    def __str__(self) -> str:
        return f"One of the special magic {self.kind}s for {self.key} is: {self.value}."


class Haystack:
    """The endless units of a haystack; unit n is the same however often and in whatever order it is asked for."""

    def __init__(self, draw: Callable[[int], str]) -> None:
        self._draw = draw
        self._units: list[str] = []

    def unit(self, n: int) -> str:
        """Return the n-th unit, counted from 0."""
        while len(self._units) <= n:
            self._units.append(self._draw(len(self._units)))
        return self._units[n]

    def first(self, n: int) -> list[str]:
        """Return the first n units."""
        if n:
            self.unit(n - 1)
        return self._units[:n]


class NeedleTask(GeneratedTask[NeedleOptions]):
    """A question about one or more values that are hidden in a haystack.

    ``kind`` holds the definition; the answer lists the values in the order of the keys that are asked for.
    """

    Options = NeedleOptions
    divides = "words of keys, and sentences; digits and UUIDs are drawn at random in every split"
    packages: ClassVar[tuple[str, ...]] = ("wonderwords",)
    kind: ClassVar[NeedleKind]

    def sample(self, random: Random, split: Split, number: int, identity: str) -> Sample:
        """Return one sample; needles, distractors and their depths depend on its own generator only."""
        kind = self._drawn_kind(random)
        used: set[str] = set()
        keys = [draw_key(random, kind.key, split, used) for _ in range(kind.keys)]
        needles = [Needle(key, draw_value(random, kind.value), kind.value) for key in keys for _ in range(kind.values)]
        queried = random.sample(keys, kind.queries)
        answers = [i for key in queried for i, needle in enumerate(needles) if needle.key == key]
        depths = self._depths(random, len(needles))
        haystack = self._haystack(random, split, used)
        separator = " " if kind.haystack == "essay" else "\n"
        preface, question, answer_start = self._wording(queried)
        values = [needles[i].value for i in answers]
        answer = " " + ", ".join(values)

        def context(n: int) -> str:
            units = haystack.first(n)
            # From the back, so that a needle does not move the next one.
            for depth, needle in sorted(zip(depths, needles, strict=True), key=lambda pair: -pair[0]):
                units.insert(min(n, int(depth * (n + 1))), str(needle))
            return f"{preface}\n{separator.join(units)}"

        def sample(n: int) -> Sample:
            return Sample(
                id=identity,
                context=context(n),
                question=question + answer_start,
                answer=answer,
                references=tuple(values),
                max_new_tokens=self._answer_budget(answer),
                meta={
                    "keys": queried,
                    "depths": [round(depths[i], 3) for i in answers],
                    "units": n,
                    **({} if kind is self.kind else {"needles": len(needles)}),
                },
            )

        return self._fitted(sample, haystack.unit, answer_start)

    def _drawn_kind(self, random: Random) -> NeedleKind:
        """Return what a sample is: the same for all, where a task does not draw it."""
        return self.kind

    def _depths(self, random: Random, n: int) -> list[float]:
        """Where the needles stand, 0 (before everything) to 1: distinct steps in an essay, anywhere in lines."""
        if self.kind.haystack == "essay":
            return [step / (DEPTHS - 1) for step in random.sample(range(DEPTHS), n)]
        return [random.random() for _ in range(n)]

    def _haystack(self, random: Random, split: Split, used: set[str]) -> Haystack:
        kind = self.kind
        if kind.haystack == "noise":
            return Haystack(lambda n: NOISE)
        if kind.haystack == "essay":
            return essay_haystack(random, split, self.options.essay)
        return Haystack(
            lambda n: str(Needle(draw_key(random, kind.key, split, used), draw_value(random, kind.value), kind.value))
        )

    def _wording(self, queried: list[str]) -> tuple[str, str, str]:
        """The sentence before the haystack, the question, and the beginning of its answer."""
        query = queried[0] if len(queried) == 1 else f"{', '.join(queried[:-1])}, and {queried[-1]}"
        if self.kind.queries * self.kind.values == 1:
            noun, be, every, hidden = f"{self.kind.value}", "is", "", f"A special magic {self.kind.value} is"
        else:
            noun, be, every, hidden = f"{self.kind.value}s", "are", "all ", f"Some special magic {self.kind.value}s are"
        preface = (
            f"{hidden} hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {noun} afterwards."
        )
        return (
            preface,
            f"\nWhat {be} {every}the special magic {noun} for {query} mentioned in the provided text?",
            f" The special magic {noun} for {query} mentioned in the provided text {be}",
        )


def draw_key(random: Random, kind: Literal["word", "uuid"], split: Split, used: set[str]) -> str:
    """Return a key that is not in ``used``, and add it there."""
    return draw_keys(random, split, 1, used)[0] if kind == "word" else draw_value(random, "uuid")


def draw_value(random: Random, kind: Literal["number", "uuid"]) -> str:
    """Return seven digits, or a random UUID."""
    if kind == "number":
        return str(random.randint(1_000_000, 9_999_999))
    return str(uuid.UUID(int=random.getrandbits(128), version=4))


def essay_haystack(random: Random, split: Split, path: str | None) -> Haystack:
    """Return the prose of a split, read from a random sentence on and round its end."""
    sentences = load_prose(split, path).sentences
    start = random.randrange(len(sentences))
    return Haystack(lambda n: sentences[(start + n) % len(sentences)])


@tasks.register("single_1")
class Single1(NeedleTask):
    """One number in noise."""

    name = "single_1"
    kind = NeedleKind("noise")


@tasks.register("single_2")
class Single2(NeedleTask):
    """One number in prose."""

    name = "single_2"
    kind = NeedleKind("essay")


@tasks.register("single_3")
class Single3(NeedleTask):
    """One UUID in prose."""

    name = "single_3"
    kind = NeedleKind("essay", value="uuid")


@tasks.register("multikey_1")
class MultiKey1(NeedleTask):
    """Four keys with a number each in prose; one is asked for."""

    name = "multikey_1"
    kind = NeedleKind("essay", keys=4)


@tasks.register("multikey_2")
class MultiKey2(NeedleTask):
    """One key among distractors of the same form."""

    name = "multikey_2"
    kind = NeedleKind("needle")


@tasks.register("multikey_3")
class MultiKey3(NeedleTask):
    """One key among distractors of the same form; keys and values are UUIDs."""

    name = "multikey_3"
    kind = NeedleKind("needle", key="uuid", value="uuid")


@tasks.register("multivalue")
class MultiValue(NeedleTask):
    """One key with four values in prose; all four are asked for."""

    name = "multivalue"
    kind = NeedleKind("essay", values=4)


@tasks.register("multiquery")
class MultiQuery(NeedleTask):
    """Four keys with a number each in prose; all four are asked for."""

    name = "multiquery"
    kind = NeedleKind("essay", keys=4, queries=4)


class MultiKeyMixOptions(NeedleOptions):
    """Options of the mix of few and many needles."""

    needles: int = Field(default=8, ge=1, le=DEPTHS, description="keys hidden at most")
    fewest_needles: int = Field(
        default=1, ge=1, le=DEPTHS, description="keys hidden at least; samples have these, twice as many, ..., needles"
    )


@tasks.register("multikey_mix")
class MultiKeyMix(NeedleTask):
    """One to eight keys with a number each in prose of equal length; one is asked for.

    Not of RULER: `multikey_1` with another number of keys in every sample, so that what must be remembered differs and
    what is read does not.
    """

    name = "multikey_mix"
    kind = NeedleKind("essay")
    Options = MultiKeyMixOptions

    def __init__(self, tokenizer: Tokenizer, length: int | None = None, **options: Any) -> None:
        super().__init__(tokenizer, length, **options)
        mine = cast(MultiKeyMixOptions, self.options)
        self.amounts = amounts(self.name, "fewest_needles", mine.fewest_needles, mine.needles)

    def _drawn_kind(self, random: Random) -> NeedleKind:
        return replace(self.kind, keys=random.choice(self.amounts))
