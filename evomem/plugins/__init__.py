"""Plug-in: how a winner leaves, a folder of four plain files that anyone can load; and a context that was read."""

from evomem.plugins.folder import Plugin, is_plugin, load, read, save
from evomem.plugins.saved_cache import load_cache, save_cache
from evomem.plugins.schema import SCHEMA_VERSION
from evomem.plugins.untrusted import FILES, LIMITS, PICTURE_COUNT

__all__ = [
    "FILES",
    "LIMITS",
    "PICTURE_COUNT",
    "SCHEMA_VERSION",
    "Plugin",
    "is_plugin",
    "load",
    "load_cache",
    "read",
    "save",
    "save_cache",
]
