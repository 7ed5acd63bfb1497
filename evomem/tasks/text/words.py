"""Task: the words that keys, values and fillers are made of, divided over the splits."""

from __future__ import annotations

from functools import cache
from hashlib import blake2b
from random import Random
from typing import Literal

from evomem.errors import TaskError
from evomem.installing import require
from evomem.tasks.base import Split

Category = Literal["noun", "adjective"]


def split_of(text: str) -> Split:
    """Return the split that a text belongs to, by its hash: 60 % train, 20 % select, 20 % sealed."""
    bucket = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") % 5
    return (Split.TRAIN, Split.TRAIN, Split.TRAIN, Split.SELECT, Split.SEALED)[bucket]


@cache
def words(category: Category, split: Split | None = None) -> tuple[str, ...]:
    """Return the words a-z of a category (package ``wonderwords``), sorted; of one split, or all of them.

    Raises
    ------
    MissingPackagesError : ``wonderwords`` is not installed.
    """
    require([("wonderwords", "the words of a task's keys")])
    from wonderwords import RandomWord

    found = sorted(set(RandomWord().filter(include_categories=[category], regex="[a-z]+")))
    return tuple(word for word in found if split is None or split_of(word) == split)


def draw_keys(random: Random, split: Split, n: int, taken: set[str] | None = None) -> list[str]:
    """Return ``n`` distinct adjective-noun keys of a split, none of them in ``taken`` (which grows by them).

    Raises
    ------
    TaskError : the split's words cannot make so many keys.
    """
    adjectives, nouns = words("adjective", split), words("noun", split)
    taken = set() if taken is None else taken
    if n + len(taken) > len(adjectives) * len(nouns) // 2:
        raise TaskError(f"{n} distinct keys are more than the words of the {split} split can make")
    keys: list[str] = []
    while len(keys) < n:
        key = f"{random.choice(adjectives)}-{random.choice(nouns)}"
        if key not in taken:
            taken.add(key)
            keys.append(key)
    return keys
