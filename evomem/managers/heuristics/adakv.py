"""Manager: any ranking manager, with the layer's slots shared out among its heads."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from evomem.errors import ConfigError
from evomem.managers.allocation import AcrossHeads, Allocation, LayerAllocation
from evomem.managers.around import ManagerAround, describe_inner
from evomem.managers.base import register
from evomem.managers.options import ManagerOptions
from evomem.managers.selection import Ends


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
        """Turn any spec into the full description."""
        return describe_inner(inner, "adakv", ("budget", "every"))


@register("adakv")
class AdaKV(ManagerAround):
    """Shares the layer's slots among its heads by another manager's scores (AdaKV, Feng et al., arXiv 2407.11550).

    Another name for ``snapkv(allocation=across_heads)``: ``adakv(snapkv)`` keeps as many slots a layer as ``snapkv``
    would, and protects the same tokens; a head may get more or fewer of them, but at least ⌊safeguard n⌋. What a
    head cannot hold goes to the layer's other heads, unless the safeguard is 1, with which nothing is shared. What the
    inner manager gives its layers, a pyramid or learned shares, stays as it is. Raises `ConfigError` for an inner
    manager that does not rank to a budget (``full``, thresholds), or shares it among heads already (``adakv``).
    """

    Options = AdaKVOptions
    options: AdaKVOptions

    def make_ends(self) -> Ends:
        """Return what the inner manager protects; it is built here, with the budget, and the layers' allocation."""
        given = self.options.allocation
        if given and self.options.inner["options"].get("allocation"):
            raise ConfigError("manager 'adakv': allocation: adakv and the manager inside it have one; give one of them")
        inner = self.build_inner(
            self.options.inner, budget=self.options.budget, **({"allocation": given} if given else {})
        )
        return inner.ends

    def make_allocation(self) -> Allocation:
        """Return one ranking over the heads, of the slots that the inner manager's allocation gives the layer."""
        layers = self.inner.allocation
        if self.options.allocation and (not isinstance(layers, LayerAllocation) or isinstance(layers, AcrossHeads)):
            raise ConfigError(
                f"manager 'adakv': allocation: {layers.name!r} says how many slots a head gets, and so does adakv; "
                f"give it to the scorer alone, e.g. {self.inner.name}(allocation={layers.name})"
            )
        if not isinstance(layers, LayerAllocation) or isinstance(layers, AcrossHeads):
            raise ConfigError(
                f"manager 'adakv': inner: {self.inner.name!r} does not rank its slots to a budget per head, "
                "so there is nothing to share; use one that does, e.g. adakv(snapkv)"
            )
        self.require_no_statistics()
        across = AcrossHeads(layers=layers.describe(), safeguard=self.options.safeguard)
        across.take_shares()  # what is learned is the inner manager's, and `shares` gives it
        return across
