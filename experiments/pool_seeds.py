"""Runs that differ in their seed only, pooled: arms of an experiment from the samples of one comparison, as a table.

    python -m experiments.pool_seeds docs/results/forgetting.samples.jsonl

A subject ``runs/x/ARM-SEED`` belongs to ``ARM``. The mean over an arm's seeds is taken sample by sample; differences of
the first arm to the others are resampled over samples (95 %, 10,000 draws); the last column says how far
searches differ. Samples with an even number ask for restated keys (`evomem.tasks.zoo_forgetting`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np


def arm(subject: str) -> str:
    """Return the arm of a subject: the last part of its path without the seed."""
    return Path(subject).name.rpartition("-")[0] if "/" in subject else subject


def interval(differences: np.ndarray) -> str:
    """Return mean and 95 % bootstrap interval of differences (samples,)."""
    draws = np.random.default_rng(0).integers(0, len(differences), (10_000, len(differences)))
    low, high = np.quantile(differences[draws].mean(1), (0.025, 0.975))
    return f"{differences.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def table(path: Path) -> str:
    """Return the arms of a comparison at one budget on one task as a table in Markdown."""
    head, *lines = (json.loads(line) for line in path.read_text().splitlines())
    lines = [line for line in lines if "evaluations" in line]
    names = [arm(manager[0]) for manager in head["managers"]]
    restated = np.array([int(line["sample"].rpartition("/")[2]) % 2 == 0 for line in lines])

    def values(key: str, name: str) -> np.ndarray:
        places = [place for place, other in enumerate(names) if other == name]
        return np.array([[line["evaluations"][place][key] for place in places] for line in lines])

    rows = []
    for name in dict.fromkeys(names):
        loglik, exact = values("loglik", name), values("exact", name)
        better = [interval(values(k, names[0]).mean(1) - values(k, name).mean(1)) for k in ("loglik", "exact")]
        kinds = [f"{exact[kind].mean():.2f} ({loglik[kind].mean():.2f})" for kind in (restated, ~restated)]
        seeds = " ".join(f"{value:.2f}" for value in loglik.mean(0))
        kib = values("bytes_mean", name).mean() / 1024
        cells = [f"{loglik.mean():.3f}", better[0], f"{exact.mean():.3f}", better[1], *kinds, f"{kib:,.0f}", seeds]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    titles = "arm|nats|first arm's advantage|exact|first arm's advantage|restated keys|stated once|KiB|nats by seed"
    return "\n".join(["| " + titles.replace("|", " | ") + " |", "|---" * 9 + "|", *rows])


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(table(Path(name)))
