"""Driver: the two things that a driver gets: a stage when it begins, and a generation's fitness."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from evomem.drivers.common import Array
from evomem.errors import ConfigError

if TYPE_CHECKING:
    from evomem.drivers.estimators import Rollouts

Part = Literal["per_head", "costs", "rollouts"]
"""What a driver can learn from besides the values, by the names of `Fitness`."""


@dataclass(frozen=True)
class Stage:
    """A stage of the search, as a driver sees it when it begins.

    Attributes
    ----------
    begin, end : generations that it covers, by the driver's own count; 0 and 0: not known.
    per_head : its objective gives every KV head a fitness.
    exact : its objective has an exact gradient.
    """

    begin: int = 0
    end: int = 0
    per_head: bool = False
    exact: bool = False


@dataclass(frozen=True)
class Fitness:
    """The measured fitness of a generation: all that a driver may learn from.

    Attributes
    ----------
    values : (candidates,) float64, larger is better; NaN or infinite: no result.
    per_head : (candidates, layers * kv_heads) the same of every KV head by itself; None: the objective has none.
    costs : (candidates,) measured bytes, smaller is better; None: not measured.
    rollouts : a group of rollouts per sample and budget, for a policy gradient; empty: none were measured.
    """

    values: Array
    per_head: Array | None = None
    costs: Array | None = None
    rollouts: tuple[Rollouts, ...] = ()

    def check(self, driver: str, count: int) -> None:
        """Raise `ConfigError` unless every part that is there is of ``count`` candidates."""
        shapes = {"fitness values": np.shape(self.values)}
        if self.costs is not None:
            shapes["costs"] = np.shape(self.costs)
        for group in self.rollouts:
            shapes["rollouts in a group"] = np.shape(group.rewards)[:1]
            if shapes["rollouts in a group"] != (count,):
                break
        for part, shape in shapes.items():
            if shape != (count,):
                raise ConfigError(f"driver {driver!r}: {count} {part} are expected, this has shape {shape}")
        heads = self.per_head
        if heads is not None and (np.ndim(heads) != 2 or len(heads) != count):
            raise ConfigError(
                f"driver {driver!r}: fitness per head of {count} candidates is expected, this has shape "
                f"{np.shape(heads)}"
            )

    def has(self, part: Part) -> bool:
        """Return whether a part was measured."""
        return bool(self.rollouts) if part == "rollouts" else getattr(self, part) is not None
