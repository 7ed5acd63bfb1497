"""Plug-in: the schema of its ``config.json``: which fields it has, version by version.

| field | what it says |
|---|---|
| ``schema_version`` | the version that the file is written in; `SCHEMA_VERSION` when evomem writes it |
| ``manager`` | registry name of the manager's kind |
| ``options`` | all its options, defaults included |
| ``allocation`` | how layers and heads share the budget: name and options; from version 2 on |
| ``observes``, ``schedule``, ``budget`` | what follows from the options, for others; checked when loaded |

What an allocation knows of a model's heads (`ProbedAllocation`) is no option: it lies in ``model.safetensors``, as
``allocation.probes``, ``allocation.layer_heads`` and ``allocation.measured_on`` (the model's fingerprint). So does what
curves were measured with (`MeasuredAllocation`): ``allocation.measured_under`` and ``allocation.measured_on``, zeros
where nobody knows; a file of before, without the two, is read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from evomem.errors import PluginError
from evomem.files.strict_json import shown
from evomem.managers import MemoryManager

SCHEMA_VERSION = 2
"""What `save` writes; every version up to this one is read."""
_NAME = re.compile(r"[A-Za-z_][\w.-]{0,63}", re.ASCII)
_FIELDS = {
    1: ("schema_version", "manager", "options", "observes", "schedule", "budget"),
    2: ("schema_version", "manager", "options", "allocation", "observes", "schedule", "budget"),
}
"""By version."""
IMPLIED = ("allocation", "budget", "schedule", "observes")
"""Fields that repeat what the options say, for readers that have no evomem; they must not contradict it."""


def describe_manager(manager: MemoryManager) -> dict[str, Any]:
    """Return the content of ``config.json``."""
    described = manager.describe()
    return {
        "schema_version": SCHEMA_VERSION,
        "manager": described["name"],
        "options": described["options"],
        "allocation": manager.allocation.describe(),
        "observes": sorted(manager.observes),
        "schedule": {"every": manager.schedule.every},
        "budget": manager.options.budget,
    }


def parse_config(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return a plug-in's configuration; raise `PluginError` if a field is missing, unknown or of another kind."""
    if "schema_version" not in config:
        raise PluginError(f"{path}: schema_version: is missing; this is not the configuration of a plug-in")
    version = config["schema_version"]
    if not isinstance(version, int) or isinstance(version, bool) or version not in _FIELDS:
        raise PluginError(
            f"{path}: schema_version: {shown(version)} is unknown; this evomem reads versions 1 to {SCHEMA_VERSION}. "
            "Update evomem, or save the plug-in again"
        )
    known = _FIELDS[version]
    for name in known:
        if name not in config:
            raise PluginError(f"{path}: {name}: is missing")
    for name in config:
        if name not in known:
            raise PluginError(f"{path}: {shown(name)}: is an unknown field; known are {', '.join(known)}")
    for name, kind in (("manager", str), ("options", dict), ("observes", list), ("schedule", dict)):
        if not isinstance(config[name], kind):
            raise PluginError(f"{path}: {name}: {shown(config[name])} is not a {kind.__name__}")
    if not _NAME.fullmatch(config["manager"]):
        raise PluginError(f"{path}: manager: {shown(config['manager'])} is no name of a manager")
    return config
