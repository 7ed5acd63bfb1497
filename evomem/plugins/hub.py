"""Plug-in: from and to the hub: its four files, the card's pictures, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from evomem.errors import EvomemError, PluginError

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
SECONDS = 5.0
"""How long to wait for the hub before calling it unreachable."""


def download(
    name: str,
    limits: Mapping[str, int],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """Return the local folder of a hub repository: its newest state, or what the local hub cache has without network.

    Parameters
    ----------
    name : ``owner/name``.
    limits : patterns of the files to fetch, and the most bytes that such a file may have.
    revision : branch, tag or commit; None: the main branch.
    token, cache_dir, force_download, local_files_only : as everywhere in ``huggingface_hub``.

    Raises
    ------
    PluginError : the name is no repository, there is none, a file is too large, or the hub cannot be reached.
    """
    if not REPOSITORY.fullmatch(name) or ".." in name:
        raise PluginError(f"plug-in {name!r}: no such folder, and not a repository on the hub (owner/name) either")
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    wanted: dict[str, Any] = {
        "allow_patterns": list(limits), "revision": revision, "cache_dir": cache_dir, "token": token
    }  # fmt: skip
    reason = "it was not asked"
    if not local_files_only and not constants.HF_HUB_OFFLINE:
        try:
            # One question with a deadline, so that a machine without network hears so in seconds.
            info = HfApi().model_info(name, revision=revision, timeout=SECONDS, files_metadata=True, token=token)
            _check_sizes(name, {file.rfilename: file.size or 0 for file in info.siblings or ()}, limits)
            return Path(snapshot_download(name, **wanted, etag_timeout=SECONDS, force_download=force_download))
        except GatedRepoError as error:
            raise PluginError(f"plug-in {name!r}: its owner must give you access first: {_line(error)}") from error
        except RevisionNotFoundError as error:
            raise PluginError(f"plug-in {name!r}: the hub has no revision {revision!r} of it") from error
        except RepositoryNotFoundError as error:
            raise PluginError(f"plug-in {name!r}: no such folder, and the hub has no such repository") from error
        except EvomemError:
            raise
        except Exception as error:  # the hub client lets its transport's own exceptions through; their classes change
            reason = f"cannot be reached ({_line(error)})"
    try:
        return Path(snapshot_download(name, **wanted, local_files_only=True))
    except Exception as error:
        raise PluginError(
            f"plug-in {name!r}: no such folder, not in the local hub cache, and the hub: {reason}. "
            "Give a local folder, or fetch it on a machine with network"
        ) from error


@contextmanager
def telling(name: str) -> Iterator[None]:
    """Turn what the hub client raises while it pushes to repository ``name`` into a `PluginError`."""
    try:
        yield
    except EvomemError:
        raise
    except Exception as error:  # as above
        raise PluginError(
            f"plug-in {name!r}: cannot be pushed: {_line(error)}. A repository is owner/name; "
            "log in with `hf auth login`, or give token="
        ) from error


def _check_sizes(name: str, sizes: Mapping[str, int], limits: Mapping[str, int]) -> None:
    for file, size in sizes.items():
        for pattern, limit in limits.items():
            if fnmatch(file, pattern) and size > limit:
                raise PluginError(f"plug-in {name!r}: {file}: {size:,} bytes; a plug-in's has at most {limit:,}")


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
