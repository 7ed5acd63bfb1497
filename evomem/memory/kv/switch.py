"""Memory: which configurations are switched to the managed attention, what they ran before, and what runs inside."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from torch import nn

from evomem.errors import CacheError
from evomem.memory.kv.versions import argument

if TYPE_CHECKING:
    from evomem.memory.kv.cache import SlotCache

_lock = threading.RLock()


@dataclass
class Usage:
    """What ran inside one `attached` block.

    Attributes
    ----------
    managed : forward passes over a cache of slots.
    unmanaged : forward passes of a decoder without one.
    caches : the caches of slots that exist still.
    """

    managed: int = 0
    unmanaged: int = 0
    caches: WeakSet[SlotCache] = field(default_factory=WeakSet)

    def require_managed(self) -> None:
        """Raise `CacheError` when a decoder ran and no cache of slots read anything."""
        if self.unmanaged and not self.managed:
            raise CacheError(
                f"the model ran {self.unmanaged} times inside `with manager.attach(model) as cache:` and no cache of "
                f"evomem's read anything, so nothing was managed: pass {argument()} to the model, or to "
                "generate; if it was passed, something between took it away (PEFT's prefix tuning brings a cache of "
                "its own). To run a model without a manager, leave the block"
            )

    def require_finished(self) -> None:
        """Raise `CacheError` when a manager that decides about all layers could not; see `SlotCache`."""
        for cache in list(self.caches):
            cache.require_finished()


@dataclass
class _Switch:
    """A configuration that is switched: the open blocks, and what to put back when the last one is left."""

    config: Any
    previous: str | None
    blocks: list[Usage] = field(default_factory=list)


_switched: dict[int, _Switch] = {}
"""By configuration object and not by model: there transformers keeps the switch, and models may share one."""


def previous_implementation(module: nn.Module) -> str:
    """Return the attention implementation that the model of an attention module runs when it is not attached."""
    switch = _switched.get(id(getattr(module, "config", None)))
    return (switch.previous if switch is not None else None) or "eager"


def is_switched(config: Any) -> bool:
    """Tell whether a block is open in which a configuration is switched."""
    return id(config) in _switched


def implementation_of(config: Any) -> str | None:
    """Return the attention implementation that a configuration names outside of every block."""
    switch = _switched.get(id(config))
    named: str | None = config._attn_implementation_internal
    return named if switch is None else switch.previous


class _Counting(threading.local):
    """Whether forward passes of this thread count as use."""

    off = False


_counting = _Counting()


@contextmanager
def uncounted() -> Iterator[None]:
    """Run the model on our own account: passes of this thread inside the block count for no open block."""
    before, _counting.off = _counting.off, True
    try:
        yield
    finally:
        _counting.off = before


def note_pass(module: nn.Module, cache: SlotCache | None) -> None:
    """Note for the open blocks that a decoder runs, with or without a cache of slots; ``module`` is its attention."""
    if _counting.off:
        return
    switch = _switched.get(id(getattr(module, "config", None)))
    for usage in switch.blocks if switch is not None else ():
        if cache is None:
            usage.unmanaged += 1
        else:
            usage.managed += 1
            usage.caches.add(cache)


@contextmanager
def switched(configurations: Iterable[Any], implementation: str) -> Iterator[Usage]:
    """Let configurations name ``implementation`` inside the block; the last block that is left puts back what was."""
    configurations, usage = list(configurations), Usage()
    with _lock:
        for config in configurations:
            switch = _switched.setdefault(id(config), _Switch(config, config._attn_implementation_internal))
            switch.blocks.append(usage)
            config._attn_implementation_internal = implementation
    try:
        yield usage
    finally:
        with _lock:
            for config in configurations:
                switch = _switched[id(config)]
                # By identity: two blocks in which the same ran are equal.
                switch.blocks = [block for block in switch.blocks if block is not usage]
                if not switch.blocks:
                    config._attn_implementation_internal = _switched.pop(id(config)).previous
