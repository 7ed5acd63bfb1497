"""Task: the texts of `experiments.titans`: few facts, any amount of prose around them, and questions about all of them.

They have the words and the form of the tasks ``zoo_recall``, ``zoo_needle`` and ``zoo_forgetting``, so what is trained
on them answers these tasks. How many facts a text states does not depend on its length: what grows is the noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from evomem.tasks import Split
from evomem.tasks.text.zoo import lines, needle_facts, pair_facts, sentence, weave
from evomem.tasks.text.zoo_forgetting import draw_story, tell
from evomem.tasks.text.zoo_words import DIGITS, VALUES
from experiments.zoo.data import zoo_tokenizer

TASKS = ("zoo_recall", "zoo_needle", "zoo_forgetting")
PAIRS, NEEDLES, ONCE, RESTATED = 6, 2, 1, 3
"""Pairs of a text of ``zoo_recall``, needles of one of ``zoo_needle``; of ``zoo_forgetting`` keys that are stated once,
and keys that are stated again later with another value, which is the one that is asked for."""
SHORTEST = 52
"""Tokens of the shortest text that all of a task's facts and questions fit into."""
TOKENIZER = zoo_tokenizer()


@dataclass(frozen=True)
class Texts:
    """Texts in tokens, padded behind.

    Attributes
    ----------
    ids : (texts, tokens) int64.
    real : (texts, tokens) bool: not padding.
    answers : (texts, tokens) bool: words of answers. Of ``zoo_forgetting`` only those about restated keys count when
        texts are measured; all of them are trained on.
    """

    ids: Tensor
    real: Tensor
    answers: Tensor


def draw(task: str, random: Random, length: int, split: Split) -> tuple[str, str, set[str]]:
    """Return a context, all questions with their answers, and the keys that were stated once (``zoo_forgetting``).

    Together they are at most ``length`` tokens; sentences of prose are added as long as one fits.
    """
    if task == "zoo_needle":
        facts = needle_facts(random, split, NEEDLES)
        statements = [fact.needle for fact in facts]
        questions = " ".join(fact.needle for fact in random.sample(facts, len(facts)))
    elif task == "zoo_recall":
        facts = pair_facts(random, split, PAIRS)
        statements = lines(facts)
    else:
        story = draw_story(random, split, ONCE, RESTATED, 2)
        facts, statements = list(story.newest.values()), lines(story.statements)
    if task != "zoo_needle":
        questions = "again, " + ", ".join(fact.pair for fact in random.sample(facts, len(facts))) + "."
    depths = [random.random() for _ in statements]
    filler = _filler(random, length - sum(len(TOKENIZER.encode(text)) for text in (*statements, questions)))
    if task == "zoo_forgetting":
        context = tell(story, depths, filler, len(statements[0].split(",")))
        return context, questions, {fact.key for fact in facts} - story.restated
    return weave(statements, depths, filler), questions, set()


def _filler(random: Random, room: int) -> list[str]:
    """Return sentences of prose, at most ``room`` tokens together: as many as come before the first too long one."""
    filler: list[str] = []
    while True:
        following = sentence(random)
        room -= len(following.split()) + 1  # its full stop
        if room < 0:
            return filler
        filler.append(following)


def texts(task: str, seed: str, count: int, length: int, split: Split, restated_only: bool = False) -> Texts:
    """Return texts of a task, the same for the same arguments.

    Parameters
    ----------
    restated_only : of ``zoo_forgetting`` only answers about restated keys are answers.
    """
    random = Random(f"titans {task} {seed} {length}")
    said: Any = TOKENIZER.convert_tokens_to_ids([*DIGITS, *VALUES])
    rows, answers = [], []
    for _ in range(count):
        context, questions, once = draw(task, random, length, split)
        first, last = TOKENIZER.encode(context), TOKENIZER.encode(questions)
        asked = torch.isin(torch.tensor(last), torch.tensor(said))
        if restated_only and once:
            skipped: Any = TOKENIZER.convert_tokens_to_ids(sorted(once))
            asked[1:] &= ~torch.isin(torch.tensor(last[:-1]), torch.tensor(skipped))
        rows.append(torch.tensor(first + last))
        answers.append(torch.cat((torch.zeros(len(first), dtype=torch.bool), asked)))
    return Texts(
        pad_sequence(rows, batch_first=True, padding_value=int(TOKENIZER.pad_token_id or 0)),
        pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True),
        pad_sequence(answers, batch_first=True),
    )


def shares(right: Tensor, answers: Tensor) -> Sequence[float]:
    """Return the share of answers (texts, tokens) bool that are right, by text."""
    found: list[float] = ((right & answers).sum(1) / answers.sum(1)).tolist()
    return found
