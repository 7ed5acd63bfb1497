"""Task: requests by Zipf's law whose topic drifts, with scans in between and filler: what a cache sees."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from evomem.bounds import LENGTH
from evomem.errors import ConfigError
from evomem.tasks.amounts import amounts, chance
from evomem.tasks.base import Tokenizer, tasks
from evomem.tasks.streams.base import ITEMS, Ints, Requests, StreamOptions, StreamTask, normed
from evomem.tasks.streams.drawing import scans, topic_items, topic_path, zipf


class TopicOptions(StreamOptions):
    """Options of the streams whose items have topics."""

    exponent: float = Field(default=1.2, ge=0, le=8, description="of Zipf's law; 0: every item is as likely")
    topics: int = Field(default=8, ge=1, le=ITEMS, description="groups of items; a request's topic is drawn from one")
    dwell: float = Field(default=100.0, ge=1, le=LENGTH, description="requests until the topic changes, in the mean")
    similarity: float = Field(
        default=0.5, ge=0, lt=1, description="cosine of the key vectors of two items of one topic, in the mean"
    )
    filler: float = Field(default=0.0, ge=0, lt=1, description="share of requests that nobody will ever ask for")
    filler_keys: int = Field(default=1, ge=1, le=ITEMS, description="different items among the filler")
    fewest_keys: int | None = Field(
        default=None,
        ge=2,
        le=ITEMS,
        description="streams have so many items, twice as many, ..., keys, each equally often; none: all have keys",
    )


class TopicStreams(StreamTask[Any]):
    """What streams with topics share: similar keys within a topic, filler, and few or many items at equal length."""

    def __init__(self, tokenizer: Tokenizer, length: int | None = None, **options: Any) -> None:
        super().__init__(tokenizer, length, **options)
        chosen = self.options
        self._amounts = amounts(self.name, "fewest_keys", chosen.fewest_keys, chosen.keys)
        self.uniform_chance = chance(self._amounts)
        if min(self._amounts) < chosen.topics:
            raise ConfigError(
                f"task {self.name}: {min(self._amounts)} keys are too few for {chosen.topics} topics; every topic has "
                "at least one, so ask for fewer topics, or for more keys"
            )

    def drawn_items(self, draw: np.random.Generator, keys: int) -> Ints:
        """Return the item of every request before filler is put in."""
        raise NotImplementedError

    def requests(self, draw: np.random.Generator) -> Requests:
        """Return the requests of one stream; the last one is never filler."""
        options = self.options
        keys = self._amounts[int(draw.integers(len(self._amounts)))]
        ids = self.drawn_items(draw, keys)
        if options.filler:
            is_filler = draw.random(options.length) < options.filler
            is_filler[-1] = False
            ids = np.where(is_filler, keys + draw.integers(options.filler_keys, size=options.length), ids)
        return Requests.of_cache(ids, keys)

    def item_vectors(self, draw: np.random.Generator, items: int, numbers: Ints) -> NDArray[np.float64]:
        """Return vectors of items; those of one topic share a direction, and filler has a direction of its own."""
        topics, similarity = self.options.topics, self.options.similarity
        drawn = super().item_vectors(draw, items, numbers)
        centres = super().item_vectors(draw, items, np.arange(topics + 1))
        topic = np.where(numbers < items, numbers % topics, topics)
        return normed(np.sqrt(similarity) * centres[topic] + np.sqrt(1 - similarity) * drawn)


class ZipfOptions(TopicOptions):
    """Options of requests by Zipf's law."""

    focus: float = Field(default=0.6, ge=0, le=1, description="share of requests that are of the present topic")
    scans: float = Field(default=0.2, ge=0, le=1, description="share of requests that belong to scans over all items")
    scan_length: int = Field(default=40, ge=1, le=LENGTH, description="requests of a scan, one item after another")


@tasks.register("zipf")
class Zipf(TopicStreams):
    """Requests to a cache: some items are always popular, others while their topic lasts; scans sweep over all.

    A request is of the present topic with probability ``focus``, and of all items otherwise; both by Zipf's law. Every
    item that is asked for can be stored, so that the score is a cache's hit rate.
    """

    name: ClassVar[str] = "zipf"
    Options = ZipfOptions

    def drawn_items(self, draw: np.random.Generator, keys: int) -> Ints:
        """Return the item of every request before filler is put in."""
        options, length = self.options, self.options.length
        path = topic_path(draw, length, options.topics, options.dwell)
        of_topic = topic_items(draw, options.exponent, path, keys, options.topics)
        of_all = draw.permutation(keys)[zipf(draw, options.exponent, np.full(length, keys))]
        ids = np.where(draw.random(length) < options.focus, of_topic, of_all)
        scanned, swept = scans(draw, length, keys, options.scans, options.scan_length)
        return np.where(scanned, swept, ids)
