"""Task: leaving out the middle or the end of a text that is too long, at the ends of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from evomem.tasks.base import Tokenizer

_SLACK = 8
"""Tokens that may merge where two parts of a text meet: a shortened text has at most so many fewer than its parts."""


def token_ends(tokenizer: Tokenizer, text: str) -> list[int] | None:
    """Return where the tokens of a text end, as indices between its characters, from 0 to its length.

    None where the tokenizer does not tell. A character of several tokens ends with the last of them, so that a cut at
    an end never leaves half a character.
    """
    if not getattr(tokenizer, "is_fast", False):
        return None
    encode: Any = tokenizer
    offsets = encode(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return _rising([int(end) for _, end in offsets], len(text))


def word_ends(text: str) -> list[int]:
    """Return where the words of a text end: before its spaces."""
    return _rising([at for at, letter in enumerate(text) if letter == " "], len(text))


def _rising(ends: Sequence[int], length: int) -> list[int]:
    """Return distinct indices in ascending order, 0 and ``length`` among them."""
    return sorted({0, *(end for end in ends if 0 < end < length), length})


def cut_middle(tokenizer: Tokenizer, text: str, fits: Callable[[str], bool], max_tokens: int) -> str | None:
    """Return a text with as little as possible left out of its middle; None if nothing of it fits.

    Beginning and end stay, both with about as many tokens. Where the tokenizer does not tell where tokens are, words
    are left out, or characters where a word is too long.

    Parameters
    ----------
    fits : whether a text is short enough; the estimate of the tokens only starts the search.
    max_tokens : tokens that a text may have at most.
    """
    ends = token_ends(tokenizer, text)
    for cuts in [ends] if ends is not None else [word_ends(text), list(range(len(text) + 1))]:
        last = len(cuts) - 1

        def shortened(n: int, ends: list[int] = cuts, last: int = last) -> str:
            return text[: ends[(n + 1) // 2]] + text[ends[last - n // 2] :]

        # Of characters more may fit than tokens.
        bound = max_tokens + _SLACK if ends is not None else last
        n = _largest(min(last, bound), lambda n: fits(shortened(n)))
        if n:
            return shortened(n)
    return None


def cut_end(tokenizer: Tokenizer, text: str, fits: Callable[[str], bool], max_tokens: int) -> str | None:
    """Return the longest beginning of a text that fits; None if nothing of it does.

    Parameters as of `cut_middle`.
    """
    cuts = token_ends(tokenizer, text) or list(range(len(text) + 1))
    n = _largest(min(len(cuts) - 1, max_tokens + _SLACK), lambda n: fits(text[: cuts[n]]))
    return text[: cuts[n]] if n else None


def _largest(high: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number up to ``high`` that fits, found by bisection; 0 if none does."""
    if high > 0 and fits(high):
        return high
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
