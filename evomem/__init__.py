"""evomem: memory managers for frozen language models, found by search.

What is most used has its name here: ``evomem.load("plug-in")``, ``evomem.build("snapkv", budget=128)``,
``evomem.load_model("smollm2-135m")``. Each name imports its module on first use, so that ``import evomem`` is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from evomem.installing import warn_of_namesake

if TYPE_CHECKING:
    from evomem.errors import EvomemError
    from evomem.managers import ManagerOptions, MemoryManager, build, register
    from evomem.memory import Decision, LayerView, SlotCache, attached, layer_view
    from evomem.models import LoadedModel
    from evomem.models import load as load_model
    from evomem.plugins import load, load_cache, save, save_cache
    from evomem.report.comparing import compare
    from evomem.report.evolving import evolve
    from evomem.runs import Run, load_experiment, open_run

__all__ = [
    "Decision",
    "EvomemError",
    "LayerView",
    "LoadedModel",
    "ManagerOptions",
    "MemoryManager",
    "Run",
    "SlotCache",
    "__version__",
    "attached",
    "build",
    "compare",
    "evolve",
    "layer_view",
    "load",
    "load_cache",
    "load_experiment",
    "load_model",
    "open_run",
    "register",
    "save",
    "save_cache",
]

__version__ = "0.1.0"

_HOMES = {
    "evomem.errors": ("EvomemError",),
    "evomem.managers": ("ManagerOptions", "MemoryManager", "build", "register"),
    "evomem.memory": ("Decision", "LayerView", "SlotCache", "attached", "layer_view"),
    "evomem.models": ("LoadedModel", "load_model"),
    "evomem.plugins": ("load", "load_cache", "save", "save_cache"),
    "evomem.report.comparing": ("compare",),
    "evomem.report.evolving": ("evolve",),
    "evomem.runs": ("Run", "load_experiment", "open_run"),
}
"""The package that each name comes from; the same names are above for type checkers."""

_NAMES_THERE = {"load_model": "load"}
"""Where a name is another one in its package."""

warn_of_namesake()


def __getattr__(name: str) -> Any:
    """Import a name's package on first use (PEP 562)."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), _NAMES_THERE.get(name, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
