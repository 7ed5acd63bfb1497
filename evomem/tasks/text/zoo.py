"""Task: needles and pairs in made-up prose of few words: what the models of the zoo are trained for.

Any model can read it: it is plain lower-case English of common words. The training data of the zoo
(``experiments/zoo/data.py``) is drawn with the same functions, from the train split. A value follows its key at once: a
word between them is one more thing that a small model must find out before it recalls anything.

A set of facts belongs to one split, by its hash: `draw_facts` draws until it has one of the split that is asked for. So
no context of ``select`` or ``sealed`` states what any context of ``train`` states, whatever the seeds.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any, ClassVar

from pydantic import Field

from evomem.errors import TaskError
from evomem.tasks.amounts import amounts, chance
from evomem.tasks.base import Sample, Split, Tokenizer, tasks
from evomem.tasks.fitting import fit
from evomem.tasks.generated import FittedOptions, GeneratedTask
from evomem.tasks.splits import draw_of_split
from evomem.tasks.text.needles import Haystack
from evomem.tasks.text.zoo_words import DIGITS, FILLERS, KEYS, VALUES

SUCCESSORS = 6
"""Words that may follow a filler word: few enough for a small model to learn them."""
SENTENCE = (4, 9)
"""Fewest and most words of a filler sentence."""
LINE = 4
"""Pairs in one line of ``zoo_recall``."""
PASSKEY = "magic"
"""The word before the pass key, where it is stated and where it is asked for."""
REMINDERS = 4
"""Pairs that its question says again before it asks: SmolLM2-135M recalls nothing without them."""


@dataclass(frozen=True)
class Fact:
    """A key and the words of its value."""

    key: str
    value: str

    @property
    def needle(self) -> str:
        """The sentence that states it in ``zoo_needle``."""
        return f"magic {self.key} {self.value}."

    @property
    def pair(self) -> str:
        """What states it in a line of ``zoo_recall``."""
        return f"{self.key} {self.value}"


def digits(random: Random) -> str:
    """Return the value of a needle: four digits, each a word."""
    return " ".join(random.choices(DIGITS, k=4))


def draw_facts(random: Random, split: Split, n: int, values: Callable[[int], Sequence[str]]) -> list[Fact]:
    """Return ``n`` facts with different keys, a set that belongs to ``split``; ``values(n)`` draws their values.

    Raises
    ------
    TaskError : there are not so many keys.
    """
    if n > len(KEYS):
        raise TaskError(f"{n} facts are too many: the zoo's vocabulary has {len(KEYS)} keys; ask for fewer")

    def draw() -> list[Fact]:
        return [Fact(key, value) for key, value in zip(random.sample(KEYS, n), values(n), strict=True)]

    return draw_of_split(draw, stated, split, "facts")


def stated(facts: Iterable[Fact]) -> str:
    """Return the facts as one text, independent of their order; its hash says which split they belong to."""
    return "; ".join(sorted(fact.pair for fact in facts))


def needle_facts(random: Random, split: Split, n: int) -> list[Fact]:
    """Return ``n`` facts of ``zoo_needle``."""
    return draw_facts(random, split, n, lambda n: [digits(random) for _ in range(n)])


def pair_facts(random: Random, split: Split, n: int) -> list[Fact]:
    """Return ``n`` facts of ``zoo_recall``: no value belongs to two keys."""
    return draw_facts(random, split, n, lambda n: random.sample(VALUES, n))


def passkey(random: Random) -> Fact:
    """Return what ``zoo_passkey`` hides."""
    return Fact(PASSKEY, random.choice(VALUES))


def lines(facts: Sequence[Fact], line: int = LINE) -> list[str]:
    """Return the facts as lines of ``line`` pairs."""
    return [", ".join(fact.pair for fact in facts[i : i + line]) + "." for i in range(0, len(facts), line)]


@cache
def _successors() -> dict[str, list[str]]:
    random = Random("zoo")
    return {word: random.sample(FILLERS, SUCCESSORS) for word in FILLERS}


def sentence(random: Random) -> str:
    """Return a sentence of filler words, from a sparse Markov chain that is the same in every split."""
    chain = _successors()
    words = [random.choice(FILLERS)]
    for _ in range(random.randint(*SENTENCE) - 1):
        words.append(random.choice(chain[words[-1]]))
    return " ".join(words) + "."


def weave(statements: Sequence[str], depths: Sequence[float], filler: Sequence[str]) -> str:
    """Return a text of filler sentences with each statement at its depth, 0 (before everything) to 1 (at the end)."""
    units = list(filler)
    # From the back, so that a statement does not move the place of the next one.
    for depth, statement in sorted(zip(depths, statements, strict=True), reverse=True):
        units.insert(int(depth * (len(filler) + 1)), statement)
    return " ".join(units)


class _ZooTask(GeneratedTask[Any]):
    """Facts in filler; one is asked for. The exact metric is the share of the value's words at their right place."""

    divides = "the set of facts that a context states"

    @abstractmethod
    def facts(self, random: Random, split: Split) -> tuple[list[Fact], list[str]]:
        """Return the facts of a sample, and the statements in which its context states them."""

    @abstractmethod
    def question(self, random: Random, facts: list[Fact]) -> tuple[Fact, str]:
        """Return the fact that is asked for, and the question with the beginning of its answer."""

    def sample(self, random: Random, split: Split, number: int, identity: str) -> Sample:
        """Return one sample; its facts and places depend on its own generator only."""
        facts, statements = self.facts(random, split)
        asked, question = self.question(random, facts)
        depths = [random.random() for _ in statements]
        haystack = Haystack(lambda n: sentence(random))
        answer = f" {asked.value}"

        def context(n: int) -> str:
            return weave(statements, depths, haystack.first(n))

        n = fit(self.options.length, lambda n: context(n) + question + answer, haystack.unit, self.counts, self.name)
        return Sample(
            id=identity,
            context=context(n),
            question=question,
            answer=answer,
            references=(asked.value,),
            max_new_tokens=self.counts.following(answer),
            meta={"key": asked.key, "facts": len(facts), "units": n},
        )

    def score(self, sample: Sample, output: str) -> float:
        """Return the share of the value's words that the output has at the same place."""
        expected, said = sample.references[0].split(), output.lower().replace(".", " ").replace(",", " ").split()
        return sum(a == b for a, b in zip(expected, said, strict=False)) / len(expected)


