"""Processes that begin at once: forked from a server that has imported what they need."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any

import pytest

PRELOADED = [
    "tests.support.synthetic_search", "tests.support.policy_search", "tests.support.stream_search",
    "tests.runs.test_block_search", "cma",
]  # fmt: skip
"""All modules whose functions such processes run: one server serves all tests of a process, with what it began with."""


def forkserver() -> ForkServerContext:
    """Return the context whose processes are forked from the server; it is started by the first call."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:  # the server finds modules by this only
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        multiprocessing.forkserver.ensure_running()
    return processes


def begin(function: Callable[..., Any], *arguments: Any, seconds: float = 240) -> Callable[[], Any]:
    """Call a function of a module in another process; return what waits for its result and returns it.

    The process has hash values of its own and none of the caller's state, as one that was started by hand, and spares
    the seconds that such a one takes to import.
    """
    processes = forkserver()
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=_answer, args=(sender, function, *arguments), daemon=True)
    process.start()
    sender.close()  # so that the end of the process is the end of the pipe

    def wait() -> Any:
        assert receiver.poll(seconds), f"{function.__qualname__} takes longer than {seconds} s"
        failure, result = receiver.recv()
        process.join()
        assert not failure, failure
        return result

    return wait


def elsewhere(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function of a module returns in another process, see `begin`."""
    return begin(function, *arguments)()


def _answer(sender: Connection, function: Callable[..., Any], *arguments: Any) -> None:
    try:
        sender.send(("", function(*arguments)))
    except BaseException:
        sender.send((traceback.format_exc(), None))
