"""Manager: what becomes of an allocation that is given to a manager that has one of its own."""

from __future__ import annotations

from evomem.errors import ConfigError
from evomem.managers.allocation.base import Allocation, LayerAllocation
from evomem.managers.allocation.over_heads import AcrossHeads
from evomem.managers.allocation.over_layers import Uniform


def settle(option: Allocation | None, built_in: Allocation, manager: str) -> Allocation:
    """Return the allocation of a manager that has one ``built_in`` and whose ``option`` may name another.

    ``across_heads`` shares out what the manager's own allocation gives a layer. Two allocations that do the same job
    are refused.
    """
    if option is None:
        return built_in
    if isinstance(built_in, Uniform):
        return option
    if isinstance(option, AcrossHeads) and isinstance(option.layers, Uniform) and isinstance(built_in, LayerAllocation):
        return option.over(built_in)
    raise ConfigError(
        f"manager {manager!r}: allocation: {option.name!r} does the same job as "
        f"{getattr(built_in, 'name', 'its own')!r}, which the manager has by itself; leave the option out, or give it "
        "to the scorer alone, e.g. snapkv(allocation=...)"
    )
