"""Plug-in: what its provenance says when its manager got another allocation after the search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomem.managers.reallocation import Reallocated, name_with_allocation

FIELD = "reallocated"
"""Of a provenance: a list of what was replaced, the latest last."""
_OF_THE_OLD = ("scores", "comparison", "sentences", "transfer", "front", "allocated")
"""Fields of what was measured of the manager as it was, or solved for it."""


def reallocated_provenance(provenance: Mapping[str, Any], change: Reallocated) -> dict[str, Any]:
    """Return the provenance of a manager under another allocation.

    What the search was stays; what was measured of the manager under its old allocation is left out, because it is not
    true of this one. The field ``reallocated`` gets ``before`` and ``after`` (the allocations as texts), ``dropped``
    (numbers that are left out) and ``initial`` (numbers that were never searched): how many, by name.
    """
    kept = {key: value for key, value in provenance.items() if key not in _OF_THE_OLD}
    if isinstance(name := kept.get("experiment"), str) and name:
        kept["experiment"] = name_with_allocation(name, change.after)
    earlier = kept.get(FIELD)
    entry = {
        "before": change.before,
        "after": change.after,
        "dropped": dict(change.dropped),
        "initial": dict(change.initial),
    }
    return {**kept, FIELD: [*(earlier if isinstance(earlier, list) else []), entry]}
