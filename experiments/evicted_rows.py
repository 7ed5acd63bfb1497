"""Run: what evicted tokens that are written into rows are worth beside a frozen decoder: a table of settings.

    OMP_NUM_THREADS=1 python -m experiments.evicted_rows --samples 8 --json docs/results/evicted_rows.json

Every setting of ``evicted_rows(keydiff)`` is set beside ``keydiff`` in as many slots, and beside ``keydiff`` in those
that are not rows: the first difference is what rows in the place of tokens come to, the second what reading the rows
adds to the tokens that are left. Settings differ in how many rows there are, how much a row of m tokens counts
(m^weight slots), how sharply a token prefers one row, and in what a row averages. Samples are sealed; differences are
paired, with intervals of 95 %.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from evomem.errors import EvomemError
from evomem.evaluation import Evaluator
from evomem.managers import build
from evomem.models import load
from evomem.statistics import paired_bootstrap
from evomem.tasks import Split
from evomem.tasks import build as build_task

ROWS = 4
SETTINGS = (
    {"rows": ROWS},
    *({"rows": ROWS, "weight": weight} for weight in (0.5, 0.25, 0.01)),
    *({"rows": ROWS, "sharpness": sharpness} for sharpness in (0, 64, 1000)),
    {"rows": ROWS, "sharpness": 64, "weight": 0.25},
    {"rows": 1},
    {"rows": 1, "weight": 0.25},
    {"rows": ROWS, "writes": "values", "weight": 0.01},
)
"""Options of ``evicted_rows`` that are tried; the others have their defaults."""


def spec_of(setting: dict[str, Any]) -> str:
    """Return the manager of a setting."""
    return f"evicted_rows(keydiff, {', '.join(f'{name}={value}' for name, value in setting.items())})"


def difference(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """Return the paired difference of log-likelihoods, with its interval."""
    interval = paired_bootstrap(first, second)
    return {"mean": interval.mean, "interval": [interval.low, interval.high]}


def shown(cell: dict[str, Any]) -> str:
    """Return a difference as it is printed."""
    return f"{cell['mean']:+.3f} [{cell['interval'][0]:+.3f}, {cell['interval'][1]:+.3f}]"


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Return the rows of all budgets; prints a table for each."""
    loaded = load(given.model)
    task = build_task(given.task, loaded.tokenizer)
    samples, evaluator = task.samples(Split.SEALED, given.samples, given.seed), Evaluator(loaded)
    result: dict[str, Any] = {"model": given.model, "task": given.task, "samples": len(samples), "slots": {}}
    for slots in given.budgets:
        plain = sorted({slots, *(slots - setting["rows"] for setting in SETTINGS)})
        managers = [build("keydiff", budget=count) for count in plain]
        managers += [build(spec_of(setting), budget=slots) for setting in SETTINGS]
        results = [evaluator.evaluate(managers, sample, task) for sample in samples]
        nats = [[one[number].loglik for one in results] for number in range(len(managers))]
        keydiff = dict(zip(plain, nats, strict=False))
        rows: dict[str, Any] = {
            f"keydiff, {count} slots": {"nats": fmean(values), "by_sample": values} for count, values in keydiff.items()
        }
        for setting, values in zip(SETTINGS, nats[len(plain) :], strict=True):
            rows[spec_of(setting)] = {
                "nats": fmean(values), "by_sample": values, "ahead_of_keydiff": difference(values, keydiff[slots]),
                "ahead_of_the_tokens_left": difference(values, keydiff[slots - setting["rows"]]),
            }  # fmt: skip
        result["slots"][str(slots)] = rows
        print(f"\n{given.task}, {slots} slots, {len(samples)} sealed samples\n")
        print("| | nats | ahead of keydiff | ahead of keydiff without the rows |\n|---|---|---|---|")
        for name, row in rows.items():
            cells = [shown(row[part]) for part in ("ahead_of_keydiff", "ahead_of_the_tokens_left") if part in row]
            print(f"| {name} | {row['nats']:.3f} | " + " | ".join(cells or ["", ""]) + " |", flush=True)
    return result


def main() -> None:
    """Measure, print, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="multikey_1:length=500")
    parser.add_argument("--budgets", type=int, nargs="+", default=[16, 32], help="slots a head")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the rows")
    given = parser.parse_args()
    if given.samples < 2 or min(given.budgets) <= ROWS:
        raise SystemExit(f"give at least 2 samples, and budgets above {ROWS}, the rows of most settings")
    try:
        if given.json is not None:
            given.json.parent.mkdir(parents=True, exist_ok=True)  # before all that is measured
        result = measure(given)
    except (EvomemError, OSError) as error:
        raise SystemExit(str(error)) from None
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
