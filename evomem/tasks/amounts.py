"""Task: how much a sample states, where that differs between samples of equal length."""

from __future__ import annotations

from collections.abc import Sequence

from evomem.errors import ConfigError


def amounts(task: str, option: str, fewest: int | None, most: int) -> tuple[int, ...]:
    """Return the amounts that samples draw from, each equally often: fewest, twice as many, …, most.

    Doubling, because few and many are told apart by their ratio: of all numbers from 1 to 32 half are above 16.

    Parameters
    ----------
    option : the name of ``fewest``, for the message.
    fewest : None: all samples have ``most``.

    Raises
    ------
    ConfigError : the fewest are more than the most.
    """
    if fewest is None:
        return (most,)
    if fewest > most:
        raise ConfigError(f"task {task}: {option} {fewest} is more than the {most} that a sample has at most")
    counts = []
    while fewest < most:
        counts.append(fewest)
        fewest *= 2
    return (*counts, most)


def chance(counts: Sequence[int]) -> float:
    """Return how often a guess among as many as were stated is right, mean over the amounts."""
    return sum(1 / count for count in counts) / len(counts)
