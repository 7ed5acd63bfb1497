"""Task: a stream of requests to a memory, as arrays and as text, and the base of the tasks made of streams.

A stream is a sample like any other: its context is the requests, one word each, its answer what a memory that forgets
nothing would give back. So splits, seeds, digests, journals and comparisons are those of every task. Who feeds a memory
takes the arrays, from `StreamTask.stream`.

=======  =====================================================================================================
word     request
=======  =====================================================================================================
``7``    item 7 is read; then its pair is there to be stored: a cache that misses fetches it
``7=9``  item 7 has value 9 from here on, and the pair is there to be stored; nothing is asked
``7?``   item 7 is read, and the memory alone can answer
=======  =====================================================================================================
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from random import Random
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from evomem.bounds import LENGTH
from evomem.errors import TaskError
from evomem.tasks.base import Sample, Split, Tokenizer
from evomem.tasks.generated import GeneratedTask, TaskOptions
from evomem.tasks.splits import draw_of_split

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Vectors = NDArray[np.float32]

NOTHING = "-"
"""What stands in an output where the memory gave nothing back."""
ITEMS = 10**6
"""Items of a stream, at most."""
DIMENSIONS = 4096


@dataclass(frozen=True, eq=False)
class Stream:
    """Requests in their order, and the vectors that a memory sees of them.

    Attributes
    ----------
    ids : (requests,) int64, the item that each request names.
    values : (requests,) int64, the item's value at that moment: what is stored, and what a read should give back.
    reads : (requests,) bool, the item's value is asked for, before anything is stored.
    writes : (requests,) bool, the pair of item and value is there to be stored.
    filler : (requests,) bool, nobody will ever ask for this item: for measurements, no memory sees it.
    keys : (requests, dim) fp32 of unit norm, what the memory sees of the item.
    value_vectors : (values, dim) fp32 of unit norm, what the memory sees of every value.
    """

    ids: Ints
    values: Ints
    reads: Bools
    writes: Bools
    filler: Bools
    keys: Vectors
    value_vectors: Vectors

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def distinct_rate(self) -> float:
        """Different items that are asked for, per request: how much there is to remember."""
        return len(np.unique(self.ids[self.reads])) / len(self)


@dataclass(frozen=True, eq=False)
class Requests:
    """Requests as they are drawn, without vectors; see `Stream`.

    Attributes
    ----------
    items : different items that may be asked for: 0, 1, …; items with higher numbers are filler.
    """

    ids: Ints
    values: Ints
    reads: Bools
    writes: Bools
    items: int

    @classmethod
    def of_cache(cls, ids: Ints, items: int) -> Requests:
        """Return requests that read and may store, an item's value being its number; filler is only stored."""
        asked = ids < items
        return cls(ids, ids, asked, np.ones_like(asked), items)

    @cached_property
    def words(self) -> list[str]:
        """The requests as words; see the table of this module."""
        reads, writes = self.reads.tolist(), self.writes.tolist()
        return [
            (f"{item}" if write else f"{item}?") if read else f"{item}={value}"
            for item, value, read, write in zip(self.ids.tolist(), self.values.tolist(), reads, writes, strict=True)
        ]

    @property
    def answers(self) -> list[str]:
        """What a memory that forgets nothing gives back at every read."""
        return [str(value) for value in self.values[self.reads].tolist()]


def parse_requests(text: str, items: int) -> Requests:
    """Return the requests that a text of words stands for.

    Parameters
    ----------
    items : see `Requests`.

    Raises
    ------
    TaskError : a word is no request, or an item is read that has no value yet.
    """
    words = text.split()
    latest: dict[int, int] = {}
    ids, values = [], []
    for number, word in enumerate(words):
        name, written, value = word.partition("=")
        digits = name.removesuffix("?")
        if not digits.isdecimal() or (written and not (value.isdecimal() and digits == name)):
            raise TaskError(f"request {number} is {word!r}; write 7 (read and store), 7=9 (store), or 7? (read)")
        item = int(digits)
        if written:
            latest[item] = int(value)
        elif digits == name:
            latest.setdefault(item, item)
        if item not in latest:
            raise TaskError(f"request {number}, {word!r}, reads an item that has no value yet; store one before")
        ids.append(item)
        values.append(latest[item])
    reads = np.array(["=" not in word for word in words], bool)
    writes = np.array(["?" not in word for word in words], bool)
    return Requests(np.array(ids, np.int64), np.array(values, np.int64), reads, writes, items)


