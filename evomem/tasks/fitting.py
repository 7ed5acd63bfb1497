"""Task: fitting a haystack to a length in tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from evomem.errors import TaskError
from evomem.tasks.base import Tokenizer
from evomem.tasks.encoding import TextEncoder

Rendered = TypeVar("Rendered", contravariant=True)


def count_tokens(tokenizer: Tokenizer, text: str) -> int:
    """Return the number of tokens of a text, without the tokens that a tokenizer adds around it."""
    return len(tokenizer.encode(text, add_special_tokens=False))


class UnitCounts:
    """Token counts of the units of a haystack (sentences, lines), each as it stands after a space or a line break.

    The counts only start the search: what fits is decided by an encoding of the whole sample.

    Attributes
    ----------
    encoder : encodes texts as they are read when they are evaluated.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._counts: dict[str, int] = {}
        self.encoder = TextEncoder(tokenizer)

    def __call__(self, unit: str) -> int:
        """Return the count of one unit, remembered from the first time on."""
        count = self._counts.get(unit)
        if count is None:
            count = self._counts[unit] = count_tokens(self._tokenizer, " " + unit)
        return count

    def following(self, text: str) -> int:
        """Return the count of a text that follows another one, such as an answer."""
        return len(self.encoder.following(text))

    def from_start(self, text: str) -> int:
        """Return the count of a text from its beginning on, with the tokenizer's prefix."""
        return len(self.encoder.beginning(text))


def fit(
    length: int,
    render: Callable[[int], Rendered],
    unit: Callable[[int], str],
    counts: UnitCounts,
    task: str,
    size: Callable[[Rendered], int] | None = None,
) -> int:
    """Return the largest number of units with which a sample has at most ``length`` tokens.

    Parameters
    ----------
    length
        Tokens that the sample may have.
    render
        The whole sample with n units: by default its text (context, question and answer).
    unit
        The n-th unit, counted from 0; there is no last one.
    counts
        Counts units, for the first guess, and whole texts.
    task
        Name for the message.
    size
        Counts the tokens of what ``render`` returns; by default those of a text, the tokenizer's prefix among them.

    Raises
    ------
    TaskError : the sample without any haystack is longer than ``length`` already.
    """
    count: Callable[[Rendered], int] = counts.from_start if size is None else size  # type: ignore[assignment]
    tokens = count(render(0))
    if tokens > length:
        raise TaskError(
            f"task {task}: length {length} is too short, without any haystack the sample has {tokens} tokens; "
            f"ask for a length of at least {tokens}"
        )

    def fits(n: int) -> bool:
        return count(render(n)) <= length

    # The units' own counts land within a unit or two of the answer; from there, widen until it is bracketed, bisect.
    guess = 0
    while (tokens := tokens + max(1, counts(unit(guess)))) <= length:
        guess += 1
    step = 1
    if guess == 0 or fits(guess):
        low, high = guess, guess + 1
        while fits(high):
            low, high, step = high, high + 2 * step, 2 * step
    else:
        low, high = guess - 1, guess
        while low > 0 and not fits(low):
            low, high, step = max(0, low - 2 * step), low, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
