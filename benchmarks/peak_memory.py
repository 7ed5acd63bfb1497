"""Cache: peak memory of reading a long context, stock eager attention in one go against NAMM streaming.

Run by itself, ``python -m benchmarks.peak_memory SIDE MODEL TOKENS EVERY BUDGET`` measures one side in this process and
prints the bytes. Every side has a process of its own, because memory that another one freed may come back to it.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import DynamicCache

from benchmarks.attention import step
from benchmarks.measuring import Line, Setting, line, progress, ratios
from benchmarks.namm_shares import full_namm
from evomem import models
from evomem.errors import EvomemError

NAME = "namm.peak_memory_ratio"
WARM_UP = 16
"""Tokens read before memory is looked at: what the first forward pass sets up once is no part of the context's cost."""


def run(setting: Setting) -> Iterator[Line]:
    """Bytes beyond the weights with stock eager attention over those with NAMM streaming."""
    taken: dict[str, list[float]] = {"stock": [], "namm": []}
    rounds = setting.rounds(1)
    for number in range(rounds):
        for side, values in taken.items():
            values.append(float(in_its_own_process(side, setting)))
        what = "  ".join(f"{side} {values[-1] / 2**20:.0f} MiB" for side, values in taken.items())
        progress(NAME, number + 1, rounds, what)
    yield line(NAME, ratios(taken["stock"], taken["namm"]))
    for side, values in taken.items():
        yield line(f"namm.peak_memory_{side}", [value / 2**20 for value in values], "MiB")


def in_its_own_process(side: str, setting: Setting) -> int:
    """Return the bytes of one side, ``stock`` or ``namm``, measured in a new process.

    Raises
    ------
    EvomemError : that process failed.
    """
    sizes = setting.sizes
    numbers = (sizes.namm_context, sizes.namm_every, sizes.namm_budget, torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peak_memory", side, setting.name, *map(str, numbers)],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise EvomemError(f"benchmark {NAME}: the process that measures {side!r} failed:\n{done.stderr.strip()}")
    return int(done.stdout.split()[-1])


@torch.no_grad()
def peak_bytes(side: str, name: str, length: int, every: int, budget: int) -> int:
    """Return how many bytes the reading of ``length`` tokens adds to this process at its peak."""
    loaded = models.load(name, attn="eager")
    model, manager = loaded.model, full_namm(every, budget)
    tokens = Setting.random_tokens(loaded, 1, length)

    def read(count: int) -> None:
        if side == "stock":
            step(model, tokens[:, :count], DynamicCache(config=model.config))
        else:
            with manager.attach(model) as cache:
                step(model, tokens[:, :count], cache)

    read(WARM_UP)
    before = resident()
    forget_peak()
    read(length)
    return max(peak() - before, 1)


def resident() -> int:
    """Bytes of this process in memory now."""
    return _status("VmRSS")


def forget_peak() -> None:
    """Start the peak from what is resident now: loading the weights may have needed more than reading does."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the peak of loading stays in; `peak_bytes` then says too much for both sides


def peak() -> int:
    """Largest number of bytes of this process in memory since `forget_peak`.

    ``VmHWM`` is ``ru_maxrss`` of this program alone; that one would begin with the peak of its parent.
    """
    return _status("VmHWM")


def _status(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return next(int(text.split()[1]) * 1024 for text in lines if text.startswith(f"{field}:"))


if __name__ == "__main__":
    side_, name_, length_, every_, budget_, threads_ = sys.argv[1:]
    torch.set_num_threads(int(threads_))
    print(peak_bytes(side_, name_, int(length_), int(every_), int(budget_)))