def normed(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return vectors (..., dim) divided by their norms."""
    lengths: NDArray[np.float64] = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / lengths


class StreamOptions(TaskOptions):
    """Options that every stream has."""

    length: int = Field(default=2000, ge=1, le=LENGTH, description="requests of a stream")
    keys: int = Field(default=400, ge=2, le=ITEMS, description="different items that may be asked for")
    dim: int = Field(default=32, ge=2, le=DIMENSIONS, description="numbers of a key vector, and of a value vector")
    noise: float = Field(
        default=0.0, ge=0, le=10, description="norm of what is added to a read's key vector of norm 1, at random"
    )


Opts = TypeVar("Opts", bound=StreamOptions)


class StreamTask(GeneratedTask[Opts], Generic[Opts]):
    """Base of the tasks made of streams; a subclass draws the `requests`.

    A sample's score is the share of reads that were answered with the item's newest value: the hit rate of a cache.
    """

    divides: ClassVar[str] = "the requests of a stream; key and value vectors are drawn anew for each"
    immaterial: ClassVar[frozenset[str]] = GeneratedTask.immaterial | {"dim", "noise"}

    def __init__(self, tokenizer: Tokenizer, length: int | None = None, **options: Any) -> None:
        super().__init__(tokenizer, length, **options)
        self.uniform_chance = 1 / self.options.keys

    @abstractmethod
    def requests(self, draw: np.random.Generator) -> Requests:
        """Return the requests of one stream, at least one of them a read."""

    def item_vectors(self, draw: np.random.Generator, items: int, numbers: Ints) -> NDArray[np.float64]:
        """Return vectors of unit norm (len(numbers), dim) of the items with these numbers, all different.

        Parameters
        ----------
        items : that may be asked for; higher numbers are filler.
        """
        return normed(draw.standard_normal((len(numbers), self.options.dim)))

    def sample(self, random: Random, split: Split, number: int, identity: str) -> Sample:
        """Return one sample; its answer is what a memory that forgets nothing gives back."""
        draw = np.random.default_rng(random.getrandbits(128))
        requests = draw_of_split(
            lambda: self.requests(draw), lambda requests: " ".join(requests.words), split, "streams"
        )
        answers = requests.answers
        return Sample(
            id=identity,
            context=" ".join(requests.words),
            question=" ->",
            answer="".join(f" {answer}" for answer in answers),
            references=tuple(answers),
            max_new_tokens=len(answers),
            meta={"items": requests.items, "reads": len(answers)},
        )

    def stream(self, sample: Sample) -> Stream:
        """Return the arrays of one of this task's samples: a pure function of its text and this task's options."""
        text = sample.context
        requests = parse_requests(text, int(sample.meta["items"]))
        draw = np.random.default_rng(int.from_bytes(blake2b(text.encode(), digest_size=16).digest(), "big"))
        numbers, which = np.unique(requests.ids, return_inverse=True)
        keys = self.item_vectors(draw, requests.items, numbers)[which]
        if self.options.noise > 0:
            added = draw.standard_normal(keys.shape) * (self.options.noise / np.sqrt(self.options.dim))
            keys = np.where(requests.reads[:, None], keys + added, keys)
        vectors = normed(draw.standard_normal((int(requests.values.max()) + 1, self.options.dim)))
        return Stream(
            ids=requests.ids,
            values=requests.values,
            reads=requests.reads,
            writes=requests.writes,
            filler=requests.ids >= requests.items,
            keys=normed(keys).astype(np.float32),
            value_vectors=vectors.astype(np.float32),
        )

    def score(self, sample: Sample, output: str) -> float:
        """Return the share of reads whose word in the output, in their order, is the item's value."""
        right = sum(said == answer for said, answer in zip(output.split(), sample.references, strict=False))
        return right / len(sample.references)
