"""Run: what decisions about a neural memory come to, beside the model by itself and the best of a grid: a table.

    python -m experiments.titans_gates runs/titans/gates-1 runs/titans/gates-2 runs/titans/gates-3 \
        runs/titans/random-1 runs/titans/random-2 runs/titans/random-3 --json docs/results/titans_gates.json
    python -m experiments.titans_gates --cells zoo_forgetting:256 --no-grid

Every cell is a task at a length, on sealed samples: ``own`` is the model by itself, ``no forgetting`` the model whose α
is 0, ``grid`` the best of 30 constant decisions (offsets of α and θ, and a surprise threshold), chosen by likelihood on
training samples of the first cell, with as many evaluations as a search has. Subjects are specs, and folders of
plug-ins or runs; folders ``ARM-SEED`` are one arm, whose mean over seeds is taken sample by sample. ``ahead`` is the
log-likelihood minus that of the grid, in nats a token of the answer, paired by sample. Intervals are of 95 %.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import torch

from evomem.errors import EvomemError
from evomem.evaluation import Evaluator
from evomem.evaluation.measurement import EXACT, LOGLIK, EvaluationProtocol
from evomem.managers import MemoryManager, build
from evomem.models import LoadedModel, load
from evomem.models.architectures.titans import Titans
from evomem.models.pretrained.files import write_json
from evomem.statistics import bootstrap_mean, paired_bootstrap
from evomem.tasks import Split
from evomem.tasks import build as build_task
from experiments.zoo.matrix_recall import arm_of, manager_of

OWN, UNFADING, GRID = "own", "no forgetting", "grid"
FORGET, RATE, THRESHOLD = (-2.0, -1.0, 0.0), (-0.5, 0.0), (0.0, 0.5, 0.7, 0.8, 0.9)
"""Offsets of the log-odds of alpha and of log theta, and thresholds: 30 constant decisions."""
GRID_SAMPLES = 14
"""Training samples on which the grid is judged: 420 evaluations, and a search of `titans_gates.yaml` has 432."""
CELLS = (
    "zoo_recall(pairs=32):512",
    "zoo_recall(pairs=32):1024",
    "zoo_recall(pairs=16):128",
    "zoo_recall(pairs=16):256",
    "zoo_recall(pairs=16):512",
    "zoo_forgetting:256",
)


def constant(forget: float = 0.0, momentum: float = 0.0, rate: float = 0.0, threshold: float = 0.0) -> MemoryManager:
    """Return the manager that moves the gates of all tokens alike."""
    manager = build("surprise_gate")
    with torch.no_grad():
        manager.weights[0, :, 0] = torch.tensor([forget, momentum, rate, threshold])
    return manager


def best_of_grid(loaded: LoadedModel, cell: tuple[str, int], every: int, seed: int) -> tuple[MemoryManager, str]:
    """Return the constant decision that is likeliest on training samples, and its numbers in words."""
    points = list(product(FORGET, RATE, THRESHOLD))
    managers = [constant(forget=f, rate=r, threshold=t).with_options(every=every) for f, r, t in points]
    evaluator = Evaluator(loaded, EvaluationProtocol(kind="streaming", every=every))
    task = build_task(cell[0], loaded.tokenizer, cell[1])
    samples = task.samples(Split.TRAIN, GRID_SAMPLES, seed)
    results = [evaluator.evaluate(managers, sample, task, LOGLIK) for sample in samples]
    worth = [mean([one[number].required("loglik") for one in results]) for number in range(len(points))]
    number = max(range(len(points)), key=worth.__getitem__)
    forget, rate, threshold = points[number]
    return managers[number], f"forget {forget:+g}, rate {rate:+g}, threshold {threshold:g}"


def rows_of(
    loaded: LoadedModel, entrants: Sequence[tuple[str, MemoryManager]], cell: tuple[str, int], given: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return the rows of a cell, one an arm."""
    evaluator = Evaluator(loaded, EvaluationProtocol(kind="streaming", every=given.every))
    task = build_task(cell[0], loaded.tokenizer, cell[1])
    samples = task.samples(Split.SEALED, given.samples, given.seed)
    managers = [manager.with_options(every=given.every) for _, manager in entrants]
    results = [evaluator.evaluate(managers, sample, task, EXACT) for sample in samples]
    nats: dict[str, list[list[float]]] = {}
    right: dict[str, list[list[float]]] = {}
    for number, (name, _) in enumerate(entrants):
        nats.setdefault(name, []).append([one[number].required("loglik") for one in results])
        right.setdefault(name, []).append([one[number].required("exact") for one in results])
    by_sample = {name: [mean(column) for column in zip(*seeds, strict=True)] for name, seeds in nats.items()}
    base = GRID if GRID in by_sample else OWN
    records = []
    for name, mine in by_sample.items():
        ahead = paired_bootstrap(mine, by_sample[base])
        exact = [mean(column) for column in zip(*right[name], strict=True)]
        records.append(
            {
                "memory": name, "task": cell[0], "length": cell[1], "samples": len(mine), "seeds": len(nats[name]),
                "nats": mean(mine), "nats_interval": bootstrap_mean(mine).bounds(),
                "nats_by_seed": [mean(one) for one in nats[name]], "right": mean(exact),
                "right_by_seed": [mean(one) for one in right[name]], "ahead_of": base, "ahead": ahead.mean,
                "ahead_interval": ahead.bounds(), "nats_by_sample": mine,
            }
        )  # fmt: skip
    return records


