"""Run: streams: what ARC hits with as many pairs as the bytes of a ranking's memory could hold.

    PYTHONPATH=.:build/libcachesim python -m experiments.streams_bytes docs/results/streams.json \
        --key "table with ghosts zipf:length=400" --json docs/results/streams.json

Reads a table that `experiments.streams table` wrote, and measures ARC on the same streams. A manager that observes
nothing (`random`) says what a pair alone takes, in the mean over a stream and by slot of the budget; ARC remembers as
many names beside its pairs as it holds, of 8 bytes each. What a ranking's memory has in bytes, over that, is the number
of pairs that ARC could hold. Differences are paired stream by stream, intervals are of 95 %.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evomem.errors import EvomemError, MissingPackagesError
from evomem.files.atomic import write_atomically
from evomem.tasks.streams.replacement import hit_rate, hits
from experiments.streams import MANAGERS, ahead, known_rows, task_and_samples, text_of

GHOST = 8
"""Bytes of a name that ARC remembers of a pair that has left, one for every pair that it holds."""
BARE = "random"
"""Manager that observes nothing: its memory has pairs only."""


def runs_of(rows: dict[str, Any], named: Sequence[str]) -> list[str]:
    """Return which rows of a table are evolved rankings, all or those that are named.

    Raises
    ------
    EvomemError : a named one is not there, or the table has none, or no bytes to compare with.
    """
    known = [name for name in rows if "bytes" in rows[name] and name not in MANAGERS and not name.startswith("best R:")]
    if missing := set(named) - set(known):
        raise EvomemError(f"--runs {min(missing)}: is no ranking of the table, which has {', '.join(known) or 'none'}")
    if not known or BARE not in rows:
        raise EvomemError(f"the table has no rankings with bytes, or no row of {BARE!r}: make it with this version")
    return list(named) or known


def equal_pairs(rows: dict[str, Any], slots: int, runs: Sequence[str]) -> tuple[float, int]:
    """Return the bytes of the rankings' memory, and how many pairs ARC could hold in as many."""
    nbytes = float(np.mean([rows[run]["bytes"] for run in runs]))
    return nbytes, int(nbytes / (rows[BARE]["bytes"] / slots + GHOST))


def measured(table: dict[str, Any], named: Sequence[str]) -> dict[str, Any]:
    """Return, by number of slots of a table, bytes, ARC's pairs and hit rate, and how far the rankings are ahead."""
    _, task, samples = task_and_samples(table["task"], table["split"], table["streams"], table.get("skipped", 0))
    streams, result = [task.stream(sample) for sample in samples], {}
    for slots, rows in table["slots"].items():
        runs = runs_of(rows, named)
        nbytes, pairs = equal_pairs(rows, int(slots), runs)
        try:
            rates = np.array([hit_rate(stream, hits(stream, "arc", pairs)) for stream in streams])
        except MissingPackagesError as error:
            raise EvomemError(
                f"{error}; make test-libcachesim installs it into build/libcachesim: put that on PYTHONPATH"
            ) from None
        evolved = np.mean([rows[run]["rates"] for run in runs], axis=0)
        gap = ahead(evolved, rates)
        result[slots] = {
            "bytes": round(nbytes, 1), "arc_pairs": pairs, "arc": round(float(rates.mean()), 4),
            "arc_rates": [round(float(rate), 4) for rate in rates],
            "evolved": round(float(evolved.mean()), 4), "evolved_ahead_by": gap,
        }  # fmt: skip
        print(
            f"| {slots} | {nbytes:,.0f} | {evolved.mean():.4f} | {pairs} | {rates.mean():.4f} | {gap['mean']:+.4f} "
            f"{gap['interval']} |",
            flush=True,
        )
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="file that `experiments.streams table` wrote")
    parser.add_argument("--key", required=True, help="which of its tables")
    parser.add_argument("--runs", nargs="+", default=[], help="rankings of the table; by default all that have bytes")
    parser.add_argument("--json", type=Path, help="file that the rows are written into, under 'bytes KEY'")
    given = parser.parse_args(arguments)
    try:
        tables = known_rows(given.table)
        if not tables.get(given.key, {}).get("slots"):
            names = ", ".join(repr(key) for key, one in tables.items() if "slots" in one)
            raise EvomemError(f"{given.table}: has no table {given.key!r}; it has {names or 'none'}")
        others = {} if given.json is None else known_rows(given.json)
        if given.json is not None:
            given.json.parent.mkdir(parents=True, exist_ok=True)  # before anything is measured
        print("| pairs | bytes | evolved | ARC's pairs in as many | ARC | evolved, ahead by |\n|" + "---|" * 6)
        rows = measured(tables[given.key], given.runs)
        if given.json is not None:
            write_atomically(given.json, text_of({**others, f"bytes {given.key}": rows}).encode())
    except (EvomemError, OSError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
