"""Plug-in: fetching one from the hub, its four files and nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from evomem.errors import PluginError

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SECONDS = 5.0
"""How long to wait for the hub before calling it unreachable."""


def download(name: str, files: Sequence[str]) -> Path:
    """Return the local folder of a hub repository, from the hub's local cache or from the network.

    Raises
    ------
    PluginError : the name is no repository, there is none, or the hub cannot be reached.
    """
    if not REPOSITORY.fullmatch(name):
        raise PluginError(f"plug-in {name!r}: no such folder, and not a repository on the hub (owner/name) either")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        local = Path(snapshot_download(name, allow_patterns=list(files), local_files_only=True))
        if (local / files[0]).is_file():
            return local
    except (LocalEntryNotFoundError, ValueError):
        pass
    try:
        # One question with a deadline, so that a machine without network hears so in seconds.
        HfApi().model_info(name, timeout=SECONDS)
        return Path(snapshot_download(name, allow_patterns=list(files), etag_timeout=SECONDS))
    except RepositoryNotFoundError as error:
        raise PluginError(f"plug-in {name!r}: no such folder, and the hub has no such repository") from error
    except Exception as error:  # the hub client lets its transport's own exceptions through; their classes change
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PluginError(
            f"plug-in {name!r}: no such folder, not in the local hub cache, and the hub cannot be reached ({reason}). "
            "Give a local folder, or fetch it on a machine with network"
        ) from error
