"""Task: which letter may come next in a language that its words show (RegBench, Akyürek et al. 2024)."""

from __future__ import annotations

from random import Random
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from evomem.bounds import LENGTH
from evomem.errors import ConfigError
from evomem.tasks.base import Sample, Split, Tokenizer, tasks
from evomem.tasks.generated import GeneratedTask, TaskOptions
from evomem.tasks.splits import draw_of_split
from evomem.tasks.streams.automata import LETTERS, SEPARATOR, Episode, automata, draw_automaton, draw_episode

SYMBOLS = (*"abcdefghijklmnopqr", "|")
"""Letters and the separator as words of a text."""


class RegBenchOptions(TaskOptions):
    """Options of RegBench."""

    fewest_words: int = Field(default=10, ge=2, le=1000, description="words that are shown, at least")
    words: int = Field(default=19, ge=2, le=1000, description="words that are shown, at most; the last is cut")
    longest: int = Field(default=49, ge=1, le=1000, description="letters of a word, at most")
    length: int | None = Field(
        default=None, ge=1, le=LENGTH, description="letters and separators, at most, for which first words are left out"
    )


@tasks.register("regbench")
class RegBench(GeneratedTask[RegBenchOptions]):
    """Words of a random automaton's language; one is cut, and a letter must come next that is legal there.

    Any legal letter scores 1. `episodes` gives whole texts as arrays, to train on and to measure every place.
    """

    name: ClassVar[str] = "regbench"
    divides = "the automata, minimised"
    Options = RegBenchOptions
    uniform_chance = 2 / LETTERS

    def __init__(self, tokenizer: Tokenizer, length: int | None = None, **options: Any) -> None:
        super().__init__(tokenizer, length, **options)
        chosen = self.options
        if chosen.fewest_words > chosen.words:
            raise ConfigError(f"task regbench: fewest_words {chosen.fewest_words} is more than words {chosen.words}")
        if chosen.length is not None and chosen.length <= 3 * chosen.longest:
            raise ConfigError(
                f"task regbench: in {chosen.length} symbols there may be no whole word beside the last one; ask for a "
                f"length of more than {3 * chosen.longest}, or for a smaller longest"
            )

    @property
    def _words(self) -> tuple[int, int]:
        return self.options.fewest_words, self.options.words

    def sample(self, random: Random, split: Split, number: int, identity: str) -> Sample:
        """Return one sample."""
        draw = np.random.default_rng(random.getrandbits(128))
        automaton = draw_of_split(lambda: draw_automaton(draw), lambda one: one.text, split, "automata")
        episode = draw_episode(draw, automaton, self._words, self.options.longest)
        last = int(np.flatnonzero(episode.symbols == SEPARATOR)[-1])
        asked = last + 1 + int(draw.integers(len(episode.symbols) - last - 1))
        words = [SYMBOLS[symbol] for symbol in episode.symbols.tolist()]
        first = self._first(episode, asked)
        legal = np.flatnonzero(episode.legal[asked]).tolist()
        return Sample(
            id=identity,
            context=" ".join(words[first:last]),
            question="".join(f" {word}" for word in words[last:asked]),
            answer=f" {words[asked]}",
            references=tuple(SYMBOLS[letter] for letter in legal),
            max_new_tokens=self.counts.following(f" {words[asked]}"),
            meta={"automaton": automaton.text, "states": len(automaton.edges)},
        )

    def _first(self, episode: Episode, asked: int) -> int:
        """Return the place of the first word that fits the length."""
        surplus = asked + 1 - (self.options.length or LENGTH)
        if surplus <= 0:
            return 0
        return int(np.flatnonzero(episode.symbols[surplus - 1 :] == SEPARATOR)[0]) + surplus

    def episodes(self, split: Split, n: int, seed: int) -> list[Episode]:
        """Return ``n`` episodes of a split, one for each of `automata`; the first of more are the same as fewer."""
        drawn = automata(split, n, seed)
        return [
            draw_episode(np.random.default_rng([seed, number]), automaton, self._words, self.options.longest)
            for number, automaton in enumerate(drawn)
        ]

    def score(self, sample: Sample, output: str) -> float:
        """Return 1 if the first word of the output is a legal letter, else 0."""
        said = output.split()
        return float(bool(said) and said[0] in sample.references)