class ZooNeedleOptions(FittedOptions):
    """Options of the zoo's needles."""

    needles: int = Field(default=6, ge=1, le=len(KEYS), description="needles hidden; the zoo is trained with 2 to 12")


@tasks.register("zoo_needle")
class ZooNeedle(_ZooTask):
    """Needles ``magic fox 4 7 1 3.`` in made-up prose; the digits of one are asked for."""

    name: ClassVar[str] = "zoo_needle"
    Options = ZooNeedleOptions
    options: ZooNeedleOptions
    uniform_chance = 1 / len(DIGITS)

    def facts(self, random: Random, split: Split) -> tuple[list[Fact], list[str]]:
        """Return the needles, each in a sentence of its own."""
        facts = needle_facts(random, split, self.options.needles)
        return facts, [fact.needle for fact in facts]

    def question(self, random: Random, facts: list[Fact]) -> tuple[Fact, str]:
        """Ask for one."""
        asked = random.choice(facts)
        return asked, f" magic {asked.key}"


class ZooRecallOptions(FittedOptions):
    """Options of the zoo's pairs."""

    pairs: int | None = Field(
        default=None, ge=1, le=len(KEYS), description="key-value pairs; none: one for each 16 tokens of length"
    )
    fewest_pairs: int | None = Field(
        default=None,
        ge=1,
        le=len(KEYS),
        description="samples of equal length with fewest_pairs, twice as many, ..., or pairs; none: all have pairs",
    )


@tasks.register("zoo_recall")
class ZooRecall(_ZooTask):
    """Pairs ``fox coin, owl lamp.`` in lines of four amid made-up prose; one key's value is asked for."""

    name: ClassVar[str] = "zoo_recall"
    Options = ZooRecallOptions
    added: ClassVar[frozenset[str]] = frozenset({"fewest_pairs"})
    options: ZooRecallOptions

    def __init__(self, tokenizer: Tokenizer, length: int | None = None, **options: Any) -> None:
        super().__init__(tokenizer, length, **options)
        pairs, length = self.options.pairs, self.options.length
        self.pairs = pairs if pairs is not None else min(len(KEYS), max(2, length // 16))
        self.amounts = amounts(self.name, "fewest_pairs", self.options.fewest_pairs, self.pairs)
        self.uniform_chance = chance(self.amounts)

    def facts(self, random: Random, split: Split) -> tuple[list[Fact], list[str]]:
        """Return the pairs, a few of them in a line."""
        pairs = self.pairs if self.options.fewest_pairs is None else random.choice(self.amounts)
        facts = pair_facts(random, split, pairs)
        return facts, lines(facts)

    def question(self, random: Random, facts: list[Fact]) -> tuple[Fact, str]:
        """Say a few other pairs again, and ask for one."""
        asked, *reminders = random.sample(facts, min(len(facts), REMINDERS + 1))
        said = "".join(f" {fact.pair}," for fact in reminders)
        return asked, f" again,{said} {asked.key}"


@tasks.register("zoo_passkey")
class ZooPasskey(_ZooTask):
    """One pass key ``magic lamp.`` at a random place in made-up prose, and nothing else to remember."""

    name: ClassVar[str] = "zoo_passkey"
    divides = "the whole context; the pass key is one of 64 words in every split"
    Options = FittedOptions
    options: FittedOptions
    uniform_chance = 1 / len(VALUES)

    def facts(self, random: Random, split: Split) -> tuple[list[Fact], list[str]]:
        """Return the pass key, in a sentence of its own."""
        key = passkey(random)
        return [key], [f"{key.pair}."]

    def question(self, random: Random, facts: list[Fact]) -> tuple[Fact, str]:
        """Ask for it."""
        return facts[0], f" {facts[0].key}"

    def sample(self, random: Random, split: Split, number: int, identity: str) -> Sample:
        """Return one sample, whose context belongs to the split."""
        draw = super().sample
        return draw_of_split(
            lambda: draw(random, split, number, identity), lambda sample: sample.context, split, "contexts"
        )
