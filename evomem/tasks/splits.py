"""Task: which split something belongs to: the one place where train, select and sealed samples are separated.

A task divides what its samples are made of, before any sample is drawn:

===============  =========================================================================================
`of_split`       a vocabulary: each word is in one split, by its hash (keys of needles, words of recall)
`draw_of_split`  what is drawn: again and again, until its text is of the split (facts of the zoo, mazes, carts)
`deal`           a text: contiguous stretches, so that each split reads like prose (essays, `book`)
`divide`         a user's rows: as they say themselves, or by the hash of their names (``file``)
===============  =========================================================================================

A task of `evomem.tasks.generated.GeneratedTask` that says nothing is separated by the hash of its contexts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from typing import TypeVar

from evomem.errors import TaskError
from evomem.tasks.base import Split

T = TypeVar("T")

TRIES = 10_000
"""Draws until one is of a split; if a fifth of them are, so many fail once in 10^969."""
_DEAL = (Split.TRAIN, Split.TRAIN, Split.SELECT, Split.TRAIN, Split.SEALED)


def split_of(text: str) -> Split:
    """Return the split that a text belongs to, by its hash: 60 % train, 20 % select, 20 % sealed."""
    bucket = int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") % 5
    return (Split.TRAIN, Split.TRAIN, Split.TRAIN, Split.SELECT, Split.SEALED)[bucket]


def of_split(words: Iterable[str], split: Split) -> tuple[str, ...]:
    """Return the words that belong to a split, in their order."""
    return tuple(word for word in words if split_of(word) == split)


def draw_of_split(draw: Callable[[], T], text: Callable[[T], str], split: Split, plural: str) -> T:
    """Return the first of what is drawn whose text belongs to a split.

    Parameters
    ----------
    plural : what is drawn, for the message: "facts".

    Raises
    ------
    TaskError : none of `TRIES` draws belongs to the split; there are too few different ones.
    """
    for _ in range(TRIES):
        drawn = draw()
        if split_of(text(drawn)) == split:
            return drawn
    raise TaskError(
        f"none of {TRIES:,} draws of {plural} belongs to the {split} split: there are too few different ones to divide "
        "over three splits; ask for longer samples, or for more keys"
    )


def deal(items: Sequence[T], regions: int) -> dict[Split, tuple[T, ...]]:
    """Return contiguous stretches of items, dealt out over the splits: three fifths train, one select, one sealed.

    Parameters
    ----------
    items : all different.
    regions : stretches that the items are cut into, a multiple of five.
    """
    shares: dict[Split, list[T]] = {split: [] for split in Split}
    for region in range(regions):
        start, stop = (len(items) * r // regions for r in (region, region + 1))
        shares[_DEAL[region % len(_DEAL)]].extend(items[start:stop])
    return {split: tuple(share) for split, share in shares.items()}


def divide(
    rows: Sequence[T], name: Callable[[T], str], named_split: Callable[[T], Split | None]
) -> tuple[dict[Split, list[T]], str]:
    """Divide rows over the splits: as they say themselves, or 60/20/20 by the hash of their names.

    A few rows may leave a split empty by their hashes. Where no row names its split, rows are moved then, the last by
    their hash from the largest split; of two rows one trains and selects, and one is sealed; a single one is in all
    splits. Such a division changes when rows are added.

    Parameters
    ----------
    name, named_split : return a row's name, unique, and the split that it names itself, or None.

    Returns
    -------
    The rows of each split, and how they were divided if that was not as usual, else "".
    """
    divided: dict[Split, list[T]] = {split: [] for split in Split}
    for row in rows:
        divided[named_split(row) or split_of(name(row))].append(row)
    if all(divided.values()) or any(named_split(row) is not None for row in rows):
        return divided, ""
    ranked = sorted(rows, key=lambda row: blake2b(name(row).encode(errors="replace")).digest())
    if len(ranked) < 3:
        shared, last = [ranked[0]], [ranked[-1]]
        divided = {Split.TRAIN: shared, Split.SELECT: shared, Split.SEALED: last}
        how = "one trains and selects, the other is sealed" if len(ranked) == 2 else "it is in every split"
        return divided, f"{_count(len(ranked))}: {how}"
    while not all(divided.values()):
        donor = max(divided.values(), key=len)
        moved = max(donor, key=ranked.index)
        donor.remove(moved)
        next(part for part in divided.values() if not part).append(moved)
    sizes = ", ".join(f"{len(part)} {split}" for split, part in divided.items())
    return divided, f"{_count(len(rows))}, divided so that no split is empty: {sizes}"


def _count(rows: int) -> str:
    return f"{rows} row{'s' if rows > 1 else ''}"
