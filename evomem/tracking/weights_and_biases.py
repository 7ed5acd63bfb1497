"""Tracking: Weights & Biases, made from the journal: offline into a folder, or online as the run goes on."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomem.errors import ConfigError, RunError
from evomem.files.reading import open_regular
from evomem.installing import pip_install
from evomem.tracking.base import GenerationRecord
from evomem.tracking.numbers import finite_fitness, scalars, summary_numbers

if TYPE_CHECKING:
    from wandb import Run as WandbRun

MODES = ("offline", "online")
INIT_SECONDS, FINISH_SECONDS = 20.0, 60.0
"""How long a run waits for a server that does not answer; what has not arrived then stays on the disk."""


class WandbTracker:
    """Tells Weights & Biases; nothing is printed, and nothing about the machine or the code is sent.

    A run has the same W&B id whenever it is told (`run_id`). *Online*, a resumed run goes on at the step that W&B has,
    and is given what it lacks. *Offline* files cannot be appended to, so one is written when the search ends, whole,
    also when it was interrupted; it replaces the one of an earlier end.

    Parameters
    ----------
    run : folder of the run.
    mode : ``offline`` or ``online``.
    project : on W&B; by default what the variable WANDB_PROJECT says, else ``evomem``.
    out : folder in which W&B makes its folder ``wandb``; the run's by default.

    Attributes
    ----------
    url : of the run's page, once it is online.
    """

    def __init__(
        self, run: Path, *, mode: str = "offline", project: str | None = None, out: Path | None = None
    ) -> None:
        if mode not in MODES:
            raise ConfigError(f"wandb: mode {mode!r} is unknown; take {' or '.join(MODES)}")
        self._folder, self._out = run, out if out is not None else run
        self._mode = mode
        self._project = project or os.environ.get("WANDB_PROJECT") or "evomem"
        self._config: dict[str, Any] = {}
        self._id = ""
        self._kept: list[GenerationRecord] = []
        self._artifacts: list[Path] = []
        self._before: GenerationRecord | None = None
        self._run: WandbRun | None = None
        self.url: str | None = None

    def start(self, config: Mapping[str, Any], generations: int, done: Sequence[GenerationRecord]) -> None:
        """Begin; online, also give W&B the finished generations that it lacks.

        Raises
        ------
        ConfigError : wandb is not installed, or online and nobody is logged in.
        RunError : online, and the server cannot be reached.
        OSError : the folder cannot be written.
        """
        _library()
        self._out.mkdir(parents=True, exist_ok=True)
        if not os.access(self._out, os.W_OK):  # W&B would quietly write somewhere else
            raise PermissionError(f"{self._out} cannot be written")
        self._config, self._id = dict(config), run_id(self._folder)
        self._kept, self._artifacts, self._before = list(done), [], None
        if self._mode == "online":
            self._open()
            self._send_kept()

    def log(self, generation: GenerationRecord) -> None:
        """Send a generation, or keep it until the end."""
        self._kept.append(generation)
        if self._run is not None:
            self._send_kept()

    def artifact(self, name: str, path: Path) -> None:
        """Keep in mind a file or folder; it is copied at the end."""
        self._artifacts.append(path)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write how it ended, and wait until W&B has everything.

        Offline that is W&B's own process, which writes the last bytes a moment later, and before this process ends.
        """
        if self._run is None:
            for old in (self._out / "wandb").glob(f"offline-run-*-{self._id}"):
                shutil.rmtree(old)
            self._open()
            self._send_kept()
        run, self._run = self._run, None
        if run is None:
            return
        with _clear_errors(self._mode):
            for path in self._artifacts:
                for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                    if file.is_file():
                        run.save(glob.escape(str(file)), base_path=str(path.parent), policy="now")
            run.summary.update(summary_numbers(summary))
            run.finish(exit_code={"failed": 1, "interrupted": 255}.get(str(summary.get("status")), 0))

    def _open(self) -> None:
        wandb = _library()
        settings = wandb.Settings(
            silent=True,
            console="off",  # W&B would otherwise catch everything that is printed
            reinit="create_new",  # leaves alone a run of W&B that the calling program may have
            symlink=False,  # copies: the offline folder is whole and can be moved
            allow_val_change=True,
            program="evomem",  # otherwise the path of the script
            disable_git=True,
            disable_code=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
        )
        with _clear_errors(self._mode):
            # Silent as a whole, not only this run: otherwise it says where it found a key, or asks for one.
            wandb.setup(wandb.Settings(silent=True))
            self._run = wandb.init(
                id=self._id, project=self._project, name=self._config.get("name"), config=self._config,
                dir=str(self._out), mode=self._mode, resume="allow" if self._mode == "online" else None,
                settings=settings,
            )  # fmt: skip
            self.url = self._run.url

    def _send_kept(self) -> None:
        """Send the generations that are kept and that W&B does not have."""
        run = self._run
        if run is None:
            return
        wandb = _library()
        with _clear_errors(self._mode):
            for generation in self._kept:
                if generation.generation >= run.step:
                    values = finite_fitness(generation)
                    data = {**scalars(generation, self._before), "stage": generation.stage}
                    run.log(
                        {**data, "fitness/all": wandb.Histogram(values)} if values else data, step=generation.generation
                    )
                self._before = generation
        self._kept = []


def run_id(folder: Path) -> str:
    """Return a run's id on W&B: 16 hexadecimal digits made of the journal's first line.

    That line has the time at which the run began, so that the id is the run's own and stays when its folder is moved.

    Raises
    ------
    RunError : the run has not begun.
    """
    try:
        with open_regular(folder / "journal.jsonl", RunError) as file:
            line = file.readline(1 << 20)
    except OSError:
        line = b""
    if not line.endswith(b"\n"):
        raise RunError(f"{folder}: the run has not begun yet; there is nothing to tell W&B")
    return hashlib.sha256(line).hexdigest()[:16]


def _library() -> Any:
    """Return the module `wandb`."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its reports about itself; read when it is imported
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(f"wandb is not installed ({error}): {pip_install('track')}") from None
    return wandb


@contextmanager
def _clear_errors(mode: str) -> Iterator[None]:
    """Turn W&B's errors into ours, which say what to do."""
    import wandb

    later = "the run's journal has everything: send it later with `evomem track RUN --to wandb`"
    try:
        yield
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
        hint = "; log in with `wandb login`, set WANDB_API_KEY, or take the mode offline" if mode == "online" else ""
        raise ConfigError(f"W&B refuses: {error}{hint}") from None
    except (wandb.errors.CommError, TimeoutError) as error:
        raise RunError(f"W&B cannot be reached ({str(error).splitlines()[0]}); {later}") from None
    except Exception as error:  # its errors have no common base
        raise RunError(f"W&B failed ({type(error).__name__}: {error}); {later}") from error
