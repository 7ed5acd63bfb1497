"""Runs that differ in their seed only, pooled: arms of an experiment from the samples of comparisons, as tables.

    python -m experiments.pool_seeds docs/results/forgetting.samples.jsonl
    python -m experiments.pool_seeds docs/results/policy_needle.samples.jsonl \
        docs/results/policy_needle_evolved.samples.jsonl --arm policy_needle_evolved=needle-evolved

A subject ``runs/x/ARM-SEED`` belongs to ``ARM``; others are arms of their own, unless ``--arm`` says otherwise (by the
whole subject or the last part of its path). Several
comparisons must be of the same samples. The mean over an arm's seeds is taken sample by sample; differences of
the first arm to the others are resampled over samples (95 %, 10,000 draws); the last column says how far
searches differ. Of `evomem.tasks.text.zoo_forgetting`, samples with an even number ask for restated keys.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from evomem.statistics import percentile_interval


def arm(subject: str, given: Mapping[str, str]) -> str:
    """Return the arm of a subject: as given, or the last part of its path without the seed (``-0``), if it has one."""
    name = Path(subject).name if "/" in subject else subject
    before, _, seed = name.rpartition("-")
    without = before if "/" in subject and before and seed.isdigit() else name
    return given.get(subject, given.get(name, without))


def interval(differences: np.ndarray) -> str:
    """Return mean and 95 % bootstrap interval of differences (samples,)."""
    found = percentile_interval(differences)
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


class Samples:
    """Evaluations of all subjects of some comparisons, sample by sample.

    Attributes
    ----------
    subjects : (arm, subject, budget) of each place.
    names : of the samples.
    """

    def __init__(self, paths: Sequence[Path], given: Mapping[str, str]) -> None:
        self.subjects: list[tuple[str, str, float | None]] = []
        self._columns: list[list[dict]] = []
        self.names: list[str] = []
        for path in paths:
            head, *lines = (json.loads(line) for line in path.read_text().splitlines())
            lines = [line for line in lines if "evaluations" in line]
            names = [line["sample"] for line in lines]
            if self.names and names != self.names:
                raise SystemExit(
                    f"{path}: other samples than those of {paths[0]}; comparisons must be of the same ones"
                )
            self.names = names
            for place, manager in enumerate(head["managers"]):
                found = (arm(manager[0], given), manager[0], manager[1])
                if found in self.subjects:  # the field, measured in two comparisons
                    continue
                self.subjects.append(found)
                self._columns.append([line["evaluations"][place] for line in lines])

    def values(self, key: str, name: str, budget: float | None) -> np.ndarray:
        """Return a number of an arm at a budget: (samples, seeds); NaN where it was not measured."""
        places = [n for n, (own, _, at) in enumerate(self.subjects) if own == name and at in (budget, None)]
        found = [[np.nan if one.get(key) is None else one[key] for one in self._columns[place]] for place in places]
        return np.array(found, dtype=np.float64).T


def table(samples: Samples, budget: float | None) -> str:
    """Return the arms at one budget as a table in Markdown."""
    names = list(dict.fromkeys(name for name, _, at in samples.subjects if at in (budget, None)))
    kinds: dict[str, np.ndarray] = {}
    if samples.names[0].startswith("zoo_forgetting"):
        restated = np.array([int(name.rpartition("/")[2]) % 2 == 0 for name in samples.names])
        kinds = {"restated keys": restated, "stated once": ~restated}
    rows = []
    for name in names:
        cells = []
        for key in ("loglik", "exact"):
            first, own = samples.values(key, names[0], budget), samples.values(key, name, budget)
            if not np.isnan(own).any():
                cells += [f"{own.mean():.3f}", interval(first.mean(1) - own.mean(1))]
        loglik, exact = (samples.values(key, name, budget) for key in ("loglik", "exact"))
        cells += [f"{exact[kind].mean():.2f} ({loglik[kind].mean():.2f})" for kind in kinds.values()]
        cells.append(f"{samples.values('bytes_mean', name, budget).mean() / 1024:,.0f}")
        cells.append(" ".join(f"{value:.3f}" for value in loglik.mean(0)))
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    exact = ["exact", "first arm's advantage"] * (not np.isnan(samples.values("exact", names[0], budget)).any())
    titles = ["arm", "nats", "first arm's advantage", *exact, *kinds, "KiB", "nats by seed"]
    return "\n".join(["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|", *rows])


def main() -> None:
    """Print a table for every budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", nargs="+", type=Path, help="samples.jsonl of comparisons, the first arm's first")
    parser.add_argument("--arm", action="append", default=[], metavar="SUBJECT=ARM", help="where a subject belongs")
    given = parser.parse_args()
    samples = Samples(given.samples, dict(pair.split("=", 1) for pair in given.arm))
    budgets = dict.fromkeys(at for _, _, at in samples.subjects if at is not None)
    for budget in budgets or [None]:
        print(f"{budget} slots per head, {len(samples.names)} samples\n\n{table(samples, budget)}\n")


if __name__ == "__main__":
    main()
