"""CLI: what a command may write over."""

from __future__ import annotations

from pathlib import Path

from evomem import plugins
from evomem.errors import ConfigError
from evomem.files.reading import user_path


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Raise `ConfigError` if a folder holds a plug-in that must not be replaced."""
    if plugins.is_plugin(user_path(folder)) and not overwrite:
        raise ConfigError(f"{folder}: holds a plug-in already; choose another folder, or replace it with --overwrite")
