"""Manager: from a text or a description to a manager."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomem.errors import ConfigError
from evomem.managers.base import MemoryManager, managers
from evomem.modes import outside_inference_mode
from evomem.spec import parse_call

EXAMPLES = "'snapkv', 'snapkv(window=64)' or 'adakv(keydiff, safeguard=0.3)'"
"""How managers are written, for messages."""


def build(spec: str | Mapping[str, Any], **options: Any) -> MemoryManager:
    """Build a manager from what a user wrote, or from `MemoryManager.describe`.

    >>> build("snapkv(window=64)", budget=128).describe() == build("snapkv", window=64, budget=128).describe()
    True

    Parameters
    ----------
    spec :
        ``"snapkv"``, ``"snapkv(window=64)"``, ``"adakv(keydiff, safeguard=0.3)"``, or
        ``{"name": ..., "options": {...}}``. How texts are written: `evomem.spec`; a value without a name is the
        inner manager.
    **options :
        Override those of the spec.

    Raises
    ------
    ConfigError : the text cannot be read, or an option is wrong; `UnknownNameError` for a manager that does not exist.
    """
    described = parse(spec) if isinstance(spec, str) else _checked(spec)
    with outside_inference_mode():  # its parameters may be trained later
        manager: MemoryManager = managers.get(described["name"])(**{**described["options"], **options})
    return manager


def parse(text: str) -> dict[str, Any]:
    """Read a manager written as text into ``{"name": ..., "options": {...}}``; see `build`."""
    spec = parse_call(text, "manager", EXAMPLES)
    return {"name": spec.name, "options": spec.options}


def names() -> list[str]:
    """Return the names of all managers, sorted."""
    return managers.names()


def summary(name: str) -> str:
    """Return the first line of a manager's docstring: what ``evomem list managers`` shows."""
    lines = (managers.get(name).__doc__ or "").strip().splitlines()
    return lines[0] if lines else ""


def _checked(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return a description with both its keys, or say what is wrong with it."""
    if not isinstance(spec, Mapping):
        raise ConfigError(f"manager: {spec!r} is neither a text like 'snapkv(window=64)' nor a mapping with a name")
    unknown = set(spec) - {"name", "options"}
    options = spec.get("options") or {}
    if unknown or not isinstance(spec.get("name"), str) or not isinstance(options, Mapping):
        raise ConfigError(
            f'manager: {dict(spec)!r} is not of the form {{"name": "snapkv", "options": {{"window": 64}}}}'
        )
    return {"name": spec["name"], "options": dict(options)}
