"""Task: what the models of the zoo are trained on, drawn by the functions of the zoo's tasks from the train split.

A lesson is a sample of ``zoo_needle``, ``zoo_recall`` or ``zoo_forgetting`` that asks for every fact instead of one, in
random order: so many answers a sequence are what makes a small model find the circuit within minutes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from evomem.models.architectures.word_tokenizer import word_tokenizer
from evomem.tasks import Split
from evomem.tasks.splits import draw_of_split
from evomem.tasks.text.zoo import PASSKEY, Fact, lines, needle_facts, pair_facts, passkey, sentence, weave
from evomem.tasks.text.zoo_forgetting import draw_story, tell
from evomem.tasks.text.zoo_words import DIGITS, KEYS, VALUES, VOCABULARY

SPECIAL = ("<pad>", "</s>", "<unk>")
POSITIONS = 1152
"""Tokens that every model of the zoo can read: 1,024 and room to answer."""
NEEDLE_TOKENS = 7
PAIR_TOKENS = 3
NEEDLES = (2, 12)
"""Fewest and most needles of a lesson."""
TASKS = ("zoo_needle", "zoo_recall")
"""What a model of the zoo is trained on unless its recipe says otherwise."""
FEW_PAIRS = 16
"""Most pairs of a lesson of few."""
FEW = f"zoo_recall(pairs={FEW_PAIRS})"
"""Name of the lessons of few pairs."""
RESTATED = "zoo_forgetting restated"
"""Kind of the answers about keys that had another value before."""


def zoo_tokenizer() -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer that the models of the zoo share.

    Words and marks are tokens, blanks only part them: a text cut at a blank has its tokens cut there. Decoding joins
    tokens with blanks, which is how the zoo's tasks read an answer.
    """
    words = (*SPECIAL, *VOCABULARY)
    numbered = {word: number for number, word in enumerate(words)}
    return word_tokenizer(numbered, pre_tokenizers.Whitespace(), eos_token="</s>", model_max_length=POSITIONS)


