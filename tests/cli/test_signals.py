"""Run: how a command ends that a signal tells to end: a line that says how to go on, and the signal's exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import pytest
from typer import Exit

PROGRAM = """
import signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # whatever started these tests
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
if sys.argv[1] == "ignores":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
import typer
from evomem.cli.errors import guarded

def command():
    with guarded("evomem evolve x --resume"):
        try:
            print("begun", flush=True)
            for _ in range(400):  # a signal just before a sleep does not wake it up
                time.sleep(0.05)
        finally:
            print("cleaning", flush=True)
            if how == "slow":
                time.sleep(20)
            print("clean", flush=True)

how = sys.argv.pop()
app = typer.Typer()
app.command()(command)
app()
"""


@pytest.mark.parametrize(
    ("how", "signals", "code", "said"),
    [
        ("quick", ["SIGINT"], 130, "interrupted"),
        ("quick", ["SIGTERM"], 143, "terminated"),
        ("quick", ["SIGHUP"], 129, "hung up"),
        ("slow", ["SIGINT", "SIGINT"], 130, "interrupted"),
        ("slow", ["SIGTERM", "SIGINT"], 143, "terminated"),
        ("ignores", ["SIGINT", "SIGTERM"], 143, "terminated"),
    ],
)
def test_a_signal_ends_a_command(how, signals, code, said):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    os.kill(process.pid, getattr(signal, signals[0]))
    if how == "slow":
        assert process.stdout.readline() == "cleaning\n"
    for name in signals[1:]:
        os.kill(process.pid, getattr(signal, name))
    out, error = process.communicate(timeout=15)
    assert process.returncode == code
    assert error.strip() == f"{said}; resume with: evomem evolve x --resume"
    assert ("clean\n" in out) == (how != "slow")


def test_handlers_are_put_back():
    from evomem.cli.errors import guarded

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with guarded():
        assert signal.getsignal(signal.SIGTERM) is not before[1]
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_signal_that_comes_while_ray_starts_waits_until_ray_cannot_swallow_it():
    from evomem.cli.errors import Stopped, guarded
    from evomem.workers.ray.local import signals_kept

    seen, before = [], {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def command():
        handler = signal.getsignal(signal.SIGTERM)
        try:
            with signals_kept(later=True):
                with contextlib.suppress(BaseException):  # as Ray does
                    signal.raise_signal(signal.SIGTERM)
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this, too
                seen.append("started")
        except Stopped as error:
            seen.append(error.number)
            assert signal.getsignal(signal.SIGTERM) is handler
            raise

    with pytest.raises(Exit) as ended, guarded("x"):
        command()
    for number, handler in before.items():  # a command that was told to end leaves them to the end of its process
        signal.signal(number, handler)
    assert seen == ["started", signal.SIGTERM]
    assert ended.value.exit_code == 143
