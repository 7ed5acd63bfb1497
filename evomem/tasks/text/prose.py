"""Task: the prose that haystacks and continuations are cut from, divided over the splits."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path

from evomem.errors import TaskError
from evomem.files.reading import read_text, user_path
from evomem.files.strict_json import shown
from evomem.tasks.base import Split
from evomem.tasks.splits import deal

REGIONS = 10
"""Contiguous stretches that a text is cut into before they are dealt out, so that each split reads like prose."""

_ESSAY = 64 << 20
"""Bytes of a text file, at most."""
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])|(?<=[\u3002\uff01\uff1f])\s*")  # and of Chinese and Japanese
_PROSE = re.compile(r"[A-Z](?:[A-Za-z ,;:()'/-]|\d(?![.\d]*\w)|\.(?=[a-z ]))*[.!?]")


@dataclass(frozen=True)
class Prose:
    """Sentences of one split, in reading order.

    Attributes
    ----------
    sentences : distinct sentences; none of them occurs in another split of the same text.
    fingerprint : eight hexadecimal digits of the whole text. The built-in text comes with the Python interpreter, so
        another Python version may have another fingerprint: samples are comparable only where it is equal.
    """

    sentences: tuple[str, ...]
    fingerprint: str


def load_prose(split: Split, path: str | None = None) -> Prose:
    """Return the prose of a split: of the text file at ``path``, or the built-in technical English.

    Raises
    ------
    TaskError : the file cannot be read as UTF-8 text or has fewer than 50 distinct sentences.
    """
    if path is None:
        return _divide(_builtin(), "the built-in text")[split]
    try:
        source = str(user_path(path).resolve())
    except (OSError, ValueError, RuntimeError) as error:  # a NUL, a user that is none, links in a circle
        raise TaskError(f"essay: {shown(path)}: {error}") from None
    return _load_file(source)[split]


@cache
def _load_file(path: str) -> dict[Split, Prose]:
    text = read_text(Path(path), _ESSAY, TaskError)
    sentences: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        sentences.extend(_SENTENCE_END.split(" ".join(paragraph.split())))
    return _divide(tuple(sentence for sentence in sentences if sentence), f"essay {path}")


@cache
def _builtin() -> tuple[str, ...]:
    """Sentences of the language reference that ships with Python (``pydoc_data.topics``), without code and markup."""
    from pydoc_data.topics import topics

    sentences: list[str] = []
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            text = re.sub(r"(?<=[a-z])-\s*\n\s*(?=[a-z])", "-", paragraph.strip())
            text = re.sub(r"^(?:\[\d+\]|\d+\.|\*)\s+", "", " ".join(text.split()))
            text = text.replace("**", "").replace('"', "").replace("\u2019", "'").replace("\u2013", "-")
            text = re.sub(r"\*(\w[^*]*)\*", r"\1", text)
            sentences.extend(sentence for sentence in _SENTENCE_END.split(text) if _reads_like_prose(sentence))
    return tuple(sentences)


def _reads_like_prose(sentence: str) -> bool:
    words = sentence.split()
    return (
        6 <= len(words) <= 45
        and _PROSE.fullmatch(sentence) is not None
        and sentence.count("(") == sentence.count(")")
        and not any(len(word) > 18 or word.startswith(":") for word in words)
        and words[0] not in {"See", "Added", "Changed", "Deprecated", "New"}
        and "section" not in words
    )


@cache
def _divide(sentences: tuple[str, ...], where: str) -> dict[Split, Prose]:
    distinct = list(dict.fromkeys(sentences))
    if len(distinct) < 5 * REGIONS:
        raise TaskError(
            f"{where}: {len(distinct)} distinct sentences are too few to divide over three splits; "
            f"give a text with at least {5 * REGIONS}"
        )
    fingerprint = blake2b("\n".join(distinct).encode(), digest_size=4).hexdigest()
    return {split: Prose(share, fingerprint) for split, share in deal(distinct, REGIONS).items()}
