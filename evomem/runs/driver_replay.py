"""Run: its driver: made from the configuration, started warm from another run, or run again on recorded fitness.

A run folder holds no populations, and needs none: a driver is a pure function of its seed and of the fitness that it is
told, and the journal has every generation's fitness. So the vectors that a run has evaluated are found by running its
driver again; the hashes in the journal say whether they are the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from evomem import drivers
from evomem.bounds import LARGE
from evomem.drivers.base import Array, Driver, Fitness, Population
from evomem.drivers.warm import WarmStart
from evomem.errors import ConfigError, RunError
from evomem.evaluation.objectives import make, objectives
from evomem.files.atomic import write_vector
from evomem.managers.stochastic import StochasticManager
from evomem.runs.chunks import chunks_of
from evomem.runs.config import ExperimentConfig, Stage
from evomem.runs.fitness import objective_of
from evomem.runs.folder_reading import read_numbers
from evomem.runs.front import wants_bytes
from evomem.search_space.space import SearchSpace
from evomem.validation import Settings, validate
from evomem.workers.units import digest

if TYPE_CHECKING:
    from evomem.runs.bench import Bench
    from evomem.runs.run import Run


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


def make_driver(
    config: ExperimentConfig, space: SearchSpace, start: Array, folder: Path, stage: Stage | None = None
) -> Driver:
    """Return a driver of the run as it is before its first generation.

    Parameters
    ----------
    start : (dim,) first vector.
    folder : of the run; what a warm start found is kept in ``start/warm.npy``, so that the run depends on no other.
    stage : with which the driver's turn begins; the first one if None.

    Raises
    ------
    ConfigError : options that the driver does not have; a warm start from a run that does not fit.
    RunError : the other run is none, or cannot be followed.
    """
    plan = config.plan()
    stage = plan[0] if stage is None else stage
    turn, chosen = [one for one in plan if one.since == stage.since], stage.driver
    kind = drivers.drivers.get(chosen.name)
    headwise = any(objective_of(one.fitness).headwise for one in turn)
    if len(config.all_models) > 1 and headwise and drivers.uses(chosen.name, "per_head"):
        raise ConfigError(
            "fitness.objective: one that gives every head a fitness of its own is for one model: heads of different "
            "models are not the same heads"
        )
    options: dict[str, Any] = {
        "sigma": chosen.sigma or space.sigma,
        "popsize": chosen.population,
        **chosen.options,
    }
    if drivers.uses(chosen.name, "rollouts"):
        check_policy(config, space, turn)
    if "blocks" in kind.takes:
        options["blocks"] = space.blocks()
    if "variables" in kind.takes:
        options["variables"] = space.variables()
    wanted = options.pop("warm_start", None)
    if wanted is not None:
        if "warm" not in kind.takes:
            able = [name for name in drivers.drivers if "warm" in drivers.drivers.get(name).takes]
            raise ConfigError(f"driver {chosen.name!r} has no option warm_start; it is one of {', '.join(able)}")
        if stage.since:
            raise ConfigError(
                f"stage {stage.name!r}: driver.options.warm_start: this driver begins where the one before it ended; "
                "leave it out"
            )
        options["warm"] = _warm_start(wanted, chosen.name, space.dim, folder)
    # Two drivers of one kind must not draw the same candidates around their starts.
    seed = int(np.random.SeedSequence([config.seed, stage.since]).generate_state(1)[0]) if stage.since else config.seed
    return drivers.build(chosen.name, space.dim, start, seed, **options)


def check_heads(config: ExperimentConfig, space: SearchSpace, bench: Bench) -> None:
    """Raise `ConfigError` if a driver is to search head by head and the space has other heads than the model.

    Nothing is said of a bench whose evaluator does not tell its model's heads (`Evaluator.kv_heads`).
    """
    kind, kv_heads = type(space.template), getattr(bench.evaluator, "kv_heads", None)
    stages = [
        stage
        for stage in config.plan()
        if objective_of(stage.fitness).headwise and drivers.uses(stage.driver.name, "per_head")
    ]
    if not stages or kv_heads is None or not space.blocks():
        return
    there = kv_heads()
    for name, parameter in space.template.named_parameters():
        layers, heads = (*parameter.shape, 0, 0)[:2]
        if name in kind.head_parameters and there != [heads] * layers:
            counts = sorted(set(there))
            raise ConfigError(
                f"stage {stages[0].name!r}: driver {stages[0].driver.name!r} searches every head by itself, and the "
                f"search space has {layers} layers of {heads} heads (space.manager.options: layers, heads), but model "
                f"{config.model.name!r} has {len(there)} layers of {' or '.join(map(str, counts))} KV heads; "
                + (
                    f"set space.manager.options.layers={len(there)} and space.manager.options.heads={counts[0]}"
                    if len(counts) == 1
                    else "take another driver, or an objective that gives heads no fitness of their own"
                )
            )


def check_policy(config: ExperimentConfig, space: SearchSpace, stages: Sequence[Stage]) -> None:
    """Raise `ConfigError` if a policy gradient cannot search this space by these stages' objectives."""
    name = config.space.manager.name
    for stage in stages:
        driver, objective = stage.driver, objective_of(stage.fitness)
        if config.space.options:
            raise ConfigError(
                f"driver {driver.name!r}: space.options: {', '.join(config.space.options)} vary, and options have "
                "no gradient; leave them out, or take a driver of evolution"
            )
        if not objective.exact_gradient and not isinstance(space.template, StochasticManager):
            raise ConfigError(
                f"driver {driver.name!r}: stage {stage.name!r}: manager {name!r} draws no decisions, so its "
                f"objective {stage.fitness.objective!r} has no gradient; take objective expected_cost, which has an "
                "exact one for every manager that scores, or manager kv_policy"
            )
        rollouts = driver.population or 8
        if objective.compares_draws and (
            driver.options.get("estimator") == "grpo" or (config.chunk or rollouts) < rollouts
        ):
            raise ConfigError(
                f"driver {driver.name!r}: stage {stage.name!r}: objective {stage.fitness.objective!r} compares "
                f"the rollouts of a context head by head where they are drawn: take estimator reinforce, and a "
                f"chunk of at least the population ({rollouts})"
            )
        if "rollouts" not in objective.feeds:
            able = [name for name in objectives if "rollouts" in make(name).feeds]
            raise ConfigError(
                f"driver {driver.name!r}: stage {stage.name!r}: objective {stage.fitness.objective} is for evolution; "
                f"take one of {', '.join(able)}"
            )


