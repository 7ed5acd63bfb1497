"""Task: the words that keys, values and fillers are made of, divided over the splits."""

from __future__ import annotations

from functools import cache
from random import Random
from typing import Literal

from evomem.errors import TaskError
from evomem.installing import require
from evomem.tasks.base import Split
from evomem.tasks.splits import of_split

Category = Literal["noun", "adjective"]


@cache
def words(category: Category, split: Split | None = None) -> tuple[str, ...]:
    """Return the words a-z of a category (package ``wonderwords``), sorted; of one split, or all of them.

    Raises
    ------
    MissingPackagesError : ``wonderwords`` is not installed.
    """
    require([("wonderwords", "the words of a task's keys")])
    from wonderwords import RandomWord

    sorted_words = sorted(set(RandomWord().filter(include_categories=[category], regex="[a-z]+")))
    return tuple(sorted_words) if split is None else of_split(sorted_words, split)


def draw_keys(random: Random, split: Split, n: int, used: set[str] | None = None) -> list[str]:
    """Return ``n`` distinct adjective-noun keys of a split, none of them in ``used`` (which grows by them).

    Raises
    ------
    TaskError : the split's words cannot make so many keys.
    """
    adjectives, nouns = words("adjective", split), words("noun", split)
    used = set() if used is None else used
    if n + len(used) > len(adjectives) * len(nouns) // 2:
        raise TaskError(f"{n} distinct keys are more than the words of the {split} split can make")
    keys: list[str] = []
    while len(keys) < n:
        key = f"{random.choice(adjectives)}-{random.choice(nouns)}"
        if key not in used:
            used.add(key)
            keys.append(key)
    return keys
