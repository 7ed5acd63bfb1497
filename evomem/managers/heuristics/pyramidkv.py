"""Manager: SnapKV's scores under budgets that fall from layer to layer."""

from __future__ import annotations

from pydantic import Field

from evomem.bounds import LARGE
from evomem.managers.allocation import Allocation, Pyramid
from evomem.managers.base import register
from evomem.managers.heuristics.snapkv import SnapKV, SnapKVOptions


class PyramidKVOptions(SnapKVOptions):
    """Options of `PyramidKV`."""

    beta: float = Field(
        default=20.0, ge=1, le=LARGE, description="steepness: the last layer gets about 1/beta of the budget"
    )


@register("pyramidkv")
class PyramidKV(SnapKV):
    """Keeps what SnapKV keeps, with more slots in low layers (PyramidKV, Cai et al., arXiv 2406.02069).

    Another name for ``snapkv(allocation=pyramid)``. ``budget`` is the mean over the layers and is met exactly, see
    `pyramid_budget`; the kept window is part of it.
    """

    Options = PyramidKVOptions
    options: PyramidKVOptions

    def built_in_allocation(self) -> Allocation:
        """Return the pyramid, which observes the window that is kept."""
        return Pyramid(beta=self.options.beta)
