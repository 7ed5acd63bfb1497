"""Run: its driver, made from the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evomem import drivers
from evomem.drivers.base import Array, Driver
from evomem.errors import ConfigError
from evomem.runs.config import ExperimentConfig, Stage
from evomem.runs.fitness import objective_of
from evomem.runs.plan_checks import check_policy
from evomem.runs.searched_part import searched_blocks, searched_coordinates, searched_variables
from evomem.search_space.space import SearchSpace

if TYPE_CHECKING:
    pass


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
    searched = searched_coordinates(space, stage)
    if "blocks" in kind.takes:
        options["blocks"] = searched_blocks(space, searched)
    if "variables" in kind.takes:
        options["variables"] = searched_variables(space, searched)
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
        if stage.searches is not None:
            raise ConfigError(
                f"stage {stage.name!r}: driver.options.warm_start: the other run searched whole vectors, and this "
                "stage searches a part of them; leave one out"
            )
        from evomem.runs.warm_start import warm_start  # it runs another run's driver again, which is made here

        options["warm"] = warm_start(wanted, chosen.name, space.dim, folder)
    # Two drivers of one kind must not draw the same candidates around their starts.
    seed = int(np.random.SeedSequence([config.seed, stage.since]).generate_state(1)[0]) if stage.since else config.seed
    if stage.searches is None:
        return drivers.build(chosen.name, space.dim, start, seed, **options)
    inner = drivers.build(chosen.name, len(searched), np.asarray(start)[searched], seed, **options)
    return drivers.SubspaceDriver(inner, searched, start)
