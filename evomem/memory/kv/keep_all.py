"""Memory: a cache policy that keeps everything, for readings of evomem's own."""

from __future__ import annotations

from dataclasses import dataclass

from evomem.memory.view import Decision, LayerView


@dataclass(frozen=True)
class KeepAll:
    """A cache policy that keeps everything.

    Attributes
    ----------
    every : it is asked once, at the end.
    observes : nothing.
    """

    every: int | None = None
    observes: frozenset[str] = frozenset()

    @property
    def schedule(self) -> KeepAll:
        """When it is asked: the policy itself says it."""
        return self

    def decide(self, view: LayerView) -> Decision:
        """Keep everything."""
        return Decision(view.valid)
