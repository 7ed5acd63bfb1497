"""Task: random automata, the languages of RegBench, and what predicts their words without learning.

Source: Akyürek, Wang, Kim & Andreas 2024, "In-Context Language Learning: Architectures and Algorithms" (RegBench).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evomem.tasks.base import Split
from evomem.tasks.splits import draw_of_split
from evomem.tasks.streams.base import Bools, Ints

LETTERS = 18
SEPARATOR = LETTERS
"""The symbol between words."""
STATES, ALPHABET, EDGES = (4, 12), (4, LETTERS), (1, 3)
"""Fewest and most of an automaton before it is minimised: states, letters, and edges that leave a state."""


@dataclass(frozen=True)
class Automaton:
    """A deterministic automaton without final states: a word is legal if a walk from state 0 spells it.

    Attributes
    ----------
    edges : of every state (letter, next state), in the order of the letters.
    """

    edges: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def text(self) -> str:
        """The automaton as text; two minimised ones have the same language if and only if they have the same text."""
        return ";".join(",".join(f"{letter}>{target}" for letter, target in edges) for edges in self.edges)

    def letters(self, state: int) -> tuple[int, ...]:
        """Return the letters that may come next in a state."""
        return tuple(letter for letter, _ in self.edges[state])

    def walk(self, draw: np.random.Generator, length: int) -> tuple[list[int], list[int]]:
        """Return a word's letters, each drawn evenly from the legal ones, and the state before every letter."""
        state, word, states = 0, [], []
        for number in draw.random(length):
            states.append(state)
            letter, state = self.edges[state][int(number * len(self.edges[state]))]
            word.append(letter)
        return word, states


def draw_automaton(draw: np.random.Generator) -> Automaton:
    """Return a random automaton, minimised: symbols and targets of a state differ, and none leads to itself."""
    states = int(draw.integers(STATES[0], STATES[1] + 1))
    alphabet = draw.permutation(LETTERS)[: int(draw.integers(ALPHABET[0], ALPHABET[1] + 1))]
    edges = []
    for state in range(states):
        count = int(draw.integers(EDGES[0], EDGES[1] + 1))
        letters = draw.permutation(alphabet)[:count].tolist()
        targets = draw.permutation(np.delete(np.arange(states), state))[:count].tolist()
        edges.append(tuple(sorted(zip(letters, targets, strict=True))))
    return minimised(Automaton(tuple(edges)))


def minimised(automaton: Automaton) -> Automaton:
    """Return the smallest automaton of the same language; states are numbered as a walk in breadth meets them."""
    count = len(automaton.edges)
    group = [0] * count
    while True:
        # Two states differ as soon as one letter is legal in one of them only, or leads to states that differ.
        looks = [tuple((letter, group[target]) for letter, target in edges) for edges in automaton.edges]
        numbers = {look: number for number, look in enumerate(dict.fromkeys(looks))}
        refined = [numbers[look] for look in looks]
        if len(numbers) == len(set(group)):
            break
        group = refined
    order = [0]
    seen = {group[0]: 0}
    for state in order:
        for _, target in automaton.edges[state]:
            if group[target] not in seen:
                seen[group[target]] = len(seen)
                order.append(target)
    return Automaton(
        tuple(tuple((letter, seen[group[target]]) for letter, target in automaton.edges[state]) for state in order)
    )


def automata(split: Split, n: int, seed: int) -> list[Automaton]:
    """Return ``n`` automata of a split, all different; the first of more are the same as fewer."""
    draw = np.random.default_rng([seed, list(Split).index(Split(split))])
    drawn: dict[str, Automaton] = {}
    while len(drawn) < n:
        automaton = draw_of_split(lambda: draw_automaton(draw), lambda one: one.text, split, "automata")
        drawn[automaton.text] = automaton
    return list(drawn.values())


@dataclass(frozen=True, eq=False)
class Episode:
    """Words of one language, one after another.

    Attributes
    ----------
    symbols : (length,) int64, letters and, between words, `SEPARATOR`.
    legal : (length, LETTERS) bool, the letters that might have stood there instead; none where a separator stands.
    """

    symbols: Ints
    legal: Bools

    @property
    def scored(self) -> Bools:
        """(length,) bool: where a letter stands, which is what predictions are judged by."""
        letters: Bools = self.symbols != SEPARATOR
        return letters


def draw_episode(
    draw: np.random.Generator, automaton: Automaton, words: tuple[int, int] = (10, 19), longest: int = 49
) -> Episode:
    """Return some words of an automaton's language.

    Parameters
    ----------
    words : fewest and most.
    longest : letters of a word, of which there are 1 to so many.
    """
    table = np.zeros((len(automaton.edges) + 1, LETTERS), bool)
    for state, edges in enumerate(automaton.edges):
        table[state, [letter for letter, _ in edges]] = True
    symbols: list[int] = []
    states: list[int] = []
    for _ in range(int(draw.integers(words[0], words[1] + 1))):
        if symbols:
            symbols.append(SEPARATOR)
            states.append(-1)
        word, visited = automaton.walk(draw, int(draw.integers(1, longest + 1)))
        symbols += word
        states += visited
    return Episode(np.array(symbols, np.int64), table[states])


def greedy_accuracy(probabilities: NDArray[np.floating], legal: Bools, scored: Bools) -> float:
    """Return the share of places at which the likeliest symbol is legal.

    Parameters
    ----------
    probabilities : (..., symbols), what is predicted for each place from what stands before it; symbols beyond the
        letters, such as a separator, are never legal.
    legal : (..., LETTERS).
    scored : (...), the places that count.
    """
    best = np.asarray(probabilities)[scored].argmax(-1)
    allowed = legal[scored]
    inside = best < allowed.shape[-1]
    return float((inside & allowed[np.arange(len(best)), np.where(inside, best, 0)]).mean())


def total_variation(probabilities: NDArray[np.floating], legal: Bools, scored: Bools) -> float:
    """Return the mean over places of Σ|p - q|, q even over the legal letters: 0 to 2, not halved, as RegBench has it.

    See `greedy_accuracy` for the parameters; the sum is over the letters.
    """
    allowed = legal[scored].astype(np.float64)
    even = allowed / allowed.sum(-1, keepdims=True)
    predicted = np.asarray(probabilities, np.float64)[scored][:, : allowed.shape[-1]]
    return float(np.abs(predicted - even).sum(-1).mean())


def backoff_predictions(symbols: Ints | Sequence[int], order: int = 3) -> NDArray[np.float64]:
    """Return what an n-gram model predicts at every place from the words before it and its own word's beginning.

    The longest context of at most ``order - 1`` symbols that stood before a letter already gives the letters' relative
    frequencies after it; contexts begin with their word (which is known to begin), and the empty one is the last
    resort. Before anything was seen, all letters are as likely.

    Returns
    -------
    (length, LETTERS) fp64, rows sum to 1.
    """
    counts: dict[tuple[int, ...], NDArray[np.float64]] = {}
    predictions = np.full((len(symbols), LETTERS), 1 / LETTERS)
    recent: tuple[int, ...] = (SEPARATOR,) * (order - 1)
    for place, symbol in enumerate(np.asarray(symbols).tolist()):
        contexts = [recent[start:] for start in range(order)]
        for context in contexts:
            if context in counts:
                predictions[place] = counts[context] / counts[context].sum()
                break
        if symbol == SEPARATOR:
            recent = (SEPARATOR,) * (order - 1)
            continue
        for context in contexts:
            counts.setdefault(context, np.zeros(LETTERS))[symbol] += 1
        recent = (*recent, symbol)[1:] if order > 1 else ()
    return predictions
