"""CLI: the command ``track``: tell TensorBoard, W&B or a file about a run after the fact."""

from __future__ import annotations

import os
from pathlib import Path

from rich.text import Text

from evomem.errors import RunError
from evomem.files.reading import user_path
from evomem.runs import open_run
from evomem.terminal import wide_console
from evomem.tracking.build import build_tracker
from evomem.tracking.jsonl import BEGINNING
from evomem.tracking.replay import replay
from evomem.tracking.weights_and_biases import WandbTracker, run_id


def track(source: str, to: str, mode: str | None, project: str | None, out: Path | None) -> None:
    """Replay a run's journal to a tracker, and say what to do with what it wrote.

    Parameters
    ----------
    out : folder to write in; by default ``tracked`` in the run's folder, where no tracker of the running run writes.
    """
    run = open_run(user_path(source))
    folder = user_path(out) if out is not None else run.folder / "tracked"
    tracker = build_tracker(to, run.folder, folder, mode=mode, project=project)
    file = folder / "track.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if to == "jsonl":
            if not _replaceable(file):
                raise RunError(f"{file}: is there and tells of no run; choose another folder with --out")
            file.unlink(missing_ok=True)  # told whole each time
        summary = replay(run, tracker)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error.strerror or error}); choose a folder with --out") from None
    lines = [f"{run.folder}: {len(run.generations())} generations told, {summary['status']}"]
    if isinstance(tracker, WandbTracker) and tracker.url is not None:
        lines.append(f"  {tracker.url}")
    elif to == "wandb":
        wandb_folder = next((folder / "wandb").glob(f"offline-run-*-{run_id(run.folder)}"))
        lines.append(f"  send it to W&B: wandb sync {wandb_folder}")
    elif to == "tensorboard":
        lines.append(f"  look at it: tensorboard --logdir {folder / 'tensorboard'}")
    else:
        lines.append(f"  {file}")
    for line in lines:
        wide_console().print(Text(line), soft_wrap=True)  # a path is copied whole


def _replaceable(file: Path) -> bool:
    """Whether a file is not there, empty, or begins as the tracker begins."""
    if not os.path.lexists(file):
        return True
    if not file.is_file():
        return False
    with file.open("rb") as content:
        return content.read(len(BEGINNING)) in (b"", BEGINNING)
