"""Manager: what becomes of an allocation that is given to a manager that has one of its own."""

from __future__ import annotations

from evomem.errors import ConfigError
from evomem.managers.allocation.base import Allocation, LayerAllocation
from evomem.managers.allocation.over_heads import AcrossHeads
from evomem.managers.allocation.over_layers import Uniform


def settle(given: Allocation | None, own: Allocation, manager: str) -> Allocation:
    """Return the allocation of a manager that has one of its ``own`` and for which another may be ``given``.

    ``across_heads`` shares out what the manager's own allocation gives a layer. Two allocations that do the same job
    are refused.
    """
    if given is None:
        return own
    if isinstance(own, Uniform):
        return given
    if isinstance(given, AcrossHeads) and isinstance(given.layers, Uniform) and isinstance(own, LayerAllocation):
        return given.over(own)
    raise ConfigError(
        f"manager {manager!r}: allocation: {given.name!r} does the same job as {getattr(own, 'name', 'its own')!r}, "
        "which the manager has by itself; leave the option out, or give it to the scorer alone, "
        "e.g. snapkv(allocation=...)"
    )
