"""Memory: what a cache needs of a manager."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from evomem.memory.observations.base import Wanted
from evomem.memory.observations.repeated_attention import SECOND_READING
from evomem.memory.observations.windows import SOFTMAX_READS
from evomem.memory.view import Decision, LayerView

HAS = frozenset({"queries at positions", SECOND_READING, SOFTMAX_READS})
"""What a KV cache has for observations that need more than attention (`Observation.needs`)."""


class SchedulePolicy(Protocol):
    """When to decide: every so many tokens, or once (None)."""

    @property
    def every(self) -> int | None:
        """Tokens between decisions; None: once after the context."""
        ...


class CachePolicy(Protocol):
    """What the cache needs of a manager."""

    @property
    def observes(self) -> frozenset[str]:
        """Names of the observations to record."""
        ...

    @property
    def schedule(self) -> SchedulePolicy:
        """When to ask for a decision."""
        ...

    def decide(self, view: LayerView) -> Decision:
        """Decide about one layer, as soon as it has read."""
        ...


class ModelPolicy(CachePolicy, Protocol):
    """What the cache needs of a manager that decides about all layers at once, when all have read."""

    @property
    def whole_model(self) -> bool:
        """True: `decide_all` is asked; where it is False or missing, `decide` is."""
        ...

    def decide_all(self, views: Sequence[LayerView]) -> list[Decision]:
        """Decide about all layers, the first first; nothing has left any of them since the last decision."""
        ...


def wanted_of(policy: CachePolicy) -> Wanted:
    """Return what a manager observes of a KV cache.

    Raises
    ------
    ConfigError : there is no such observation, or a KV cache does not have what it is of.
    """
    wanted = Wanted.parse(policy.observes)
    wanted.require("a KV cache", HAS)
    return wanted
