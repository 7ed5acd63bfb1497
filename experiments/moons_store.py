"""Run: three moons with a bounded store: which pairs may stay in a contextual memory, and for which head?

    OMP_NUM_THREADS=1 python -m experiments.moons_store --out docs/results/moons_store  # goes on where it was killed

The network of `experiments.moons` with a head for each moon reads a series; each head's pairs lie in a `PairMemory`,
and a manager decides every few observations which of them stay. Then the series is continued from what is left. A
head needs one period of its moon, so heads need unequal numbers, and what was seen again needs no second pair.
Managers: the newest (FIFO), what was read last (LRU) or most (LFU), what surprised when it was written, and policies
that store and evict, whose numbers CMA-ES searches on the triples of periods that are not sealed: one for each way to
share the budget out over heads.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evomem.drivers import Fitness, drivers
from evomem.files.atomic import write_atomically
from evomem.managers import MemoryManager, build
from evomem.managers.vector import load_vector, to_vector
from evomem.memory.explicit import ExplicitCache, PairMemory
from evomem.models.architectures.mosaic_cache import UnitMemory
from evomem.statistics import percentile_interval
from evomem.tasks.base import Split
from evomem.tasks.streams.moons import MOONS, orbits
from experiments.moons import AHEAD, LENGTH, MoonsMosaic, observed

BUDGET = 20
"""Pairs a head on average: 60 of 717, a twelfth. The moons that are held out need 12, 18 and 24."""
EVERY = 4
"""Observations between two decisions."""
POPSIZE = 8
"""Policies of a generation of CMA-ES."""
FEATURES = ("surprise", "recency", "frequency", "age")
POLICY = (
    f"kv_policy(actions=['evict', 'store'], features={list(FEATURES)}, scale=model, hidden=0, knots=1, "
    "odds=0, allocation=across_heads)"
)
"""Nine numbers: weights of the features for evicting and for storing, and the log-odds to store. One ranking for all
heads, so that the budget over heads follows from the scores."""
POLICIES: Mapping[str, str] = {
    "evolved": POLICY,
    "evolved, shares per head": POLICY.replace("across_heads", f"per_head_shares(layers=1, heads={MOONS})"),
    "evolved, equal split": POLICY.replace("across_heads", "uniform"),
}
"""What is searched, by name: one policy under one ranking, with a learned share a head, and under equal budgets."""
FIELD: Mapping[str, tuple[str, dict[str, float]]] = {
    "full": ("full", {}),
    "random": ("random", {}),
    "FIFO": ("feature_scorer(features=['age'], sinks=0, recent=0)", {"age": -1}),
    "LRU": ("feature_scorer(features=['recency'], sinks=0, recent=0)", {"recency": -1}),
    "LFU": ("feature_scorer(features=['frequency'], sinks=0, recent=0)", {"frequency": 1}),
    "surprise, equal split": ("feature_scorer(features=['surprise'], sinks=0, recent=0)", {"surprise": 1}),
    "surprise, one ranking": (POLICY.replace("'evict', 'store'", "'evict'"), {"surprise": 1}),
}
"""Managers by name: spec, and the weights of its features."""


def manager_of(name: str, vector: np.ndarray | None = None, budget: int = BUDGET) -> MemoryManager:
    """Return a manager of the field, or a policy of `POLICIES` with a vector's numbers."""
    spec, weights = (POLICIES[name], {}) if vector is not None else FIELD[name]
    manager = build(spec, budget=None if name == "full" else budget)
    if vector is not None:
        load_vector(manager, vector)
    elif weights:
        with torch.no_grad():
            for feature, weight in weights.items():
                manager.weights[..., manager.options.features.index(feature)] = weight  # type: ignore[index]
    return manager.requires_grad_(False)


def series_of(split: Split, starts: int, first: int = 0) -> Tensor:
    """Return ``starts`` series (rows, LENGTH + AHEAD, 2 * MOONS) of every triple of a split."""
    places = range(first, first + 311 * starts, 311)
    return torch.cat([observed(moons, LENGTH + AHEAD, places) for moons in orbits(split, LENGTH, whole=True)])


@torch.no_grad()
def read(model: MoonsMosaic, series: Tensor, manager: MemoryManager, every: int = EVERY) -> ExplicitCache:
    """Read series (rows, observations, 2 * MOONS); return what is stored of them: one layer, a head for each moon."""
    keys = model.unit.keys(series, None, UnitMemory())
    values = model.unit.values.projected(series)
    memory = PairMemory(observes=manager.observes, beta=model.unit.bandwidth.beta)
    cache = ExplicitCache([memory], manager)
    count = series.shape[1] - 1  # the newest observation's pair waits for the next one
    names = torch.arange(count).expand(*keys.shape[:2], count)
    for begin in range(0, count, every):
        part = slice(begin, min(begin + every, count))
        memory.feed(keys[:, :, part], values[:, :, part.start + 1 : part.stop + 1], names[:, :, part])
        cache.decide()
    return cache


