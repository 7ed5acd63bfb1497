"""Run: its folder on disk.

::

    config.yaml       the experiment, resolved
    journal.jsonl     everything that was evaluated (`evomem.runs.journal`)
    checkpoints/      the last two states of the search
    start/            vector.npy and state.safetensors of the manager that the search started from; provenance.json
    winner/           vector.npy, and the plug-in in plugin/
    front.json        of a search for a front: its members, and their plug-ins in front/ (`evomem.runs.front`)
    result.json       written last: a run that has it is finished
    run.lock          held by the process that works in the folder; owner.json says which that is
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import filelock

from evomem.errors import ConfigError, RunError
from evomem.files.atomic import disk_errors, is_temporary, sweep, write_atomically
from evomem.runs.config import ExperimentConfig
from evomem.runs.experiment_file import as_stored, to_yaml
from evomem.runs.folder_reading import read_config, read_object
from evomem.runs.inputs import START, changes
from evomem.runs.journal import Journal
from evomem.runs.paths import resolve_paths
from evomem.runs.result import RunResult, read_result
from evomem.validation import difference, flatten, validate


class RunFolder:
    """The folder of a run that this process works in; a context manager that holds the lock.

    Parameters
    ----------
    path : the folder; it is made.
    config : the experiment.
    resume : go on with the run that is there; with nothing there, begin.

    Raises
    ------
    RunError : the folder is in use by another process, holds a run and ``resume`` is off, holds something else, or
        holds a run of another configuration (the difference is shown).
    """

    def __init__(self, path: Path, config: ExperimentConfig, *, resume: bool) -> None:
        self.path = path
        self._config = config.placed()
        self._resume = resume
        self._lock = filelock.FileLock(str(path / "run.lock"), timeout=0)
        self.resumed = False
        self.notes: list[str] = []
        self.journal: Journal

    def __enter__(self) -> Self:
        self._refuse()  # before anything is written: the folder may be a stranger's
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise RunError(
                f"{self.path}: this run folder is in use by {self._owner()}; wait or stop it first"
            ) from None
        except OSError as error:
            raise RunError(f"{self.path}/run.lock: cannot be written: {error.strerror or error}") from None
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.journal.close()
        self._lock.release()

    def _owner(self) -> str:
        try:
            owner = read_object(self.path / "owner.json")
            return f"process {owner['pid']} on {owner['host']}"
        except (RunError, LookupError):
            return "another process"

    def _refuse(self) -> None:
        """Raise `RunError` unless the folder is new, empty, or holds this run and may be gone on with."""
        stored = self.path / "config.yaml"
        with disk_errors(self.path):
            if not self.path.exists():
                return
            if not self.path.is_dir():
                raise RunError(f"{self.path}: is a file; choose another folder")
            if stored.exists():
                if not self._resume:
                    raise RunError(f"{self.path}: holds a run already; resume it, or choose another folder")
                check_same_config(stored, self._config.resolved())
                return
            remains = {"run.lock", "owner.json"}  # of a process that was killed as it began
            strangers = sorted(p.name for p in self.path.iterdir() if p.name not in remains and not is_temporary(p))
        if strangers:
            raise RunError(f"{self.path}: is no run folder and not empty (it holds {strangers[0]}); choose another")

    def _open(self) -> None:
        self._refuse()  # again, because now nobody else works in it
        stored = self.path / "config.yaml"
        if stored.exists():
            self.journal = Journal(self.path / "journal.jsonl")  # first: it is the lock that counts
        try:
            self._take(stored)
        except BaseException:
            if "journal" in vars(self):
                self.journal.close()
            raise

    def _take(self, stored: Path) -> None:
        """Make the folder this process's own."""
        owner = {"pid": os.getpid(), "host": socket.gethostname()}
        write_atomically(self.path / "owner.json", json.dumps(owner).encode())
        sweep(self.path, *(self.path / name for name in ("checkpoints", "start", "winner", "plots")))
        resolved = self._config.resolved()
        if stored.exists():
            self._check_inputs(check_same_config(stored, resolved))
            self.resumed = True
        else:
            write_atomically(stored, to_yaml(resolved).encode())
            self.journal = Journal(self.path / "journal.jsonl")
        for name in ("checkpoints", "start", "winner"):
            with disk_errors(self.path):
                (self.path / name).mkdir(exist_ok=True)

    def _check_inputs(self, stored: dict[str, Any]) -> None:
        """Compare the inputs that the run began with with those that are there now.

        Raises
        ------
        RunError : one that the search still needs is another.
        """
        before, now = stored.get("inputs") or {}, self._config.inputs
        if not before and now:
            self.notes.append(
                "this run was begun by an evomem that kept no digests of its inputs "
                f"({', '.join(now)}): whether they have changed since cannot be known; from now on they are compared"
            )
            write_atomically(self.path / "config.yaml", to_yaml({**stored, "inputs": now}).encode())
            return
        lines = changes(before, now)
        fatal = [] if (self.path / "result.json").exists() else [line for line in lines if not line.startswith(START)]
        if fatal:
            raise RunError(
                f"{self.path}: what the run reads is not what it was when it began (run -> now):\n  "
                + "\n  ".join(fatal)
                + "\nPut it back to resume this run, or begin another one in another folder"
            )
        self.notes += [f"{line}; the run goes on with what it began with" for line in lines]

    @property
    def result(self) -> RunResult | None:
        """The finished run's result, or None."""
        return read_result(self.path)

    def check_provenance(self, provenance: dict[str, Any]) -> None:
        """Refuse to go on measuring with another model than the one that the run began with."""
        path = self.path / "start" / "provenance.json"
        if not path.exists():
            write_atomically(path, json.dumps(provenance, indent=1).encode())
            return
        known = read_object(path)
        before, now = flatten(known), flatten(json.loads(json.dumps(provenance)))
        # With several models each has its own: model_digests.1.dtype
        comparable = {key: value for key, value in now.items() if key in before or key.rpartition(".")[2] not in _LATER}
        lines = difference(before, comparable)
        if lines:
            raise RunError(f"{self.path}: the run began with another model or tokenizer:\n  " + "\n  ".join(lines))


_LATER = frozenset({"dtype", "device", "quantization", "tokenizer_digest"})
"""Parts of a provenance that older runs do not have; of one that has them they are compared."""


def check_same_config(stored: Path, resolved: dict[str, Any]) -> dict[str, Any]:
    """Return a stored configuration; raise `RunError` with the difference unless it is the given one.

    The inputs' digests are compared elsewhere; memory for contexts and where relative paths began may be others.
    """
    before = read_config(stored)
    filled = _with_defaults(before)
    # How much memory contexts get moves no result.
    free: dict[str, Any] = {"inputs": {}, "store_bytes": None, "base": None}
    lines = difference({**filled, **free}, as_stored({**resolved, **free}))
    if lines:
        raise RunError(
            f"{stored.parent}: this run has another configuration (run -> now):\n  "
            + "\n  ".join(lines)
            + "\nResume it with its own configuration, or choose another folder."
        )
    return filled


def _with_defaults(stored: dict[str, Any]) -> dict[str, Any]:
    """Return a stored configuration with today's defaults for the fields that did not exist when it was written.

    One that is no experiment any more is returned as it is, so that the difference shows what has changed.
    """
    try:
        config = resolve_paths(validate(ExperimentConfig, stored, "run"))  # an earlier evomem left them relative
        return as_stored(config.resolved())
    except ConfigError:
        return stored