def _warm_start(wanted: Any, driver: str, dim: int, folder: Path) -> WarmStart:
    values = {"run": wanted} if isinstance(wanted, str) else wanted
    option = validate(WarmStartOption, values, "driver.options.warm_start")
    kept = folder / "start" / "warm.npy"
    if not kept.exists():
        from evomem.runs.run import open_run  # it imports the search, which imports this

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
    told = [(population.generation, population.vectors, fitness) for population, fitness in replay(run)]
    begin = max(stage.begin for stage in run.config.plan() if stage.begin <= told[-1][0])
    vectors = np.concatenate([vectors for generation, vectors, _ in told if generation >= begin])
    fitness = np.concatenate([fitness for generation, _, fitness in told if generation >= begin])
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
    for told in generations:
        population = driver.ask()
        asked = set[str]().union(*(digests(population, size) for size in chunks.sizes))
        if evaluated.get(told.generation, set()).isdisjoint(asked):
            raise RunError(
                f"{run.folder}: generation {told.generation} cannot be reproduced: with these versions of the "
                f"libraries, driver {name!r} proposes other candidates than the run evaluated. Start "
                "from its winner instead (space.start: {vector: RUN/winner/vector.npy})"
            )
        fitness = np.array(told.fitness, dtype=np.float64)
        driver.tell(population, Fitness(fitness))
        yield population, fitness


def digests(population: Population, chunk: int) -> set[str]:
    """Return what the journal calls the candidates of a population, a chunk each (`Unit.digest`)."""
    parts = [slice(begin, begin + chunk) for begin in range(0, len(population.vectors), chunk)]
    return {digest(population.vectors[part], population.seeds[part]) for part in parts}
