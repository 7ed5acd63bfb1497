"""Task: what the models of the zoo are trained on, drawn by the functions of `evomem.tasks.zoo` from the train split.

A lesson is a sample of ``zoo_needle`` or ``zoo_recall`` that asks for every fact instead of one, in random order: so
many answers a sequence are what makes a small model find the circuit within minutes.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from evomem.tasks import Split
from evomem.tasks.zoo import lines, needle_facts, pair_facts, sentence, weave
from evomem.tasks.zoo_words import DIGITS, VALUES, VOCABULARY

SPECIAL = ("<pad>", "</s>", "<unk>")
POSITIONS = 1152
"""Tokens that every model of the zoo can read: 1,024 and room to answer."""
NEEDLE_TOKENS = 7
PAIR_TOKENS = 3
NEEDLES = (2, 12)
"""Fewest and most needles of a lesson."""
TASKS = ("zoo_needle", "zoo_recall")


def zoo_tokenizer() -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer that the models of the zoo share.

    Words and marks are tokens, blanks only part them: a text cut at a blank has its tokens cut there. Decoding joins
    tokens with blanks, which is how the zoo's tasks read an answer.
    """
    words = (*SPECIAL, *VOCABULARY)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    make: Any = PreTrainedTokenizerFast  # not annotated
    fast: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    return fast


def needle_lesson(random: Random, length: int) -> tuple[str, str]:
    """Return a context with needles and all its questions with their answers: at most ``length`` tokens together."""
    most = max(1, min(NEEDLES[1], length // (2 * NEEDLE_TOKENS)))
    facts = needle_facts(random, Split.TRAIN, random.randint(min(NEEDLES[0], most), most))
    questions = " ".join(fact.needle for fact in random.sample(facts, len(facts)))
    return _context(random, [fact.needle for fact in facts], length - 2 * NEEDLE_TOKENS * len(facts)), questions


def recall_lesson(random: Random, length: int) -> tuple[str, str]:
    """Return a context with pairs and all its questions with their answers, as `needle_lesson`."""
    most = max(1, min(64, (length - 2) // (2 * PAIR_TOKENS)))
    facts = pair_facts(random, Split.TRAIN, random.randint(max(1, most // 2), most))
    questions = "again, " + ", ".join(fact.pair for fact in random.sample(facts, len(facts))) + "."
    return _context(random, lines(facts), length - 2 - 2 * PAIR_TOKENS * len(facts)), questions


def _context(random: Random, statements: list[str], room: int) -> str:
    """Return the statements in as many filler sentences as ``room`` tokens hold."""
    filler: list[str] = []
    while True:
        following = sentence(random)
        room -= len(following.split()) + 1  # its full stop
        if room < 0:
            break
        filler.append(following)
    return weave(statements, [random.random() for _ in statements], filler)


@dataclass(frozen=True)
class Batch:
    """Lessons in tokens, padded behind.

    Attributes
    ----------
    ids : (batch, length) int64.
    real : (batch, length) bool: not padding.
    answers : (batch, length) bool: tokens of answers; the rest of a lesson can be guessed at best.
    recall : (batch,) bool: which lessons are of ``zoo_recall``.
    """

    ids: Tensor
    real: Tensor
    answers: Tensor
    recall: Tensor


class Lessons:
    """Batches of lessons, each a pure function of (seed, step, length, tokens)."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.tokenizer = zoo_tokenizer()
        words: Any = self.tokenizer.convert_tokens_to_ids([*DIGITS, *VALUES])
        self.said = torch.tensor(words)

    def batch(self, step: int, length: int, tokens: int) -> Batch:
        """Return a step's batch: as many lessons of both tasks, in turn, as make ``tokens`` tokens (but at least 2)."""
        random = Random(f"zoo lessons {self.seed} {step}")
        rows, starts = [], []
        for row in range(max(2, tokens // length)):
            lesson = recall_lesson if row % 2 else needle_lesson
            context, questions = (self.tokenizer.encode(text) for text in lesson(random, length))
            rows.append(torch.tensor(context + questions))
            starts.append(len(context))
        pad: Any = self.tokenizer.pad_token_id
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        asked = torch.arange(ids.shape[1]) >= torch.tensor(starts)[:, None]
        return Batch(ids, ids != pad, asked & torch.isin(ids, self.said), torch.arange(len(rows)) % 2 == 1)
