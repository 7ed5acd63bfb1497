"""Manager: SnapKV's scores under budgets that fall from layer to layer."""

from __future__ import annotations

from pydantic import Field

from evomem.bounds import LARGE
from evomem.managers.base import register
from evomem.managers.heuristics.snapkv import SnapKV, SnapKVOptions
from evomem.managers.selection import PyramidTopN


class PyramidKVOptions(SnapKVOptions):
    """Options of `PyramidKV`."""

    beta: float = Field(
        default=20.0, ge=1, le=LARGE, description="steepness: the last layer gets about 1/beta of the budget"
    )


@register("pyramidkv")
class PyramidKV(SnapKV):
    """Keeps what SnapKV keeps, with more slots in low layers (PyramidKV, Cai et al., arXiv 2406.02069).

    ``budget`` is the mean over the layers and is met exactly, see `pyramid_budget`; the kept window is part of it.
    """

    Options = PyramidKVOptions
    options: PyramidKVOptions

    def make_selection(self) -> PyramidTopN:
        """Return the best b_l of layer l with the window, at most half of b_l, protected."""
        o = self.options
        return PyramidTopN(o.budget, recent=o.window, recent_share=0.5, beta=o.beta, observed=o.window)
