"""Report: a subject beside itself under other allocations: the same scorer, its budget shared out otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from evomem.evaluation.compare import NamedManager
from evomem.managers.reallocation import name_with_allocation, reallocate
from evomem.report.subjects import Subject, require_distinct


def variants_of(subjects: Sequence[Subject], specs: Sequence[str], say: Callable[[str], None]) -> list[NamedManager]:
    """Return the first subject's scorer under each of some allocations that differ from its own and from each other.

    Parameters
    ----------
    subjects : all of a comparison; no variant may have the name of one of them.
    specs : allocations such as ``lava`` or ``probe_shares(power=0.5)``.
    say : told, once each, of allocations that are left out because their rows are there already, of numbers that are
        left out, and of numbers that were never searched.

    Raises
    ------
    ConfigError : see `evomem.managers.reallocation.reallocate`; or two would have the same name.
    """
    subject = subjects[0]
    variants: list[NamedManager] = []
    remarks: list[str] = []
    measured: dict[str, str] = {}  # names of what is measured, by allocation
    for spec in specs:
        made = reallocate(subject.manager, spec)
        name = name_with_allocation(subject.name, spec)
        there = subject.name if made.same else measured.setdefault(made.after, name)
        if there != name:
            remarks.append(f"{name}: is {there}, whose allocation is {made.after}; it is measured once")
            continue
        variants.append(NamedManager(name, made.manager))
        remarks += [made.loss(subject.name), made.doubt(name)]
    require_distinct([one.name for one in subjects] + [one.name for one in variants])
    for remark in filter(None, dict.fromkeys(remarks)):
        say(remark)
    return variants
