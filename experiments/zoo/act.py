"""Zoo: let a Decision Transformer act in sealed episodes with managed memory, and print what eviction costs in return.

OMP_NUM_THREADS=1 python -m experiments.zoo.act tmaze --budgets 24,48
OMP_NUM_THREADS=1 python -m experiments.zoo.act cartpole knorm runs/mine/winner/plugin --budgets 8,24
"""

from __future__ import annotations

import argparse
from random import Random
from statistics import mean
from typing import Any

from evomem import plugins
from evomem.evaluation.episode_return import rollout
from evomem.managers import MemoryManager, build
from evomem.models import load
from evomem.statistics import bootstrap_mean
from evomem.tasks import Split
from evomem.tasks.episodes.environments import DISTURBED, STEPS, Maze, cart, cart_seed, maze_seed

FIELD = ("random", "streaming_llm", "knorm", "h2o", "snapkv", "keydiff", "expected_attention")


def manager_of(source: str) -> MemoryManager:
    """Return the manager of a plug-in folder or a spec."""
    return plugins.load(source) if "/" in source else build(source)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("tmaze", "cartpole"))
    parser.add_argument("managers", nargs="*", default=list(FIELD))
    parser.add_argument("--budgets", default="24,48")
    parser.add_argument("--episodes", type=int, default=30)
    parser.add_argument("--every", type=int, default=24, help="tokens between decisions")
    given = parser.parse_args()
    loaded = load(f"zoo-{given.name}")
    random, sealed = Random(0), Split.SEALED
    told: dict[str, Any]
    if given.name == "tmaze":
        env, told = Maze(), {"target": 6.0}
        seeds = [maze_seed(random, sealed, env) for _ in range(given.episodes)]
    else:
        env, told = cart(), {"target": float(STEPS), "options": DISTURBED}
        seeds = [cart_seed(random, sealed) for _ in range(given.episodes)]
    entrants: list[tuple[str, int | None]] = [("full", None)]
    entrants += [(source, int(budget)) for budget in given.budgets.split(",") for source in given.managers]
    print("| manager | slots kept | return (95 % interval) | KiB at the peak |\n|---|---|---|---|")
    for source, budget in entrants:
        manager = manager_of(source) if budget is None else manager_of(source).with_options(budget=budget)
        found = [rollout(loaded, manager, env, seed=seed, every=given.every, **told) for seed in seeds]
        totals, size = [one.total for one in found], mean(one.bytes_peak for one in found) / 1024
        low, high = bootstrap_mean(totals).bounds()
        print(f"| {source} | {budget or ''} | {mean(totals):.2f} ({low:.2f} to {high:.2f}) | {size:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
