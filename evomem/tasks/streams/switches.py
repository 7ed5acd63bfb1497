"""Task: contexts that are left and come back, each with items of its own."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from evomem.bounds import LENGTH
from evomem.tasks.base import tasks
from evomem.tasks.streams.base import ITEMS, Ints
from evomem.tasks.streams.drawing import topic_items, topic_path
from evomem.tasks.streams.zipf import TopicOptions, TopicStreams


class SwitchesOptions(TopicOptions):
    """Options of contexts that switch."""

    keys: int = Field(default=240, ge=2, le=ITEMS, description="different items that may be asked for, in all contexts")
    topics: int = Field(default=6, ge=1, le=ITEMS, description="contexts; every item belongs to one of them")
    dwell: float = Field(default=60.0, ge=1, le=LENGTH, description="requests until the context changes, in the mean")
    exponent: float = Field(default=0.5, ge=0, le=8, description="of Zipf's law; 0: every item is as likely")
    similarity: float = Field(
        default=0.7, ge=0, lt=1, description="cosine of the key vectors of two items of one context, in the mean"
    )


@tasks.register("context_switches")
class ContextSwitches(TopicStreams):
    """Requests to a cache, all from the present context; what is kept of the others serves when they come back."""

    name: ClassVar[str] = "context_switches"
    Options = SwitchesOptions

    def drawn_items(self, draw: np.random.Generator, keys: int) -> Ints:
        """Return the item of every request before filler is put in."""
        options = self.options
        path = topic_path(draw, options.length, options.topics, options.dwell)
        return topic_items(draw, options.exponent, path, keys, options.topics)
