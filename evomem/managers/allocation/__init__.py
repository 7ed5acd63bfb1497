"""Manager: allocations, which say how a budget is shared out over layers and heads; one kind of sharing a file.

An allocation that depends on the input is one more file here: a `LayerAllocation` if it looks at one layer's view, a
`ModelAllocation` if at all of them.
"""

from evomem.managers.allocation.across_layers import AcrossLayers
from evomem.managers.allocation.arithmetic import (
    clamped_shares,
    depth_limits,
    interpolated,
    pyramid_budget,
    slots_at_most,
    water_fill,
)
from evomem.managers.allocation.base import (
    Allocation,
    AllocationOptions,
    EmergentAllocation,
    LayerAllocation,
    ModelAllocation,
    allocations,
    build_allocation,
    recorded_for,
    register_allocation,
)
from evomem.managers.allocation.by_distinct_rate import ByDistinctRate
from evomem.managers.allocation.by_effective_writes import ByEffectiveWrites
from evomem.managers.allocation.by_weight import limits_by_weight
from evomem.managers.allocation.cake import Cake
from evomem.managers.allocation.composing import settle
from evomem.managers.allocation.duo import Duo
from evomem.managers.allocation.emergent import Dense, Everything, Threshold
from evomem.managers.allocation.headkv import HeadKV
from evomem.managers.allocation.lava import Lava
from evomem.managers.allocation.layer_budgets import LayerBudgets
from evomem.managers.allocation.lukv import LUKV
from evomem.managers.allocation.over_heads import AcrossHeads
from evomem.managers.allocation.over_layers import DepthShares, Pyramid, Uniform
from evomem.managers.allocation.per_head_shares import PerHeadShares
from evomem.managers.allocation.probe_shares import ProbeShares
from evomem.managers.allocation.probed import ProbedAllocation
from evomem.managers.allocation.probes import PROBES, HeadProbes, head_probes
from evomem.managers.allocation.razor import Razor
from evomem.managers.allocation.slots import Slots

__all__ = [
    "LUKV",
    "PROBES",
    "AcrossHeads",
    "AcrossLayers",
    "Allocation",
    "AllocationOptions",
    "ByDistinctRate",
    "ByEffectiveWrites",
    "Cake",
    "Dense",
    "DepthShares",
    "Duo",
    "EmergentAllocation",
    "Everything",
    "HeadKV",
    "HeadProbes",
    "Lava",
    "LayerAllocation",
    "LayerBudgets",
    "ModelAllocation",
    "PerHeadShares",
    "ProbeShares",
    "ProbedAllocation",
    "Pyramid",
    "Razor",
    "Slots",
    "Threshold",
    "Uniform",
    "allocations",
    "build_allocation",
    "clamped_shares",
    "depth_limits",
    "head_probes",
    "interpolated",
    "limits_by_weight",
    "pyramid_budget",
    "recorded_for",
    "register_allocation",
    "settle",
    "slots_at_most",
    "water_fill",
]
