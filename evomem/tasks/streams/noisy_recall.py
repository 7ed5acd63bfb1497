"""Task: pairs amid noise, asked for at the end by keys that are blurred."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from evomem.bounds import LENGTH
from evomem.errors import ConfigError
from evomem.tasks.base import Tokenizer, tasks
from evomem.tasks.streams.base import ITEMS, Ints, Requests, StreamOptions, StreamTask, normed


class NoisyRecallOptions(StreamOptions):
    """Options of recall amid noise."""

    length: int = Field(default=256, ge=1, le=LENGTH, description="requests of a stream, the reads at the end included")
    keys: int = Field(default=16, ge=2, le=ITEMS, description="pairs that are asked for, each once")
    repeats: int = Field(default=1, ge=1, le=1000, description="how often such a pair is stated, with the same value")
    noise: float = Field(
        default=0.5, ge=0, le=10, description="norm of what is added to a read's key vector of norm 1, at random"
    )
    marker: float = Field(
        default=0.5, ge=0, lt=1, description="cosine of the key vectors of two pairs of noise, in the mean"
    )


@tasks.register("noisy_recall")
class NoisyRecall(StreamTask[Any]):
    """Pairs are written at random places among pairs of noise, none of which comes twice; then each is asked for."""

    name: ClassVar[str] = "noisy_recall"
    Options = NoisyRecallOptions

    def __init__(self, tokenizer: Tokenizer, length: int | None = None, **options: Any) -> None:
        super().__init__(tokenizer, length, **options)
        needed = self.options.keys * (self.options.repeats + 1)
        if self.options.length < needed:
            raise ConfigError(
                f"task {self.name}: {self.options.keys} keys, {self.options.repeats} times stated and once asked for, "
                f"are more than {self.options.length} requests; ask for a length of at least {needed}"
            )

    def requests(self, draw: np.random.Generator) -> Requests:
        """Return the requests of one stream: writes in any order, then one read of every pair."""
        options = self.options
        written = options.length - options.keys
        ids = np.arange(written) - options.keys * (options.repeats - 1)
        ids[: options.keys * options.repeats] = np.tile(np.arange(options.keys), options.repeats)
        ids = np.r_[draw.permutation(ids), draw.permutation(options.keys)]
        reads = np.arange(options.length) >= written
        return Requests(ids, ids, reads, ~reads, options.keys)

    def item_vectors(self, draw: np.random.Generator, items: int, numbers: Ints) -> NDArray[np.float64]:
        """Return vectors of items; those of noise share a direction, the more so the larger ``marker``."""
        drawn, marker = super().item_vectors(draw, items, numbers), self.options.marker
        centre = super().item_vectors(draw, items, np.zeros(1, np.int64))
        mixed = np.sqrt(marker) * centre + np.sqrt(1 - marker) * drawn
        return normed(np.where((numbers < items)[:, None], drawn, mixed))
