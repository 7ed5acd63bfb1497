"""Processes that begin at once: forked from a server that has imported what they need."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import sys
from multiprocessing.context import ForkServerContext

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