def needle_lesson(random: Random, length: int) -> tuple[str, str]:
    """Return a context with needles and all its questions with their answers: at most ``length`` tokens together."""
    most = max(1, min(NEEDLES[1], length // (2 * NEEDLE_TOKENS)))
    facts = needle_facts(random, Split.TRAIN, random.randint(min(NEEDLES[0], most), most))
    questions = " ".join(fact.needle for fact in random.sample(facts, len(facts)))
    return _context(random, [fact.needle for fact in facts], length - 2 * NEEDLE_TOKENS * len(facts)), questions


def recall_lesson(random: Random, length: int, pairs: int = 64) -> tuple[str, str]:
    """Return a context with ``pairs`` at most and all its questions with their answers, as `needle_lesson`."""
    most = max(1, min(pairs, (length - 2) // (2 * PAIR_TOKENS)))
    facts = pair_facts(random, Split.TRAIN, random.randint(max(1, most // 2), most))
    questions = "again, " + ", ".join(fact.pair for fact in random.sample(facts, len(facts))) + "."
    return _context(random, lines(facts), length - 2 - 2 * PAIR_TOKENS * len(facts)), questions


def few_pairs_lesson(random: Random, length: int) -> tuple[str, str]:
    """Return a `recall_lesson` of at most `FEW_PAIRS` pairs: what a memory matrix of 32 slots has room for."""
    return recall_lesson(random, length, FEW_PAIRS)


def forgetting_lesson(random: Random, length: int) -> tuple[str, str]:
    """Return a context whose keys change and all its questions with the newest values, as `needle_lesson`.

    Of the keys, 2 or more, a fifth to four fifths are restated; each of these has 2 to 4 values, one after another.
    """
    values, share, line = random.randint(2, 4), random.uniform(0.2, 0.8), random.randint(1, 4)

    def restated(keys: int) -> int:
        return min(keys - 1, max(1, round(share * keys)))

    def stated(keys: int) -> int:
        return keys + restated(keys) * (values - 1)

    def fits(keys: int) -> bool:
        return 2 + PAIR_TOKENS * (keys + stated(keys)) <= length and keys <= len(KEYS) and stated(keys) <= len(VALUES)

    most = 2
    while fits(most + 1):
        most += 1
    keys = random.randint(max(2, most // 2), most)
    story = draw_story(random, Split.TRAIN, keys - restated(keys), restated(keys), values)
    newest = list(story.newest.values())
    questions = "again, " + ", ".join(fact.pair for fact in random.sample(newest, keys)) + "."
    filler = _filler(random, length - 2 - PAIR_TOKENS * (keys + len(story.statements)))
    return tell(story, [random.random() for _ in lines(story.statements, line)], filler, line), questions


def passkey_lesson(random: Random, length: int) -> tuple[str, str]:
    """Return a context with a pass key at a random place, and the question for it with its answer.

    In half of the lessons it is also asked for, without being said again, at random places of the context: `Lessons`
    has the pass key as what is to be said there. So many answers a lesson let a memory be trained in minutes.
    """
    asks = random.choice((0, length // 8))

    def draw() -> tuple[str, Fact]:
        key = passkey(random)
        return _context(random, [f"{key.pair}."], length - PAIR_TOKENS - 2 - asks), key

    context, key = draw_of_split(draw, lambda drawn: drawn[0], Split.TRAIN, "contexts")
    words = context.split()
    behind = words.index(key.key) + 2
    for _ in range(asks):
        words.insert(random.randint(behind, len(words)), key.key)
    return " ".join(words), key.pair


LESSONS: dict[str, Callable[[Random, int], tuple[str, str]]] = {
    "zoo_needle": needle_lesson,
    "zoo_recall": recall_lesson,
    "zoo_forgetting": forgetting_lesson,
    "zoo_passkey": passkey_lesson,
    FEW: few_pairs_lesson,
}
"""How a lesson of each task is drawn, from a generator and a length in tokens."""


def kinds_of(tasks: Sequence[str]) -> tuple[str, ...]:
    """Return the kinds of answers in the lessons of some tasks; each has the same weight, and its own accuracy."""
    return (*tasks, RESTATED) if "zoo_forgetting" in tasks else tuple(tasks)


def _context(random: Random, statements: list[str], room: int) -> str:
    """Return the statements in as many filler sentences as ``room`` tokens hold."""
    filler = _filler(random, room)
    return weave(statements, [random.random() for _ in statements], filler)


def _filler(random: Random, room: int) -> list[str]:
    """Return as many filler sentences as ``room`` tokens hold."""
    filler: list[str] = []
    while True:
        following = sentence(random)
        room -= len(following.split()) + 1  # its full stop
        if room < 0:
            return filler
        filler.append(following)


@dataclass(frozen=True)
class Batch:
    """Lessons in tokens, padded behind.

    Attributes
    ----------
    ids : (batch, length) int64.
    real : (batch, length) bool: not padding.
    said : (batch, length) int64: what is to be said at each token: the token, or the answer where a lesson asks and
        goes on without it.
    answers : (batch, length) bool: tokens of answers; the rest of a lesson can be guessed at best.
    kinds : (batch, length) int64: number of the kind of each answer, in `Lessons.kinds`; anything at other tokens.
    """

    ids: Tensor
    said: Tensor
    real: Tensor
    answers: Tensor
    kinds: Tensor


class Lessons:
    """Batches of lessons of some tasks, each a pure function of (seed, step, length, tokens).

    Attributes
    ----------
    kinds : of the answers: one a task, and one more for keys that are restated.
    """

    def __init__(self, seed: int, tasks: tuple[str, ...] = TASKS) -> None:
        self.seed = seed
        self.tasks = tasks
        self.kinds = kinds_of(tasks)
        self.tokenizer = zoo_tokenizer()
        words: Any = self.tokenizer.convert_tokens_to_ids([*DIGITS, *VALUES])
        self.said = torch.tensor(words)
        self.asks: Any = self.tokenizer.convert_tokens_to_ids(PASSKEY)

    def batch(self, step: int, length: int, tokens: int) -> Batch:
        """Return a step's batch: as many lessons of the tasks, in turn, as make ``tokens`` tokens (but at least 2)."""
        random = Random(f"zoo lessons {self.seed} {step}")
        rows, starts, kinds = [], [], []
        for row in range(max(2, tokens // length)):
            task = self.tasks[row % len(self.tasks)]
            context, questions = (self.tokenizer.encode(text) for text in LESSONS[task](random, length))
            rows.append(torch.tensor(context + questions))
            starts.append(len(context))
            kinds.append(self._kinds(task, context, questions))
        pad: Any = self.tokenizer.pad_token_id
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        asked = torch.arange(ids.shape[1]) >= torch.tensor(starts)[:, None]
        kind = torch.nn.utils.rnn.pad_sequence(kinds, batch_first=True)
        said, answers = ids, asked & torch.isin(ids, self.said)
        if "zoo_passkey" in self.tasks:
            said, again = self._asked_again(ids)
            answers = answers | again
        return Batch(ids, said, ids != pad, answers, kind)

    def _asked_again(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is to be said at each token of lessons of pass keys, and where one is asked for in the context.

        The first token behind a `PASSKEY` states the pass key of its row; behind every other one it is to be said.
        """
        behind = torch.nn.functional.pad(ids[:, :-1] == self.asks, (1, 0))
        stated = behind & (behind.long().cumsum(1) == 1)
        key = torch.where(stated, ids, 0).sum(1, keepdim=True)
        again = behind & ~stated
        return torch.where(again, key, ids), again

    def _kinds(self, task: str, context: list[int], questions: list[int]) -> Tensor:
        """Return the kind of each token as if it were an answer, (length,): an answer stands behind its key."""
        kinds = torch.full((len(context) + len(questions),), self.tasks.index(task))
        if task == "zoo_forgetting":
            stated = Counter(context)
            again = [place for place, key in enumerate(questions[:-1], len(context) + 1) if stated[key] > 1]
            kinds[again] = self.kinds.index(RESTATED)
        return kinds
