"""Tracking: a tracker that writes one JSON line per call to a file, for programs that follow a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evomem.files.strict_json import to_json
from evomem.tracking.base import GenerationRecord

BEGINNING = b'{"event":"start"'
"""What such a file begins with."""


class JsonlTracker:
    """Appends lines ``{"event": "start" | "generation" | "artifact" | "finish", ...}``.

    Parameters
    ----------
    path : the file; its folder must exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def start(self, config: Mapping[str, Any], generations: int, done: Sequence[GenerationRecord]) -> None:
        """Write the configuration, and how many generations were done before."""
        self._write({"event": "start", "config": dict(config), "generations": generations, "done": len(done)})

    def log(self, generation: GenerationRecord) -> None:
        """Write a generation."""
        self._write({"event": "generation", **asdict(generation)})

    def artifact(self, name: str, path: Path) -> None:
        """Write where something is."""
        self._write({"event": "artifact", "name": name, "path": str(path)})

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write how it ended."""
        self._write({"event": "finish", **summary})

    def _write(self, record: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(to_json(dict(record)) + "\n")
