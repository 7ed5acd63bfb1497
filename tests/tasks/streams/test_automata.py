"""Automata are minimal, their words legal; the metrics of predictions and the n-gram model equal slow ones."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest

from evomem.errors import ConfigError
from evomem.tasks import Split, build
from evomem.tasks.streams.automata import (
    LETTERS,
    SEPARATOR,
    Automaton,
    automata,
    backoff_predictions,
    draw_automaton,
    draw_episode,
    greedy_accuracy,
    minimised,
    total_variation,
)
from evomem.tasks.streams.regbench import SYMBOLS
from tests.support.toy_tokenizer import ToyTokenizer


def language(automaton: Automaton, state: int, length: int) -> frozenset[tuple[int, ...]]:
    """All words of at most so many letters that can be spelled from a state."""
    words, ends = {()}, [((), state)]
    for _ in range(length):
        ends = [((*word, letter), target) for word, at in ends for letter, target in automaton.edges[at]]
        words |= {word for word, _ in ends}
    return frozenset(words)


def random_automaton(draw, states, letters):
    """One that is not minimised, with states that look alike often."""
    edges = []
    for _ in range(states):
        chosen = draw.permutation(letters)[: int(draw.integers(1, letters + 1))]
        edges.append(tuple(sorted((int(letter), int(draw.integers(states))) for letter in chosen)))
    return Automaton(tuple(edges))


def test_minimised_keeps_the_language_and_no_two_states_are_alike():
    draw = np.random.default_rng(0)
    smaller = 0
    for _ in range(60):
        automaton = random_automaton(draw, int(draw.integers(1, 6)), 2)
        small = minimised(automaton)
        states = len(small.edges)
        smaller += states < len(automaton.edges)
        depth = len(automaton.edges) + 1  # words that tell two states apart are shorter than there are states
        assert language(small, 0, depth) == language(automaton, 0, depth)
        assert len({language(small, state, depth) for state in range(states)}) == states
        assert minimised(small) == small
        reached, waiting = {0}, [0]
        for state in waiting:
            new = {target for _, target in small.edges[state]} - reached
            reached |= new
            waiting += sorted(new)
        assert reached == set(range(states))
    assert smaller > 10


def test_one_language_has_one_text():
    """All automata of two states and two letters: equal texts if and only if equal languages."""
    options = [
        tuple(edge for edge in ((0, first), (1, second)) if edge[1] is not None)
        for first, second in product((0, 1, None), repeat=2)
        if (first, second) != (None, None)
    ]
    every = [Automaton(edges) for edges in product(options, repeat=2)]
    by_text = {(minimised(one).text, language(one, 0, 4)) for one in every}
    assert len({text for text, _ in by_text}) == len({words for _, words in by_text}) == len(by_text) > 10


def test_automata_are_drawn_as_published_and_divided():
    draw = np.random.default_rng(1)
    counts = Counter(len(edges) for _ in range(100) for edges in draw_automaton(draw).edges)
    assert set(counts) == {1, 2, 3}
    assert max(counts.values()) < 1.3 * min(counts.values())
    drawn = {split: automata(split, 40, 0) for split in Split}
    texts = [one.text for ones in drawn.values() for one in ones]
    assert len(set(texts)) == 120
    assert automata(Split.TRAIN, 7, 0) == drawn[Split.TRAIN][:7]
    assert automata(Split.TRAIN, 40, 1) != drawn[Split.TRAIN]
    sizes = [len(one.edges) for ones in drawn.values() for one in ones]
    assert max(sizes) <= 12


def test_episodes_are_words_of_their_language_and_say_what_is_legal():
    for number, automaton in enumerate(automata(Split.SELECT, 12, 3)):
        episode = draw_episode(np.random.default_rng(number), automaton)
        words = "".join(SYMBOLS[symbol] for symbol in episode.symbols).split("|")
        assert 10 <= len(words) <= 19
        assert all(1 <= len(word) <= 49 for word in words)
        place = 0
        for word in words:
            state = 0
            for letter in word:
                targets = {SYMBOLS[symbol]: target for symbol, target in automaton.edges[state]}
                assert {SYMBOLS[symbol] for symbol in np.flatnonzero(episode.legal[place])} == set(targets)
                state = targets[letter]
                place += 1
            if place < len(episode.symbols):
                assert not episode.scored[place]
                assert not episode.legal[place].any()
                place += 1
        assert place == len(episode.symbols)


def slow_backoff(symbols, place, order):
    """Counts of letters after the longest context that was met, by looking through all that came before."""
    padded, places = [], {}
    for at, symbol in enumerate(symbols[:place]):
        if at == 0 or symbols[at - 1] == SEPARATOR:
            padded += [SEPARATOR] * (order - 1)
        if symbol != SEPARATOR:
            places[len(padded)] = symbol
            padded.append(symbol)
    if place == 0 or symbols[place - 1] == SEPARATOR:
        padded += [SEPARATOR] * (order - 1)
    for size in range(order - 1, -1, -1):
        context = padded[len(padded) - size :]
        after = [letter for at, letter in places.items() if padded[at - size : at] == context]
        if after:
            return np.bincount(after, minlength=LETTERS) / len(after)
    return np.full(LETTERS, 1 / LETTERS)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_backoff_equals_looking_through_the_text(order):
    (automaton,) = automata(Split.TRAIN, 1, 5)
    symbols = draw_episode(np.random.default_rng(0), automaton, (5, 6), 20).symbols
    predicted = backoff_predictions(symbols, order)
    np.testing.assert_allclose(predicted.sum(1), 1)
    for place, symbol in enumerate(symbols):
        if symbol != SEPARATOR:
            np.testing.assert_allclose(predicted[place], slow_backoff(symbols.tolist(), place, order))


def test_metrics_of_the_truth_of_nothing_and_of_the_wrong():
    episode = draw_episode(np.random.default_rng(0), automata(Split.TRAIN, 1, 0)[0])
    legal, scored = episode.legal, episode.scored
    truth = legal / np.maximum(legal.sum(1, keepdims=True), 1)
    assert greedy_accuracy(truth, legal, scored) == 1
    assert total_variation(truth, legal, scored) == 0
    wrong = ~legal / (~legal).sum(1, keepdims=True)
    assert greedy_accuracy(wrong, legal, scored) == 0
    assert total_variation(wrong, legal, scored) == pytest.approx(2)
    separator = np.eye(LETTERS + 1)[np.full(len(legal), SEPARATOR)]
    assert greedy_accuracy(separator, legal, scored) == 0
    assert total_variation(separator, legal, scored) == pytest.approx(1)  # the letters' share alone is summed
    predicted = backoff_predictions(episode.symbols)
    slow = [abs(predicted[place] - truth[place]).sum() for place in np.flatnonzero(scored)]
    assert total_variation(predicted, legal, scored) == pytest.approx(np.mean(slow))
    slow = [legal[place][predicted[place].argmax()] for place in np.flatnonzero(scored)]
    assert greedy_accuracy(predicted, legal, scored) == pytest.approx(np.mean(slow))
    assert 0.5 < np.mean(slow) < 1


def test_samples_ask_for_a_letter_after_whole_words():
    task = build("regbench", ToyTokenizer())
    cut = build("regbench:length=200", ToyTokenizer())
    for sample, short in zip(task.samples("sealed", 20, 0), cut.samples("sealed", 20, 0), strict=True):
        assert sample.context.endswith(short.context)
        assert (sample.question, sample.answer) == (short.question, short.answer)
        words = (short.context + short.question).split()
        assert 49 < len(words) < 200
        assert short.context == sample.context or sample.context.removesuffix(short.context).endswith("| ")
        state, edges = 0, [dict(part.split(">") for part in e.split(",")) for e in sample.meta["automaton"].split(";")]
        for symbol in sample.question.split()[1:]:
            state = int(edges[state][str(SYMBOLS.index(symbol))])
        assert set(sample.references) == {SYMBOLS[int(letter)] for letter in edges[state]}
        for letter in SYMBOLS:
            assert task.score(sample, f" {letter} a b") == float(letter in sample.references)
    assert task.score(sample, "") == 0
    episodes = task.episodes(Split.TRAIN, 3, 0)
    assert [len(one.symbols) for one in episodes[:2]] == [len(one.symbols) for one in task.episodes(Split.TRAIN, 2, 0)]
    for spec in ("regbench:length=100", "regbench:fewest_words=20"):
        with pytest.raises(ConfigError, match=r"length of more than 147|fewest_words 20 is more than words 19"):
            build(spec, ToyTokenizer())
