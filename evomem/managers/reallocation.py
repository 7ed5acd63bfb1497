"""Manager: the same scorer under another allocation; its numbers, protected ends and other options stay."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from evomem.errors import ConfigError
from evomem.files.strict_json import to_json
from evomem.managers.allocation.base import Allocation, build_allocation
from evomem.managers.allocation.lukv import LUKV
from evomem.managers.allocation.over_layers import Uniform
from evomem.managers.allocation.probed import measured_buffers
from evomem.managers.base import MemoryManager, retype
from evomem.modes import outside_inference_mode
from evomem.spec import format_call, name_of, parse_call


@dataclass(frozen=True)
class Reallocated:
    """A manager's scorer under another allocation.

    Attributes
    ----------
    manager : with the other allocation; the manager itself if it has that one already.
    before, after : the old and the new allocation, as `evomem.managers.build_allocation` reads them.
    dropped : numbers of the old allocation, which the new one has no use for: how many, by name.
    initial : numbers of the new allocation that a search would give: how many, by name. They have their first values.
    equal : whether all of these have one value, which gives equal shares.
    """

    manager: MemoryManager
    before: str
    after: str
    dropped: Mapping[str, int] = field(default_factory=dict)
    initial: Mapping[str, int] = field(default_factory=dict)
    equal: bool = False

    @property
    def same(self) -> bool:
        """Whether the manager has had this allocation already; then its numbers stay too."""
        return self.before == self.after

    def loss(self, name: str) -> str:
        """Return what a user must know of the manager called ``name``: the numbers that are left out; "" if none."""
        if not self.dropped:
            return ""
        return f"{name}: its numbers for {self.before} have no part under another allocation: {_counts(self.dropped)}"

    def doubt(self, name: str) -> str:
        """Return what a user must know of the result called ``name``: numbers that were never searched; "" if none."""
        if not self.initial:
            return ""
        equal = "all equal, so they share equally" if self.equal else "as a search begins"
        return f"{name}: its numbers were not searched, they are {equal}: {_counts(self.initial)}"


def _counts(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count} number{'s' * (count > 1)})" for name, count in numbers.items())


def name_with_allocation(name: str, spec: str) -> str:
    """Return what a manager of a name is called under another allocation: ``demo(allocation=lava)``.

    A name that is a spec becomes the spec with that option: ``snapkv(window=64, allocation=lava)``.
    """
    spec = spec.strip()
    if re.fullmatch(r"[\w.-]+\(.+\)", name):
        try:
            call = parse_call(name, "manager", "", positional=None)
            others = {key: value for key, value in call.options.items() if key != "allocation"}
            name = format_call(call.name, others)
        except ConfigError:  # a name that only looks like a spec
            others = {}
        if others:
            return f"{name[:-1]}, allocation={spec})"
    return f"{name}(allocation={spec})"


def reallocate(manager: MemoryManager, spec: str) -> Reallocated:
    """Return a manager's scorer under another allocation, ready to decide, and what that changes.

    >>> from evomem.managers import build
    >>> reallocate(build("snapkv(window=4)"), "pyramid(beta=8)").manager.allocation
    Pyramid(beta=8.0)

    Parameters
    ----------
    spec : an allocation such as ``lava`` or ``probe_shares(power=0.5)``.

    Raises
    ------
    ConfigError : the spec is none, needs curves that are measured under a ranking (``lukv``), or the manager takes no
        other allocation; `UnknownNameError` for an unknown name.
    """
    if not isinstance(spec, str):
        raise ConfigError(f"allocation: {spec!r} is no text; write for example 'lava' or 'pyramid(beta=20)'")
    unmeasured = (
        f"allocation {LUKV.name!r}: its curves are measured under the very ranking that fills the slots; measure them "
        "with `evomem allocate RUN_OR_PLUGIN -m MODEL -t TASK --out FOLDER`, and use the plug-in FOLDER"
    )
    if name_of(spec) == LUKV.name and not isinstance(manager.allocation, LUKV):
        raise ConfigError(unmeasured)
    scorer(manager)  # refuses what takes no other allocation, also for the one that it has
    given = build_allocation(spec)
    if given.describe() == manager.allocation.describe():
        return Reallocated(manager, written(given), written(given))
    if isinstance(given, LUKV):
        raise ConfigError(unmeasured)
    return change_between(manager, with_allocation(manager, given.describe()))


def change_between(manager: MemoryManager, other: MemoryManager) -> Reallocated:
    """Return what differs between a manager and what `with_allocation` made of it.

    All learned numbers of the new allocation count as ``initial``.
    """
    scores = scorer(manager).state_dict().keys()
    left = scores | measured_buffers(manager)  # probes are a model's, and no search's
    initial = {name: value for name, value in other.named_parameters() if name not in scores}
    return Reallocated(
        other,
        written(manager.allocation),
        written(other.allocation),
        dropped={name: value.numel() for name, value in manager.state_dict().items() if name not in left},
        initial={name: value.numel() for name, value in initial.items()},
        equal=all(_equal(value) for value in initial.values()),
    )


def _equal(numbers: Tensor) -> bool:
    return bool((numbers == numbers.flatten()[0]).all())


def written(allocation: Allocation) -> str:
    """Return an allocation as a text that `build_allocation` reads, options at their defaults left out."""
    try:
        return format_call(allocation.name, allocation.options.model_dump(exclude_defaults=True))
    except ConfigError:  # an option of another package that no text can say
        return str(to_json(allocation.describe()))


def scorer(manager: MemoryManager) -> MemoryManager:
    """Return a new manager of the same options under ``uniform``: what it has of tensors is the scorer's.

    Raises
    ------
    ConfigError : how the budget is shared out is part of the manager's method.
    """
    fixed = (
        f"manager {manager.name!r}: how it shares out its budget ({manager.allocation.name}) is part of the method, so "
        "it takes no other allocation; give its scorer alone, e.g. snapkv or keydiff"
    )
    try:
        plain = _rebuilt(manager, "uniform")
    except ConfigError as error:
        raise ConfigError(f"{fixed}. ({error})") from None
    if not isinstance(plain.allocation, Uniform):
        raise ConfigError(fixed)
    return plain


def with_allocation(manager: MemoryManager, allocation: str | Mapping[str, Any]) -> MemoryManager:
    """Return a manager that scores as this one, to the bit, and shares out its budget otherwise.

    Numbers of the old allocation are left behind, those of the new one have their first values. Nothing is refused for
    want of numbers; `reallocate` does that.

    Raises
    ------
    ConfigError : how the budget is shared out is part of the manager's method, or another part of it depends on that.
    """
    with outside_inference_mode():
        names = scorer(manager).state_dict().keys()
        other = _rebuilt(manager, allocation)
        state, new = manager.state_dict(), other.state_dict()
        for name in names:
            if name not in state or name not in new or state[name].shape != new[name].shape:
                raise ConfigError(
                    f"manager {manager.name!r}: {name} depends on its allocation; build another manager, and search "
                    "for its numbers"
                )
        retype(other, {name: (state if name in names else new)[name].dtype for name in new})
        other.load_state_dict({name: state[name] for name in names}, strict=False)
        device = next((tensor.device for tensor in state.values()), torch.device("cpu"))
        return other.to(device).requires_grad_(False)


def _rebuilt(manager: MemoryManager, allocation: str | Mapping[str, Any]) -> MemoryManager:
    with outside_inference_mode(), torch.random.fork_rng(devices=[]):
        return type(manager)(**{**manager.options.model_dump(), "allocation": allocation})
