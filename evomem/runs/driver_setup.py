"""Run: its driver, made from the configuration; what a driver cannot search is refused here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evomem import drivers
from evomem.drivers.base import Array, Driver
from evomem.errors import ConfigError
from evomem.evaluation.objectives import make, objectives
from evomem.managers.stochastic import StochasticManager
from evomem.runs.config import ExperimentConfig, Stage
from evomem.runs.fitness import objective_of
from evomem.search_space.space import SearchSpace

if TYPE_CHECKING:
    from evomem.runs.bench import Bench


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
        from evomem.runs.warm_start import warm_start  # it runs another run's driver again, which is made here

        options["warm"] = warm_start(wanted, chosen.name, space.dim, folder)
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