def line(record: dict[str, Any]) -> str:
    """Return a row of the table."""
    low, high = record["nats_interval"]
    least, most = record["ahead_interval"]
    seeds = " ".join(f"{one:.3f}" for one in record["nats_by_seed"]) if record["seeds"] > 1 else ""
    return (
        f"| {record['task']} | {record['length']} | {record['memory']} | {record['nats']:.3f} [{low:.3f}, {high:.3f}] "
        f"| {seeds} | {record['right']:.2f} | {record['ahead']:+.3f} [{least:+.3f}, {most:+.3f}] |"
    )


def cell_of(text: str) -> tuple[str, int]:
    """Return a task's spec and a length, which a colon separates."""
    spec, _, length = text.rpartition(":")
    if not spec or not length.isdecimal() or int(length) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a task and a length, as in zoo_recall(pairs=16):512")
    return spec, int(length)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    root = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root.add_argument("subjects", nargs="*", help="specs of managers, and folders of plug-ins or runs")
    root.add_argument("--model", default="zoo-titans-lmm", help="alias or folder of a Titans model")
    root.add_argument(
        "--cells", type=cell_of, nargs="+", default=[cell_of(one) for one in CELLS], help="tasks with their lengths"
    )
    root.add_argument("--every", type=int, default=16, help="tokens between decisions; divides a segment")
    root.add_argument("--samples", type=int, default=24, help="sealed samples of a cell")
    root.add_argument("--seed", type=int, default=0, help="of the samples")
    root.add_argument("--no-grid", action="store_true", help="without the grid; rows are set against the model itself")
    root.add_argument("--json", type=Path, help="file for the rows")
    return root


def main() -> None:
    """Measure, print, and save."""
    given = parser().parse_args()
    if given.samples < 2:
        raise SystemExit("--samples: give at least 2, so that there are intervals")
    try:
        loaded = load(given.model)
        subjects = [(arm_of(source), manager_of(source)) for source in given.subjects]
        for spec, length in given.cells:
            build_task(spec, loaded.tokenizer, length).samples(Split.SEALED, 1, given.seed)  # too short is said here
        if given.json is not None:
            given.json.parent.mkdir(parents=True, exist_ok=True)
    except (EvomemError, OSError, ValueError, KeyError) as error:
        raise SystemExit(str(error)) from None
    if not isinstance(loaded.model, Titans):
        raise SystemExit(
            f"--model {given.model}: has no neural memory; give zoo-titans-lmm, or a folder of such a model"
        )
    if given.every < 1 or loaded.model.config.segment % given.every:
        raise SystemExit(
            f"--every {given.every}: give a number that divides a segment of {loaded.model.config.segment}"
        )
    began, chosen = time.process_time(), ""
    entrants = [(OWN, build("full")), (UNFADING, constant(forget=-50.0)), *subjects]
    if not given.no_grid:
        best, chosen = best_of_grid(loaded, given.cells[0], given.every, given.seed)
        entrants.insert(2, (GRID, best))
        print(f"grid: {chosen} ({time.process_time() - began:.0f} processor seconds)", flush=True)
    records = []
    print("| task | tokens | memory | nats | by seed | right | ahead |\n|---|---|---|---|---|---|---|")
    for cell in given.cells:
        rows = rows_of(loaded, entrants, cell, given)
        records += rows
        print("\n".join(map(line, rows)), flush=True)
        if given.json is not None:
            write_json(given.json, {"model": given.model, "grid": chosen, "rows": records})
    print(f"{time.process_time() - began:.0f} processor seconds", flush=True)


if __name__ == "__main__":
    main()
