"""Manager: allocations that share out a budget over the layers."""

from __future__ import annotations

from typing import Annotated, Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from evomem.bounds import LARGE, TOKENS, UNITS
from evomem.errors import ConfigError
from evomem.managers.allocation.arithmetic import depth_limits, pyramid_budget, slots_at_most, water_fill
from evomem.managers.allocation.base import AllocationOptions, LayerAllocation, register_allocation
from evomem.managers.selection import Ends, tokens_read
from evomem.memory.view import LayerView


@register_allocation("uniform")
class Uniform(LayerAllocation):
    """Gives every head of every layer the same number of slots."""

    def layer_limit(self, view: LayerView, mean: Tensor, ends: Ends, shares: Tensor | None = None) -> Tensor:
        """Return the mean."""
        return mean


class PyramidOptions(AllocationOptions):
    """Options of `Pyramid`."""

    beta: float = Field(
        default=20.0, ge=1, le=LARGE, description="steepness: the last layer gets about 1/beta of the budget"
    )
    window: int | None = Field(
        default=None,
        ge=0,
        le=TOKENS,
        description="tokens of the observed window; none: the newest that the scorer keeps",
    )


@register_allocation("pyramid")
class Pyramid(LayerAllocation):
    """Gives low layers more slots, falling linearly with depth (PyramidKV, Cai et al., arXiv 2406.02069)."""

    Options = PyramidOptions
    options: PyramidOptions
    by_depth = True

    def layer_limit(self, view: LayerView, mean: Tensor, ends: Ends, shares: Tensor | None = None) -> Tensor:
        """Return b_l of `pyramid_budget`; where bounds bind, see `water_fill`."""
        if ends.floor <= 1 and view.evicted is None:  # no bound binds, so this layer's part is all that is needed
            return self._part(view.layer, view, mean, ends)
        return self.layer_limits(view, mean, ends, shares)[view.layer]

    def layer_limits(self, view: LayerView, mean: Tensor, ends: Ends, shares: Tensor | None = None) -> Tensor:
        """Return b_l of every layer: (layers, batch, 1, 1)."""
        parts = torch.stack([self._part(layer, view, mean, ends) for layer in range(view.layers)])
        return water_fill(parts, parts.double(), mean, ends.floor, slots_at_most(view))

    def _part(self, layer: int, view: LayerView, mean: Tensor, ends: Ends) -> Tensor:
        window = self.options.window
        if window is None:
            window = ends.recent if isinstance(ends.recent, int) else 0
        return pyramid_budget(mean, tokens_read(view), layer, view.layers, self.options.beta, window)


class DepthSharesOptions(AllocationOptions):
    """Options of `DepthShares`; exactly one of the two is given."""

    points: int | None = Field(
        default=None, ge=1, le=UNITS, description="points of depth at which log-shares are learned, all 0 at first"
    )
    log_shares: tuple[Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)], ...] | None = Field(
        default=None, min_length=1, max_length=UNITS, description="log-shares at equally spaced points of depth, fixed"
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.points is None) == (self.log_shares is None):
            raise ValueError("give either points (learned) or log_shares (fixed)")
        return self


@register_allocation("depth_shares")
class DepthShares(LayerAllocation):
    """Gives layer l a share proportional to exp(g(depth)), g piecewise linear through log-shares, learned or fixed.

    At least what the protected ends need and one slot more, and at most what was read, see `water_fill`.
    """

    Options = DepthSharesOptions
    options: DepthSharesOptions
    log_shares: Tensor | None
    by_depth = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.options.points is not None:
            self.log_shares = nn.Parameter(torch.zeros(self.options.points, dtype=torch.float32))
        else:
            fixed = torch.tensor(self.options.log_shares, dtype=torch.float32)
            self.register_buffer("log_shares", fixed, persistent=False)

    def shares(self) -> Tensor | None:
        """Return the log-shares: (1, points of depth); None after `take_shares`."""
        return None if self.log_shares is None else self.log_shares.float()[None]

    def take_shares(self) -> nn.Parameter | None:
        """Hand the learned log-shares over; fixed ones stay."""
        if not isinstance(self.log_shares, nn.Parameter):
            return None
        taken = self.log_shares
        del self.log_shares
        self.log_shares = None
        return taken

    def layer_limit(self, view: LayerView, mean: Tensor, ends: Ends, shares: Tensor | None = None) -> Tensor:
        """Return the layer's share."""
        return self.layer_limits(view, mean, ends, shares)[view.layer]

    def layer_limits(self, view: LayerView, mean: Tensor, ends: Ends, shares: Tensor | None = None) -> Tensor:
        """Return every layer's share, rounded by the running sum over the layers: (layers, batch, 1, 1)."""
        logs = self.shares() if shares is None else shares
        if logs is None:
            raise ConfigError("allocation 'depth_shares': its log-shares were handed over, and nobody gives them")
        return depth_limits(logs, view, mean, ends.floor)
