"""Tracking: a tracker that writes TensorBoard event files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from evomem.errors import ConfigError
from evomem.installing import pip_install
from evomem.tracking.base import GenerationRecord
from evomem.tracking.numbers import finite_fitness, scalars, summary_numbers

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

SUFFIX = ".evomem"
"""End of the names of our event files, so that nobody else's are touched."""


class TensorBoardTracker:
    """Scalars and a histogram of fitness per generation; configuration, stages, artifacts and result as text.

    Every start writes the event file anew, from the generations that the run has: after a kill the journal is right and
    an old event file may not be.

    Parameters
    ----------
    folder : of the event files, made if missing. Event files that an `evomem` run wrote into it before are replaced.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None
        self._before: GenerationRecord | None = None

    def start(self, config: Mapping[str, Any], generations: int, done: Sequence[GenerationRecord]) -> None:
        """Write the configuration and what is done; raise `ConfigError` if TensorBoard is not installed."""
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise ConfigError(f"TensorBoard is not installed ({error}): {pip_install('track')}") from None
        self._folder.mkdir(parents=True, exist_ok=True)
        for old in self._folder.glob(f"events.out.tfevents.*{SUFFIX}"):
            old.unlink()
        # The purge tells a TensorBoard that is already open to drop what it has read from the old file.
        self._writer = SummaryWriter(str(self._folder), purge_step=0, filename_suffix=SUFFIX)
        self._before = None
        self._text("config", _fenced(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)), 0)
        for generation in done:
            self._write(generation)
        self._flush()

    def log(self, generation: GenerationRecord) -> None:
        """Write a generation; on the disk when this returns."""
        self._write(generation)
        self._flush()

    def artifact(self, name: str, path: Path) -> None:
        """Write where something is."""
        self._text(f"artifact/{name}", str(path), self._step)
        self._flush()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write how it ended, and close the file."""
        numbers = "\n".join(f"{key}: {value}" for key, value in summary_numbers(summary).items())
        self._text("result", _fenced("\n".join([numbers, *summary.get("lines", ())])), self._step)
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    @property
    def _step(self) -> int:
        return 0 if self._before is None else self._before.generation

    def _write(self, generation: GenerationRecord) -> None:
        writer, step = self._writer, generation.generation
        if writer is None:
            return
        for name, value in scalars(generation, self._before).items():
            writer.add_scalar(name, value, step)
        values = finite_fitness(generation)
        if values:
            writer.add_histogram("fitness/all", np.array(values), step)
        if self._before is None or self._before.stage != generation.stage:
            self._text("stage", generation.stage, step)
        self._before = generation

    def _text(self, name: str, text: str, step: int) -> None:
        if self._writer is not None:
            self._writer.add_text(name, text, step)

    def _flush(self) -> None:
        """Wait for the writer's thread: an error of the disk is raised here, not at some later call."""
        if self._writer is not None:
            self._writer.flush()


def _fenced(text: str) -> str:
    """Return text that TensorBoard, which reads Markdown, shows as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())
