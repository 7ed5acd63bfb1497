"""Workers: a Ray of our own on this machine: nobody else can reach it, and nothing of it stays behind.

Whoever reaches a Ray can run code as its user. Ours listens on the loopback interface only, asks for a token that
exists in the environment of its processes and nowhere else, and lies in a folder that only this user can open.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import logging
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, cast

from evomem.files import scratch
from evomem.workers.ray import janitor as ray_janitor

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
SOCKET = "session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
SOCKET_BYTES = 103
"""Of a Unix socket's path, on the system with the smallest limit: Ray puts sockets below its folder."""
ROOM = SOCKET_BYTES - len(SOCKET) - len(f"/{scratch.PREFIX}ray-12345678/r/")
"""Bytes that the path may have in which Ray's folder is made."""


class LocalRay:
    """Ray, started on this machine for this process.

    Parameters
    ----------
    ray : the library.
    options : further arguments of `ray.init`.

    Raises
    ------
    Exception : whatever Ray raises when it cannot be started.
    """

    def __init__(self, ray: Any, **options: Any) -> None:
        self._ray = ray
        base = short_folder()
        for folder in {base, Path(tempfile.gettempdir())}:
            scratch.sweep("ray", folder, before=lambda path: ray_janitor.end(str(path)))
        self._folder = scratch.Scratch("ray", base)
        self._spill: scratch.Scratch | None = None
        self._janitor: subprocess.Popen[bytes] | None = None
        try:
            if base != Path(tempfile.gettempdir()):  # sockets lie in the short folder, gigabytes where the user wants
                self._spill = scratch.Scratch("ray")
                options["object_spilling_directory"] = str(self._spill.path)
            self._janitor = _janitor(self._folder.path, *([self._spill.path] if self._spill is not None else []))
            with _own_token(), _loopback(), signals_kept(later=True):
                ray.init(
                    address="local",  # a cluster that happens to run here is joined only by its address
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=str(self._folder.path / "r"),  # which Ray opens to everybody
                    **options,
                )
        except BaseException:
            self.close()
            raise
        atexit.register(self.close)

    def close(self) -> None:
        """End Ray and all its processes, and remove what it has written."""
        atexit.unregister(self.close)
        try:
            with signals_kept(later=False):
                self._ray.shutdown()
        finally:
            forget_token()
            ray_janitor.end(str(self._folder.path))
            self._folder.close()
            if self._spill is not None:
                self._spill.close()
            if self._janitor is not None:
                with contextlib.suppress(OSError):  # it was ended by somebody
                    self._janitor.communicate(b".")
                self._janitor = None


def short_folder() -> Path:
    """Return the folder for Ray's sockets, whose paths must be short: the temporary folder, or another one.

    Raises
    ------
    OSError : there is none.
    """
    wanted = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    places = [wanted, tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"]
    for folder in places:
        if len(os.fsencode(folder)) <= ROOM and os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK):
            return Path(folder)
    raise OSError(
        f"Ray puts sockets into the temporary folder, whose path may have {ROOM} characters: {wanted} has "
        f"{len(wanted)}, and none of {', '.join(places[2:])} can be written to. Set TMPDIR to a folder with a shorter "
        "path"
    )


def forget_token() -> None:
    """Let this process read anew, from environment and files, whether Ray asks for a token, and which."""
    with contextlib.suppress(ImportError, AttributeError):
        raylet: Any = importlib.import_module("ray._raylet")
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _own_token() -> Iterator[None]:
    """Inside the block Ray is started with a random token; its processes inherit it, this one remembers it."""
    with environment({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_AUTH_TOKEN_PATH": None}):
        forget_token()
        yield


@contextlib.contextmanager
def environment(changes: dict[str, str | None]) -> Iterator[None]:
    """Set variables of the environment inside the block; None removes one."""
    before = {name: os.environ.get(name) for name in changes}

    def put(values: dict[str, str | None]) -> None:
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    put(changes)
    try:
        yield
    finally:
        put(before)


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    """Inside the block Ray takes 127.0.0.1 for this machine's address, as it does on macOS: it listens nowhere else."""
    from ray._private import ray_constants

    before = getattr(ray_constants, "ENABLE_RAY_CLUSTER", None)
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def signals_kept(*, later: bool) -> Iterator[None]:
    """Undo what Ray does to signals, in Python and below it, where SIGTERM prints a stack and ends the process.

    With ``later`` a first signal waits until the block is over: in its midst Ray may swallow what a handler raises.
    """
    from ray._private import utils

    module, pending = cast(Any, utils), list[int]()
    replaced, module.set_sigterm_handler = getattr(module, "set_sigterm_handler", None), lambda handler: None
    main = threading.current_thread() is threading.main_thread()
    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers} if main else {}

    def note(number: int, frame: FrameType | None) -> None:
        handler = before[signal.Signals(number)]
        if pending and callable(handler):
            handler(number, frame)
        pending.append(number)

    for number, handler in before.items():
        if later and callable(handler):
            signal.signal(number, note)
    try:
        yield
    finally:
        module.set_sigterm_handler = replaced
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
        if pending:
            signal.raise_signal(pending[0])


def _janitor(*folders: Path) -> subprocess.Popen[bytes]:
    """Start the process that cleans up if this one is killed, in a session of its own: no terminal interrupts it."""
    program = [sys.executable, "-I", "-S", ray_janitor.__file__, *map(str, folders)]
    return subprocess.Popen(
        program,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )
