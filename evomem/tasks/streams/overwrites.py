"""Task: keys whose values change: the newest counts, and what a memory holds of an older one misleads."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from evomem.errors import ConfigError
from evomem.tasks.base import Tokenizer, tasks
from evomem.tasks.streams.base import ITEMS, Bools, Ints, Requests, StreamOptions, StreamTask
from evomem.tasks.streams.drawing import zipf


class OverwritesOptions(StreamOptions):
    """Options of keys that change."""

    keys: int = Field(default=48, ge=2, le=ITEMS, description="different items")
    reads: float = Field(default=0.5, gt=0, lt=1, description="share of requests that read, in the mean")
    exponent: float = Field(default=0.7, ge=0, le=8, description="of Zipf's law of the reads; 0: all as likely")
    write_exponent: float = Field(default=0.7, ge=0, le=8, description="of the writes, whose popular items are others")


def newest(ids: Ints, writes: Bools) -> Ints:
    """Return the number of the request that wrote each request's item last, itself included; -1: none has."""
    order = np.argsort(ids, kind="stable")
    written = np.where(writes[order], order, -1)
    first = np.r_[True, ids[order][1:] != ids[order][:-1]]
    # Within an item's run the newest write is a running maximum; runs are lifted above each other to be told apart.
    lift = np.cumsum(first) * (len(ids) + 1)
    latest = np.maximum.accumulate(written + lift) - lift
    result = np.empty_like(ids)
    result[order] = latest
    return result


@tasks.register("key_overwrites")
class KeyOverwrites(StreamTask[Any]):
    """Writes ``7=9`` and reads ``7?``: every write gives its item a new value, and a read wants the newest.

    What a memory has lost cannot be fetched again. Which items are written often and which are read often has nothing
    to do with each other.
    """

    name: ClassVar[str] = "key_overwrites"
    Options = OverwritesOptions

    def __init__(self, tokenizer: Tokenizer, length: int | None = None, **options: Any) -> None:
        super().__init__(tokenizer, length, **options)
        if self.options.length < 2:
            raise ConfigError(
                f"task {self.name}: one request cannot both write and read; ask for a length of 2 or more"
            )

    def requests(self, draw: np.random.Generator) -> Requests:
        """Return the requests of one stream; an item's first request writes it, and the last request reads."""
        options, length = self.options, self.options.length
        count = np.full(length, options.keys)
        read_items = draw.permutation(options.keys)[zipf(draw, options.exponent, count)]
        written_items = draw.permutation(options.keys)[zipf(draw, options.write_exponent, count)]
        reads = draw.random(length) < options.reads
        ids = np.where(reads, read_items, written_items)
        if length > 1:
            ids[-1], reads[-1] = ids[draw.integers(length - 1)], True
        reads[np.unique(ids, return_index=True)[1]] = False
        values = (np.cumsum(~reads) - 1)[newest(ids, ~reads)]
        return Requests(ids, values, reads, ~reads, options.keys)
