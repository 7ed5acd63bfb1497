"""Run: what makes a run the one that it is: its configuration (with the seed), model, and start, by content.

It is written into the journal when the search begins, and into every checkpoint. So neither a journal nor a checkpoint
of another run is taken for this one's, and a start that was exchanged afterwards is noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from evomem.errors import RunError
from evomem.files.reading import read_bytes
from evomem.runs.config import ExperimentConfig
from evomem.runs.folder_reading import FILE
from evomem.runs.journal import Journal, read_journal

_FILES = ("start/provenance.json", "start/state.safetensors", "start/vector.npy")


def identity_of(folder: Path, config: ExperimentConfig) -> dict[str, str]:
    """Return the digests of a run's configuration and of the files that it began with.

    Settings that are at their defaults do not count: a later evomem has more of them. Neither do those that move no
    result and may be others when the run is resumed.
    """
    settings = config.model_dump(mode="json", exclude_defaults=True, exclude={"inputs", "base"})
    digests = {"configuration": _digest(json.dumps(settings, sort_keys=True).encode())}
    for name in _FILES:
        digests[name] = _digest(read_bytes(folder / name, FILE, RunError))
    return digests


def identify(folder: Path, config: ExperimentConfig, journal: Journal) -> dict[str, str]:
    """Return a run's identity; a journal that does not say yet which run it is of says it from now on.

    Raises
    ------
    RunError : the journal is of another run.
    """
    now = identity_of(folder, config)
    events = [r for r in read_journal(journal.path, report=False) if r["kind"] == "event" and r["event"] == "identity"]
    for event in events:
        check_identity(folder, event["files"], now)
    if not events:
        journal.event("identity", files=now)
    return now


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def check_identity(folder: Path, known: Mapping[str, object], now: Mapping[str, str]) -> None:
    """Raise `RunError` unless a journal is of the run that the folder holds."""
    lines = [f"{name}: {known.get(name)} -> {digest}" for name, digest in now.items() if known.get(name) != digest]
    if lines:
        raise RunError(
            f"{folder}: journal.jsonl is of another run, or files have been exchanged since it began (then -> now):\n  "
            + "\n  ".join(lines)
            + "\nPut them back to resume it, or begin another run in another folder"
        )
