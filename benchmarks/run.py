"""Evaluation: measure what was promised about speed and memory: ``python -m benchmarks.run [NAMES…] [--quick]``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import (
    ask_tell,
    attention,
    compress_once,
    import_time,
    namm_shares,
    peak_memory,
    policy_gradient,
    quarter_cache,
    ragged_cache,
    ray_workers,
    streaming,
)
from benchmarks.measuring import QUICK, Line, Setting, Sizes
from evomem.errors import EvomemError
from evomem.files.atomic import write_atomically

RESULTS = Path(__file__).with_name("results.jsonl")

TARGETS: dict[str, tuple[str, float]] = {
    "evaluator.compress_once.efficiency": ("≥", 0.85),
    "evaluator.compress_once.efficiency_bam": ("≥", 0.50),
    "evaluator.streaming.speedup": ("≥", 1.5),
    "attention.prefill_overhead": ("≤", 1.10),
    "attention.decode_overhead": ("≤", 1.10),
    "decode.speedup_at_quarter_cache": ("≥", 1.5),
    ragged_cache.DECODE: ("≥", 2.0),
    ragged_cache.BYTES: ("≤", 1.10),
    "namm.decide_share": ("≤", 0.10),
    "namm.observe_share": ("≤", 0.35),
    "namm.peak_memory_ratio": ("≥", 3.0),
    "ray.bit_identical": ("≥", 1.0),
    "ray.scaling_efficiency": ("≥", 0.90),
    "ray.dispatch_overhead_ms": ("≤", 30.0),
    "ray.worker_memory_mb": ("≤", 350.0),
    "ray.recovery_s": ("≤", 2.0),
    ask_tell.NAME: ("≤", 20.0),
    policy_gradient.VARIANCE: ("≤", 0.5),
    policy_gradient.ERROR: ("≤", 0.02),
    import_time.NAME: ("≤", 2.0),
}
"""What is promised, by the name of the line."""


@dataclass(frozen=True)
class Subject:
    """A benchmark and the lines that it yields."""

    names: tuple[str, ...]
    run: Callable[[Setting], Iterator[Line]]


_ONCE, _DECODE = compress_once.NAME, attention.DECODE
SUBJECTS = (
    Subject(
        tuple(f"{_ONCE}.{what}" for what in ("speedup", "speedup_first_generation", "bound", "efficiency")),
        compress_once.feature_scorer,
    ),
    Subject((f"{_ONCE}.efficiency_bam",), compress_once.bam),
    Subject((streaming.NAME,), streaming.run),
    Subject((attention.PREFILL,), attention.prefill),
    Subject((_DECODE, *(f"{_DECODE}_batch_{batch}" for batch in Sizes().decode_batches)), attention.decode),
    Subject((quarter_cache.NAME,), quarter_cache.run),
    Subject((ragged_cache.DECODE, ragged_cache.BYTES), ragged_cache.run),
    Subject((namm_shares.DECIDE, namm_shares.OBSERVE), namm_shares.run),
    Subject((peak_memory.NAME, "namm.peak_memory_stock", "namm.peak_memory_namm"), peak_memory.run),
    Subject((ray_workers.BITS,), ray_workers.bit_identical),
    Subject((ray_workers.SCALING, ray_workers.MEMORY), ray_workers.scaling),
    Subject((ray_workers.DISPATCH,), ray_workers.dispatch),
    Subject((ray_workers.RECOVERY,), ray_workers.recovery),
    Subject(ask_tell.NAMES, ask_tell.run),
    Subject((policy_gradient.VARIANCE, policy_gradient.ERROR), policy_gradient.estimators),
    Subject((policy_gradient.SPEEDUP,), policy_gradient.rollouts),
    Subject((import_time.NAME,), import_time.run),
)


def chosen(names: Sequence[str]) -> list[Subject]:
    """Return the subjects that yield one of the names, or a line below one (``attention`` means all ``attention.…``).

    Raises
    ------
    EvomemError : a name that no subject yields.
    """

    def fits(subject: Subject, name: str) -> bool:
        return any(own == name or own.startswith(f"{name}.") for own in subject.names)

    for name in names:
        if not any(fits(subject, name) for subject in SUBJECTS):
            known = "\n  ".join(own for subject in SUBJECTS for own in subject.names)
            raise EvomemError(f"no benchmark is called {name!r}; there are:\n  {known}")
    return [subject for subject in SUBJECTS if not names or any(fits(subject, name) for name in names)]


def read_results(path: Path) -> dict[str, dict[str, object]]:
    """Return the lines of an earlier run by name; none if there is no file.

    Raises
    ------
    EvomemError : the file holds something else.
    """
    found: dict[str, dict[str, object]] = {}
    if not path.exists():
        return found
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(text)
            found[entry["name"]] = entry
        except (ValueError, TypeError, KeyError):
            raise EvomemError(f"{path}, line {number}: not a benchmark's result; move the file away") from None
    return found


def write_results(path: Path, lines: Sequence[Line]) -> None:
    """Replace the lines in the file, all at once; lines of other names stay. In the order of `SUBJECTS`.

    Raises
    ------
    EvomemError : the file holds something else, or cannot be written.
    """
    entries = read_results(path)
    entries.update({one.name: {"name": one.name, "value": one.value, "unit": one.unit} for one in lines})
    order = [name for subject in SUBJECTS for name in subject.names]
    sorted_names = sorted(entries, key=lambda name: order.index(name) if name in order else len(order))
    write_atomically(path, "".join(json.dumps(entries[name]) + "\n" for name in sorted_names).encode())


def meets(one: Line) -> bool | None:
    """Tell whether a line keeps what is promised; None where nothing is."""
    if one.name not in TARGETS:
        return None
    sign, target = TARGETS[one.name]
    return one.value >= target if sign == "≥" else one.value <= target


def table(lines: Sequence[Line]) -> Table:
    """Return the lines for a person to read, with the target next to each."""
    shown = Table(title="evomem benchmarks")
    shown.add_column("name", overflow="fold")
    for title in ("value", "range", "unit", "target", ""):
        shown.add_column(title, justify="right" if title in ("value", "range", "target") else "left", no_wrap=True)
    for one in lines:
        target = "{} {:g}".format(*TARGETS[one.name]) if one.name in TARGETS else ""
        verdict = {True: "[green]yes", False: "[red]no", None: ""}[meets(one)]
        low, high = one.spread
        shown.add_row(one.name, f"{one.value:.3f}", f"{low:.3f} to {high:.3f}", one.unit, target, verdict)
    return shown


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="lines or groups of lines, e.g. attention; all if none"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, one repeat: does it run? The numbers mean nothing"
    )
    parser.add_argument("--repeats", type=int, help="rounds of every comparison")
    parser.add_argument("--model", default="smollm2-135m", help="alias, folder or hub id")
    parser.add_argument(
        "--output", type=Path, help=f"JSON lines (default: {RESULTS.name} beside this file; with --quick none)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks that the arguments name; return the exit status."""
    given = arguments(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    # All cores, unless the caller limits them: the limits that libraries guess for themselves differ.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    try:
        if given.repeats is not None and given.repeats < 1:
            raise EvomemError(f"--repeats {given.repeats}: give at least 1")
        subjects = chosen(given.names)
        output = given.output or (None if given.quick else RESULTS)
        if output is not None:
            read_results(output)  # a damaged file is better found before the quarter of an hour than after
        repeats = given.repeats or (1 if given.quick else None)
        # The processes that measure memory have another working folder.
        model = str(Path(given.model).resolve()) if Path(given.model).is_dir() else given.model
        setting = Setting(model, QUICK if given.quick else Sizes(), repeats)
        begin, lines = time.perf_counter(), list[Line]()
        for subject in subjects:
            lines.extend(subject.run(setting))
        if output is not None:
            write_results(output, lines)
    except EvomemError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    console.print(table(lines))
    console.print(
        f"{time.perf_counter() - begin:.0f} s on {torch.get_num_threads()} threads" + (f"; {output}" if output else "")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
