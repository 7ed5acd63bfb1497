"""Driver: what a driver itself takes per generation, ask and tell; evaluation and checkpoints are not part of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.measuring import Line, Setting, line, progress
from evomem.drivers import Fitness, Stage, build

NAME = "driver.ask_tell_ms"
DIM = 4172
"""Numbers of a NAMM with backward attention memory (`search_spaces/namm_bam.yaml`)."""
FULL_DIM = 200
"""For drivers with a full covariance, whose cost per generation grows with the cube of the dimension."""
WARM_UP = 3

LARGE = ("random_search", "evotorch_cmaes", "snes", "pgpe", "cem")
FULL = ("cmaes", "evotorch_cmaes", "xnes", "lra_cma", "catcma")
NAMES = (NAME, *(f"{NAME}.{name}" for name in (*LARGE, "block_cmaes")), *(f"{NAME}.{name}_{FULL_DIM}" for name in FULL))


def generations(name: str, dim: int, popsize: int, count: int, **options: Any) -> list[float]:
    """Return the milliseconds of ``count`` generations on the sphere, after some that are not counted."""
    driver = build(name, dim, np.ones(dim), 0, sigma=0.3, popsize=popsize, **options)
    blocks = options.get("blocks")
    if blocks:
        driver.enter(Stage(per_head=True))
    taken = []
    for _ in range(WARM_UP + count):
        begin = time.perf_counter()
        population = driver.ask()
        asked = time.perf_counter() - begin
        squares = population.vectors**2
        heads = -np.stack([squares[:, block].sum(axis=1) for block in blocks], axis=1) if blocks else None
        fitness = Fitness(-squares.sum(axis=1), per_head=heads)
        begin = time.perf_counter()
        driver.tell(population, fitness)
        taken.append(1e3 * (asked + time.perf_counter() - begin))
    return taken[WARM_UP:]


def run(setting: Setting) -> Iterator[Line]:
    """Milliseconds per generation: the default driver at NAMM's size, then the others, one after the other."""
    count, popsize = setting.rounds(40), setting.sizes.population
    blocks = [np.arange(46 * head, 46 * (head + 1)) for head in range(90)]
    cases: list[tuple[str, str, int, dict[str, Any]]] = [
        (NAME, "cmaes", DIM, {}),
        *((f"{NAME}.{name}", name, DIM, {}) for name in LARGE),
        (f"{NAME}.block_cmaes", "block_cmaes", DIM, {"blocks": blocks}),
        *((f"{NAME}.{name}_{FULL_DIM}", name, FULL_DIM, {}) for name in FULL),
    ]
    for done, (label, name, dim, options) in enumerate(cases, start=1):
        values = generations(name, dim, popsize, count, **options)
        progress(NAME, done, len(cases), f"{name} in {dim} dimensions: {np.median(values):.1f} ms")
        yield line(label, values, "ms")
