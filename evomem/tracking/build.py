"""Tracking: trackers by name, as ``evomem evolve --track`` gives them."""

from __future__ import annotations

from pathlib import Path

from evomem.errors import ConfigError, UnknownNameError
from evomem.tracking.base import Tracker
from evomem.tracking.jsonl import JsonlTracker
from evomem.tracking.tensorboard import TensorBoardTracker
from evomem.tracking.terminal import TerminalTracker
from evomem.tracking.weights_and_biases import WandbTracker

NAMES = ("terminal", "jsonl", "tensorboard", "wandb")


def build_trackers(names: str, run: Path) -> list[Tracker]:
    """Return the trackers of a comma-separated list of names; no library of theirs is imported yet.

    Parameters
    ----------
    names : of `NAMES`; ``wandb:online`` sends while the run goes on, ``wandb`` alone writes offline at its end.
    run : folder of the run, in which the sinks write: ``track.jsonl``, ``tensorboard/``, ``wandb/``.

    Raises
    ------
    ConfigError : a name is unknown or given twice, or has a mode that it does not know.
    """
    parts = [part.strip().partition(":") for part in names.split(",") if part.strip()]
    if not parts:
        raise ConfigError(f"--track {names!r}: no tracker is named; known: {', '.join(NAMES)}")
    seen = [name for name, _, _ in parts]
    for name in seen:
        if seen.count(name) > 1:
            raise ConfigError(f"--track {names}: {name} is given twice")
    return [build_tracker(name, run, run, mode=mode or None) for name, _, mode in parts]


def build_tracker(name: str, run: Path, out: Path, *, mode: str | None = None, project: str | None = None) -> Tracker:
    """Return one tracker of a run that writes into the folder ``out``.

    Raises
    ------
    ConfigError : the name is unknown, or ``mode`` or ``project`` are given to another one than ``wandb``.
    """
    if name not in NAMES:
        raise UnknownNameError("tracker", name, list(NAMES))
    if name == "wandb":
        return WandbTracker(run, mode=mode or "offline", project=project, out=out)
    for option, value in (("mode", mode), ("project", project)):
        if value is not None:
            raise ConfigError(f"tracker {name}: it has no {option} ({value!r}); only wandb has")
    if name == "jsonl":
        return JsonlTracker(out / "track.jsonl")
    return TensorBoardTracker(out / "tensorboard") if name == "tensorboard" else TerminalTracker()
