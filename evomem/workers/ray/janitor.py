"""Workers: what ends a Ray of our own whose process was killed: its processes are ended, its folder is removed.

Ray's own servers end with the process that started them, but its agents wait a minute or longer for a server that will
not come back, and its folder stays. This file is also run as a program, by itself (it imports nothing of evomem):
``ray_janitor.py FOLDER...``, with a pipe from the process that it watches as its input.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Sequence

LOOK_SECONDS = 1.0
"""How often the janitor looks whether its parent lives: a fork of the parent may hold the pipe open."""
ROUNDS = 20


def processes(folder: str) -> list[int]:
    """Return this user's processes of a Ray whose folder this is; none where there is no /proc.

    Ray changes the names and environments of its processes. But servers and workers write their output to files in the
    folder, and agents, who have other files open there, are called by it or by Ray's name. (Open files alone would not
    do: a process that is forked from the one that has started Ray has them, too.)
    """
    inside, inside_ids = folder.rstrip("/") + "/", []
    for entry in os.listdir("/proc") if os.path.isdir("/proc/self/fd") else []:
        if entry.isdigit() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):  # it has ended, or belongs to another user
                if os.stat(f"/proc/{entry}").st_uid == os.getuid() and _belongs(entry, inside):
                    inside_ids.append(int(entry))
    return inside_ids


def _belongs(process: str, inside: str) -> bool:
    files = [file for file in os.listdir(f"/proc/{process}/fd") if _target(process, file).startswith(inside)]
    if "1" in files or "2" in files:
        return True
    with open(f"/proc/{process}/cmdline", "rb") as command:
        words = command.read()
    return bool(files) and (words.startswith(b"ray::") or os.fsencode(inside) in words)


def _target(process: str, file: str) -> str:
    with contextlib.suppress(OSError):  # it was closed meanwhile
        return os.readlink(f"/proc/{process}/fd/{file}")
    return ""


def end(folder: str) -> None:
    """Kill every process of a folder; those that one of them has just started are found in the next round."""
    for _ in range(ROUNDS):
        running = processes(folder)
        if not running:
            return
        for process in running:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)


def watch(folders: Sequence[str]) -> None:
    """Wait until the parent says that it has cleaned up itself, or is gone; then clean up."""
    parent = os.getppid()
    while os.getppid() == parent:
        readable, _, _ = select.select([0], [], [], LOOK_SECONDS)
        if readable:
            if os.read(0, 1):
                return
            break
    for folder in folders:
        end(folder)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # what ends the parent must not end who cleans up after it
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    watch(sys.argv[1:])
