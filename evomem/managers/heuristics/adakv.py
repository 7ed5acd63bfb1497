"""Manager: any ranking manager, with the layer's slots shared out among its heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator
from torch import Tensor

from evomem.errors import ConfigError
from evomem.managers.base import ManagerOptions, MemoryManager, register
from evomem.managers.build import build
from evomem.managers.selection import AcrossHeads, Selection, TopN
from evomem.memory.view import LayerView


class AdaKVOptions(ManagerOptions):
    """Options of `AdaKV`; budget and schedule are given here and not to the inner manager."""

    inner: dict[str, Any] = Field(
        default="snapkv",
        validate_default=True,
        description='manager that scores, e.g. "keydiff" or "snapkv(window=64)"',
    )
    safeguard: float = Field(default=0.2, ge=0, le=1, description="share of the budget that every head is sure of")

    @field_validator("inner", mode="before")
    @classmethod
    def _describe(cls, inner: Any) -> dict[str, Any]:
        """Turn any spec into the full description, so that a saved experiment does not depend on defaults."""
        if not isinstance(inner, str | Mapping):
            raise ValueError('give the inner manager as a name or spec, e.g. "snapkv(window=64)"')
        manager = build(inner)
        for option in ("budget", "every"):
            # Compared with the default, because a description names every option.
            if getattr(manager.options, option) != type(manager.options).model_fields[option].default:
                raise ValueError(f"{option} belongs to adakv, not to the manager inside it")
        return manager.describe()


@register("adakv")
class AdaKV(MemoryManager):
    """Shares the layer's slots among its heads by another manager's scores (AdaKV, Feng et al., arXiv 2407.11550).

    ``adakv(snapkv)`` keeps as many slots a layer as ``snapkv`` would, and protects the same tokens; a head may get more
    or fewer of them, but at least ⌊safeguard n⌋. Raises `ConfigError` for an inner manager that does not rank to a
    budget (``full``, thresholds, another ``adakv``).
    """

    Options = AdaKVOptions
    options: AdaKVOptions
    inner: MemoryManager

    @property
    def observes(self) -> frozenset[str]:
        """What the inner manager observes."""
        return self.inner.observes

    def make_selection(self) -> Selection:
        """Return one ranking over the heads, with the inner manager's budget and protected tokens."""
        self.inner = build(self.options.inner, budget=self.options.budget)
        selection = self.inner.selection
        if not isinstance(selection, TopN):
            raise ConfigError(
                f"manager 'adakv': inner: {self.inner.name!r} does not rank its slots to a budget per head, "
                "so there is nothing to share; use one that does, e.g. adakv(snapkv)"
            )
        return AcrossHeads(selection, self.options.safeguard)

    def score(self, view: LayerView) -> Tensor:
        """Return the inner manager's scores: (batch, kv_heads, slots)."""
        return self.inner.score(view)

    def admit(self, view: LayerView) -> Tensor | None:
        """Return what the inner manager says."""
        return self.inner.admit(view)

    def decay(self, view: LayerView) -> Tensor | None:
        """Return what the inner manager says."""
        return self.inner.decay(view)
