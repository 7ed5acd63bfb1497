"""Drivers as processes of their own, whose end leaves nothing running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from evomem.runs.journal import read_journal

HERE = Path(__file__).parent
PROGRAM = [sys.executable, str(HERE / "ray_program.py")]


def begin(folder, *command, **variables):
    """Start a process, a group of its own as a terminal would make it; what it says goes to a file."""
    places = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": places, **variables}
    with (folder / "said").open("w") as file:
        words = [str(word) for word in command]
        return subprocess.Popen(words, env=environment, stdout=file, stderr=file, start_new_session=True)


def told(folder, process, seconds=120):
    """Wait for the end of a process that went well; return what it tells in its last line."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    said = (folder / "said").read_text()
    assert process.returncode == 0, said
    return json.loads(said.splitlines()[-1])


def under(process):
    """A process and all that it has started, directly or not, as {pid: command}."""
    parents, names = {}, {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = status.read_text().split("(", 1)[1].rsplit(")", 1)
            command = (status.parent / "cmdline").read_text().replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError):
            continue
        pid = int(status.parent.name)
        parents[pid], names[pid] = int(rest.split()[1]), command or name
    found = {process.pid}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: names[pid] for pid in found}


def alive(pids):
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def lines(folder):
    return len(list(read_journal(folder / "journal.jsonl")))
