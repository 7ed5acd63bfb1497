"""Search space: a start from a plug-in: its numbers, under the options of the space; a warning of those that differ.

A search begins with the numbers of a plug-in and decides by the options of its space. Where an option differs, the
first candidate is not the plug-in; where numbers would multiply something else, nothing of it would be left.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomem.errors import ConfigError
from evomem.managers.allocation import allocations, build_allocation
from evomem.managers.allocation.probed import measured_buffers
from evomem.managers.base import MemoryManager, managers
from evomem.managers.reallocation import written
from evomem.registry import Registry
from evomem.search_space.option_paths import is_described
from evomem.spec import format_call

logger = logging.getLogger("evomem")

_ALLOCATION = "allocation"
_BUDGET = "budget"


@dataclass(frozen=True)
class Difference:
    """An option that differs between two managers of a kind.

    Attributes
    ----------
    path : of the option, as `option_value` reads it.
    before, after : its values.
    of_parameters : with another value the same numbers mean something else.
    """

    path: str
    before: Any
    after: Any
    of_parameters: bool

    def __str__(self) -> str:
        """Show ``path: before -> after``."""
        return f"{self.path}: {_shown(self.before)} -> {_shown(self.after)}"


def take_numbers(template: MemoryManager, manager: MemoryManager, folder: Path, searched: Collection[str]) -> None:
    """Give a space's manager the numbers of a plug-in, and warn of options that differ.

    Parameters
    ----------
    manager : of the plug-in in ``folder``, of the template's kind.
    searched : paths of options that the space lets vary; what the plug-in has there is no matter of the template.

    Raises
    ------
    ConfigError : the plug-in has other tensors, or its numbers mean something else than the space's.
    """
    differences = list(differing_options(manager, template, searched))
    try:
        template.load_state_dict(manager.state_dict())
    except RuntimeError as error:
        names = manager.state_dict().keys() ^ template.state_dict().keys()
        hint = allocation_hint(min(names), template) if names else ""
        said = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"search space: start.plugin: {folder} has other tensors than the space's manager{hint} ({said})"
        ) from None
    if others := [str(one) for one in differences if one.of_parameters]:
        raise ConfigError(
            f"search space: start.plugin: the numbers of {folder} mean something else in this space: "
            f"{'; '.join(others)} (the plug-in's -> the space's); set space.manager.options to the plug-in's, or start "
            "from another one"
        )
    if differences:
        logger.warning(
            f"search space: start.plugin: the search takes the numbers of {folder} and the options of the space, so "
            f"that it does not begin with the plug-in itself: {'; '.join(map(str, differences))} (the plug-in's -> the "
            "space's); to keep the plug-in's, set space.manager.options"
        )


def differing_options(
    before: MemoryManager, after: MemoryManager, searched: Collection[str] = ()
) -> Iterator[Difference]:
    """Return the options in which two managers of a kind differ, but for the budget and those that are searched."""
    pair = (before, after)
    options = [manager.options.model_dump() for manager in pair]
    # A number stands for an allocation, none for the manager's own. Where both have their own, other options say it.
    if any(one[_ALLOCATION] for one in options):
        for manager, one in zip(pair, options, strict=True):
            spec = one[_ALLOCATION]
            one[_ALLOCATION] = (build_allocation(spec) if spec else manager.allocation).describe()
    else:
        options[0][_ALLOCATION] = options[1][_ALLOCATION]
    yield from _compare("", options[0], options[1], managers, after, {_BUDGET, *searched})


def _compare(
    prefix: str,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    registry: Registry[Any],
    template: MemoryManager,
    left_out: Collection[str],
    owner: Any = None,
) -> Iterator[Difference]:
    owner = owner or type(template)
    for name, value in after.items():
        path = f"{prefix}{name}"
        other: Any = before.get(name)
        if path in left_out or _plain(other) == _plain(value):
            continue
        if not (is_described(value) and is_described(other)):
            yield Difference(path, other, value, name in owner.parameter_options)
            continue
        inner = allocations if registry is allocations or name == _ALLOCATION else managers
        if other["name"] != value["name"]:
            yield Difference(path, other, value, _has_numbers(template, path))
            continue
        kind: Any = inner.get(value["name"])
        yield from _compare(f"{path}.", other["options"], value["options"], inner, template, left_out, kind)


def _has_numbers(template: MemoryManager, path: str) -> bool:
    """Whether the part of a manager that a path describes has numbers, which another kind of part reads otherwise."""
    names = template.state_dict().keys() - measured_buffers(template)
    if path.split(".")[0] != _ALLOCATION:
        return any(not name.startswith(f"{_ALLOCATION}.") for name in names)
    return template.shares() is not None or any(name.startswith(f"{path}.") for name in names)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    if is_described(value):
        try:
            return format_call(value["name"], value["options"])
        except ConfigError:  # an option of another package that no text can say
            pass
    return str(_plain(value))


def allocation_hint(name: str, template: MemoryManager) -> str:
    """Return what to do about a tensor that only one of two managers has; nothing if no allocation's."""
    if not name.startswith(f"{_ALLOCATION}.") and name != "log_shares":
        return ""
    spec = written(template.allocation)
    return f': its allocation is another; begin with its scorer, evomem export SOURCE FOLDER --allocation "{spec}"'
