"""Model: the user's cache folder, checksums that are computed once, and writes that survive a crash."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from evomem.files.atomic import replacing, sync
from evomem.files.reading import user_path

VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")
"""Fields of a ``config.json`` that say who wrote it or how it is run, not which model it is."""

WEIGHTS = "*.safetensors"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""Where the weights are: in one file, or in those that an index names."""


def cache_root() -> Path:
    """Return evomem's cache folder: ``$EVOMEM_CACHE``, else ``$XDG_CACHE_HOME/evomem``, else ``~/.cache/evomem``."""
    folder = os.environ.get("EVOMEM_CACHE")
    if folder:
        return user_path(folder)
    base = os.environ.get("XDG_CACHE_HOME")
    return (user_path(base) if base else Path.home() / ".cache") / "evomem"


def sha256(path: Path) -> str:
    """Return the hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp(path: Path) -> list[int]:
    """Return ``[size in bytes, modification time in ns]``: what a cheap check compares."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def cached_sha256(path: Path) -> str:
    """Return `sha256` of ``path``, remembered under the cache folder until the file changes.

    A change shows in the file's size, its modification time, or its inode's change time, which cannot be set back.
    """
    real = path.resolve()
    memo = cache_root() / "sha256" / (hashlib.sha256(str(real).encode()).hexdigest()[:32] + ".json")
    status = real.stat()
    now = [*stamp(real), status.st_ctime_ns, status.st_ino]
    # A memo that cannot be read or written only costs time.
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(memo.read_text())
        if known["stamp"] == now:
            return str(known["sha256"])
    value = sha256(real)
    with suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_json(memo, {"path": str(real), "stamp": now, "sha256": value})
    return value


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, sort_keys=True))


def fsync_tree(folder: Path) -> None:
    """Flush every file of ``folder``, and the folder itself, to disk."""
    for path in [*sorted(folder.rglob("*")), folder]:
        sync(path)


def folder_digest(folder: Path) -> str:
    """Return the identity of a model folder: SHA-256 over its configuration and the hashes of its weight files.

    Only what decides the numbers counts: the fields of `VOLATILE` and the tokenizer do not. Cheap from the second call
    on, because hashes of weight files are remembered (`cached_sha256`).
    """
    config = json.loads((folder / "config.json").read_text())
    identity = {
        "config": {key: value for key, value in config.items() if key not in VOLATILE},
        "weights": {path.name: cached_sha256(path) for path in sorted(folder.glob(WEIGHTS))},
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
