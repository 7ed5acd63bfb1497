"""Run: a warm start: where the best candidates of another run lie, found by running its driver again.

A run folder holds no populations, and needs none: a driver is a pure function of its seed and of the fitness that it is
told, and the journal has every generation's fitness. So running the driver again gives the vectors that a run has
evaluated; the hashes in the journal say whether they are the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from evomem import drivers
from evomem.bounds import LARGE
from evomem.drivers.base import Array, Fitness, Population
from evomem.drivers.warm import WarmStart
from evomem.errors import ConfigError, RunError
from evomem.files.atomic import write_vector
from evomem.runs.chunks import chunks_of, digests
from evomem.runs.driver_setup import make_driver
from evomem.runs.fitness import objective_of
from evomem.runs.folder_reading import read_numbers
from evomem.runs.front import wants_bytes
from evomem.runs.run import Run, open_run
from evomem.validation import Settings, validate


class WarmStartOption(Settings):
    """The option ``warm_start`` of a driver; a string stands for ``run``.

    Attributes
    ----------
    run : folder of another run in the same search space, finished or not.
    gamma : share of the candidates that it has evaluated, the best ones, that this search begins around.
    alpha : standard deviation, in units of the vector, added in every direction (`WarmStart`).
    """

    run: str
    gamma: float = Field(default=0.1, gt=0, le=1)
    alpha: float = Field(default=0.1, gt=0, le=LARGE, allow_inf_nan=False)


def warm_start(wanted: Any, driver: str, dim: int, folder: Path) -> WarmStart:
    """Return where a search of ``dim`` dimensions starts warm; kept in ``start/warm.npy`` of its folder.

    Parameters
    ----------
    wanted : the option ``warm_start`` as it is written, see `WarmStartOption`.
    driver : name of the driver, for messages.

    Raises
    ------
    ConfigError : the option is not valid, or the other run searched another number of dimensions.
    RunError : the other run is none, or cannot be followed (`replay`).
    """
    values = {"run": wanted} if isinstance(wanted, str) else wanted
    option = validate(WarmStartOption, values, "driver.options.warm_start")
    kept = folder / "start" / "warm.npy"
    if not kept.exists():
        run = open_run(option.run)
        if run.space.dim != dim:
            raise ConfigError(
                f"driver {driver!r}: warm_start: {run.folder} searched {run.space.dim} dimensions, this search has "
                f"{dim}; only a run in the same search space can be followed"
            )
        write_vector(kept, best_vectors(run, option.gamma))
    return WarmStart(read_numbers(kept, 2), option.alpha)


def best_vectors(run: Run, gamma: float) -> Array:
    """Return the best share ``gamma`` of a run's candidates (candidates, dim), best first; at least one.

    Those without finite fitness do not count. If the run has stages, only those of the last one that it reached do:
    fitness of different stages is of different things. Within it, fitness is compared as it was measured, on each
    generation's own samples.

    Raises
    ------
    RunError : see `replay`.
    """
    evaluated = [(population.generation, population.vectors, fitness) for population, fitness in replay(run)]
    begin = max(stage.begin for stage in run.config.plan() if stage.begin <= evaluated[-1][0])
    vectors = np.concatenate([vectors for generation, vectors, _ in evaluated if generation >= begin])
    fitness = np.concatenate([fitness for generation, _, fitness in evaluated if generation >= begin])
    order = np.argsort(-np.where(np.isfinite(fitness), fitness, -np.inf), kind="stable")
    count = int(np.isfinite(fitness).sum() * gamma)
    return np.asarray(vectors[order[: max(1, count)]])


def replay(run: Run) -> Iterator[tuple[Population, Array]]:
    """Yield every generation that a run has finished, with its fitness (candidates,), by running its driver again.

    Raises
    ------
    RunError : the run has finished no generation; it has several drivers; it has a fitness per head, which its journal
        keeps with every sample only, or learned from the bytes too; or the driver does not propose what the journal
        says was evaluated (another version of its library).
    """
    start = run.folder / "start" / "vector.npy"
    generations = run.generations()
    if not generations or not start.exists():
        raise RunError(f"{run.folder}: has not finished a generation yet; there is nothing to follow")
    stages = run.config.plan()
    if stages[-1].since:
        raise RunError(
            f"{run.folder}: its drivers took turns, and a run is followed from its first generation on; start from its "
            "winner instead (space.start: {plugin: RUN/winner/plugin})"
        )
    driver, name = (
        make_driver(run.config, run.space, read_numbers(start), run.folder),
        stages[0].driver.name,
    )
    if drivers.uses(name, "rollouts"):
        raise RunError(
            f"{run.folder}: its driver {name!r} learned from gradients, which are not kept per "
            "generation; start from its winner instead (space.start: {plugin: RUN/winner/plugin})"
        )
    if drivers.uses(name, "per_head") and any(objective_of(stage.fitness).headwise for stage in stages):
        raise RunError(
            f"{run.folder}: its driver {name!r} learned from a fitness per head, which is not kept "
            "per generation; start from its winner instead (space.start: {vector: RUN/winner/vector.npy})"
        )
    if wants_bytes(run.config):
        raise RunError(
            f"{run.folder}: its driver {name!r} learned from the measured bytes too, which are not "
            "kept per generation; start from a member of its front instead (space.start: {plugin: RUN/front/NN})"
        )
    chunks = chunks_of(run.records(), run.config.chunk)
    evaluated: dict[int, set[str]] = {}
    for record in run.records():
        if record["kind"] == "unit" and record["phase"] == "train":
            evaluated.setdefault(record["generation"], set()).add(record["candidates"])
    for finished in generations:
        population = driver.ask()
        asked = set[str]().union(*(digests(population, size) for size in chunks.sizes))
        if evaluated.get(finished.generation, set()).isdisjoint(asked):
            raise RunError(
                f"{run.folder}: generation {finished.generation} cannot be reproduced: with these versions of the "
                f"libraries, driver {name!r} proposes other candidates than the run evaluated. Start "
                "from its winner instead (space.start: {vector: RUN/winner/vector.npy})"
            )
        fitness = np.array(finished.fitness, dtype=np.float64)
        driver.tell(population, Fitness(fitness))
        yield population, fitness
