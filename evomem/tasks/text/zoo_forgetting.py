"""Task: pairs of the zoo in made-up prose, some of them restated with new values; the newest value of a key counts.

`zoo_recall` with keys that change: what a memory holds of an older statement is not merely useless but misleads. The
word-level models of the zoo cannot be asked `forgetting_mqar`, whose splits are disjoint in words: what was never
trained on cannot be recalled. Here, as in the zoo's other tasks, splits are disjoint in what a context states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from pydantic import Field

from evomem.errors import TaskError
from evomem.tasks.base import Sample, Split, Tokenizer, tasks
from evomem.tasks.fitting import fit
from evomem.tasks.generated import FittedOptions, GeneratedTask
from evomem.tasks.splits import draw_of_split
from evomem.tasks.text.needles import Haystack
from evomem.tasks.text.zoo import LINE, REMINDERS, Fact, lines, sentence, stated, weave
from evomem.tasks.text.zoo_words import KEYS, VALUES


@dataclass(frozen=True)
class Story:
    """What a context states, one statement after another.

    Attributes
    ----------
    statements : every pair that is stated, in order; no value occurs twice.
    newest : what each key is at the end, by key.
    restated : keys that were something else before.
    """

    statements: tuple[Fact, ...]
    newest: dict[str, Fact]
    restated: frozenset[str]

    def stale(self, key: str) -> list[str]:
        """Return the values that a key had before, the oldest first."""
        return [fact.value for fact in self.statements if fact.key == key][:-1]


def draw_story(random: Random, split: Split, once: int, restated: int, values: int) -> Story:
    """Return a story that belongs to ``split``, by the hash of all that it states.

    Parameters
    ----------
    once, restated : keys with one value, and with ``values`` values one after another.
    values : of a restated key, 2 or more.

    Raises
    ------
    TaskError : the zoo's vocabulary has not so many keys or values.
    """
    number, count = once + restated, once + restated * values
    if number > len(KEYS) or count > len(VALUES):
        raise TaskError(
            f"{number} pairs, {restated} of them with {values} values, are too many: the zoo's vocabulary has "
            f"{len(KEYS)} keys and {len(VALUES)} values, and no value occurs twice; ask for fewer pairs"
        )

    def draw() -> Story:
        keys = random.sample(KEYS, number)
        order = keys[:once] + keys[once:] * values
        random.shuffle(order)
        statements = tuple(Fact(key, value) for key, value in zip(order, random.sample(VALUES, count), strict=True))
        return Story(statements, {fact.key: fact for fact in statements}, frozenset(keys[once:]))

    return draw_of_split(draw, lambda story: stated(story.statements), split, "stories")


def tell(story: Story, depths: Sequence[float], filler: Sequence[str], line: int) -> str:
    """Return a text of filler sentences with the story's lines, in its order, at ``depths`` (0 to 1, in any order)."""
    return weave(lines(story.statements, line), sorted(depths), filler)


class ZooForgettingOptions(FittedOptions):
    """Options of the zoo's pairs with changing values."""

    pairs: int | None = Field(
        default=None, ge=2, le=len(KEYS), description="keys; none: one for each 16 tokens of length, if there are words"
    )
    restated: float = Field(default=0.5, gt=0, le=1, description="share of the keys that get new values")
    values: int = Field(
        default=2, ge=2, le=8, description="values of such a key, one after another; the zoo is trained with 2 to 4"
    )
    line: int = Field(default=LINE, ge=1, le=LINE, description="pairs of one line")
    asked: int = Field(
        default=1, ge=1, le=len(KEYS), description="keys of one answer; with several a search learns more of a context"
    )


@tasks.register("zoo_forgetting")
class ZooForgetting(GeneratedTask[ZooForgettingOptions]):
    """Pairs ``fox coin, owl lamp.`` amid made-up prose, some keys restated with new values; the newest is asked for.

    Samples with an even number ask for a restated key, the others for one with a single value, if there is one.
    ``meta`` of a sample tells which (``restated``), the values that the key had before (``stale``), and how many
    statements lie between the one asked for and the end (``after``). With ``asked`` above 1 the answer goes on with
    other pairs, ``coin, owl lamp, ..``, whose keys cost every memory about the same likelihood; only the first value is
    scored.
    """

    name: ClassVar[str] = "zoo_forgetting"
    divides = "the set of facts that a context states"
    Options = ZooForgettingOptions
    immaterial: ClassVar[frozenset[str]] = GeneratedTask.immaterial | {"asked"}

    def __init__(self, tokenizer: Tokenizer, length: int | None = None, **options: Any) -> None:
        super().__init__(tokenizer, length, **options)
        chosen = self.options
        fitting = int(len(VALUES) / (1 + chosen.restated * (chosen.values - 1)))
        default = min(len(KEYS), fitting - 1, max(2, chosen.length // 16))
        self.pairs = chosen.pairs if chosen.pairs is not None else default
        self.restated = max(1, round(chosen.restated * self.pairs))
        self.uniform_chance = 1 / self.pairs

    def sample(self, random: Random, split: Split, number: int, identity: str) -> Sample:
        """Return one sample; its story and places depend on its own generator only."""
        options = self.options
        story = draw_story(random, split, self.pairs - self.restated, self.restated, options.values)
        once = sorted(story.newest.keys() - story.restated)
        key = random.choice(sorted(story.restated) if number % 2 == 0 or not once else once)
        others = [fact for fact in story.newest.values() if fact.key != key]
        reminders = random.sample(others, min(len(others), REMINDERS))
        said = "".join(f" {fact.pair}," for fact in reminders)
        asked = story.newest[key]
        question, value = f" again,{said} {key}", f" {asked.value}"
        depths = [random.random() for _ in lines(story.statements, options.line)]
        rest = [fact for fact in others if fact not in reminders] if options.asked > 1 else []
        more = random.sample(rest, min(len(rest), options.asked - 1))
        answer = value + "".join(f", {fact.pair}" for fact in more)
        haystack = Haystack(lambda n: sentence(random))

        def context(n: int) -> str:
            return tell(story, depths, haystack.first(n), options.line)

        n = fit(options.length, lambda n: context(n) + question + answer, haystack.unit, self.counts, self.name)
        return Sample(
            id=identity,
            context=context(n),
            question=question,
            answer=answer,
            references=(asked.value,),
            max_new_tokens=self.counts.following(value),
            meta={
                "key": key,
                "also": [fact.key for fact in more],
                "facts": len(story.statements),
                "units": n,
                "restated": key in story.restated,
                "stale": story.stale(key),
                "after": len(story.statements) - 1 - story.statements.index(asked),
            },
        )

    def score(self, sample: Sample, output: str) -> float:
        """Return 1 if the output begins with the newest value, else 0."""
        said = output.lower().replace(".", " ").replace(",", " ").split()
        return float(said[:1] == [sample.references[0]])