@torch.no_grad()
def measure(model: MoonsMosaic, series: Tensor, manager: MemoryManager, every: int = EVERY) -> dict[str, Any]:
    """Return the error of every row's continuation, and what was stored for it.

    series : (rows, LENGTH + AHEAD, 2 * MOONS). Nothing is written while it is continued.
    """
    cache = read(model, series[:, :LENGTH], manager, every)
    memory = cache.layers[0]
    assert isinstance(memory, PairMemory)
    x, made = series[:, LENGTH - 1 : LENGTH], []
    for _ in range(AHEAD):
        said = memory.read(model.unit.keys(x, None, UnitMemory()))
        x = model.out(said.transpose(1, 2).flatten(2))
        made.append(x)
    wrong = (torch.cat(made, 1) - series[:, LENGTH:]).abs().mean((1, 2))
    pairs = cache.slots_held()[0].float()
    return {
        "errors": [round(error, 5) for error in wrong.tolist()],
        "pairs": round(float(pairs.sum(-1).mean()), 1),
        "pairs_by_head": [round(count, 1) for count in pairs.mean(0).tolist()],
        "bytes": int(cache.bytes_by_row().float().mean()),
    }


def search(
    model: MoonsMosaic, seed: int, *, generations: int, popsize: int, name: str = "evolved", budget: int = BUDGET
) -> tuple[np.ndarray, list[float]]:
    """Return the numbers of a policy that CMA-ES finds, and the best fitness of each generation.

    Fitness: minus the mean error on series of the triples that are not sealed, drawn anew for each generation.
    """
    start = to_vector(build(POLICIES[name], budget=budget))
    driver = drivers.get("cmaes")(len(start), start, seed, popsize=popsize, sigma=1.0)
    history = []
    for generation in range(generations):
        lessons = torch.cat(
            [series_of(split, 1, 7 * (1 + generation) + 1000 * seed) for split in (Split.TRAIN, Split.SELECT)]
        )
        population = driver.ask()
        managers = [manager_of(name, one, budget) for one in population.vectors]
        worth = [-float(np.mean(measure(model, lessons, one)["errors"])) for one in managers]
        driver.tell(population, Fitness(np.array(worth)))
        history.append(max(worth))
    return driver.mean, history


def known_results(path: Path) -> dict[str, Any]:
    """Return the rows that a file of this script holds; end the program where it holds something else."""
    try:
        results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not all(np.isfinite(row["errors"]).all() and len(row["errors"]) for row in results.values()):
            raise ValueError("an error is no number")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SystemExit(
            f"{path}: holds no rows that this script has written ({error!r}); name another --out"
        ) from None
    return results


def main() -> None:
    """Measure the field, search, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/moons_store"), help="JSON, without its suffix")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--generations", type=int, default=12)
    parser.add_argument("--popsize", type=int, default=POPSIZE)
    parser.add_argument("--starts", type=int, default=32, help="sealed series")
    parser.add_argument("--budget", type=int, default=BUDGET, help="pairs a head on average")
    options = parser.parse_args()
    if options.budget < 1:
        parser.error(f"--budget {options.budget}: a head keeps at least one pair")
    for what, least in (("seeds", 0), ("generations", 1), ("popsize", 2), ("starts", 1)):
        if getattr(options, what) < least:
            parser.error(f"--{what} {getattr(options, what)}: give at least {least}")
    model, sealed = MoonsMosaic.given(MOONS), series_of(Split.SEALED, options.starts, 100_000)
    path = options.out.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    results = known_results(path)
    if other := {row.get("budget", BUDGET) for row in results.values()} - {options.budget}:
        parser.error(f"{path} was measured with --budget {min(other)}: name another --out for {options.budget}")
    for what, there in (
        ("starts", {len(row["errors"]) for row in results.values()}),
        ("generations", {len(row["fitness"]) for row in results.values() if "fitness" in row}),
        ("popsize", {row.get("popsize", POPSIZE) for row in results.values() if "fitness" in row}),
    ):
        if other := there - {getattr(options, what)}:
            parser.error(f"{path} was made with --{what} {min(other)}: name another --out for {getattr(options, what)}")
    for name in FIELD.keys() - results.keys():
        results[name] = measure(model, sealed, manager_of(name, budget=options.budget)) | {"budget": options.budget}
    write_atomically(path, (json.dumps(results) + "\n").encode())
    for policy, seed in ((policy, seed) for policy in POLICIES for seed in range(options.seeds)):
        name, begun = f"{policy}, seed {seed}", time.process_time()
        if name in results:
            continue
        vector, history = search(
            model, seed, generations=options.generations, popsize=options.popsize, name=policy, budget=options.budget
        )
        results[name] = measure(model, sealed, manager_of(policy, vector, options.budget))
        results[name] |= {
            "budget": options.budget,
            "popsize": options.popsize,
            "vector": vector.tolist(),
            "fitness": history,
        }
        results[name]["cpu_seconds"] = round(time.process_time() - begun, 1)
        write_atomically(path, (json.dumps(results) + "\n").encode())
    report(results)


def report(results: Mapping[str, Any]) -> None:
    """Print a row for every manager, with its paired difference to the best of random, FIFO, LRU and LFU."""
    best = np.array(min((results[name]["errors"] for name in ("random", "FIFO", "LRU", "LFU")), key=np.mean))
    for name in (*FIELD, *sorted(results.keys() - FIELD.keys())):
        row = results[name]
        gap = percentile_interval(np.array(row["errors"]) - best)
        split = ", ".join(f"{count:.0f}" for count in row["pairs_by_head"])
        print(
            f"| {name} | {np.mean(row['errors']):.4f} | {gap.mean:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}] | "
            f"{row['pairs']:.0f} ({split}) | {row['bytes']:,} |"
        )


if __name__ == "__main__":
    main()
