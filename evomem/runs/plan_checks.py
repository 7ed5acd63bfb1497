"""Run: plans that no search can follow are refused: an objective, a driver and a space that do not fit together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomem import drivers
from evomem.errors import ConfigError
from evomem.evaluation.objectives import Objective, make, objectives
from evomem.managers.stochastic import StochasticManager
from evomem.runs.config import ExperimentConfig, Stage
from evomem.runs.experiment_parts import FitnessConfig
from evomem.runs.fitness import objective_of
from evomem.runs.front import check_bytes_may_vary
from evomem.runs.searched_part import searched_coordinates, searched_options
from evomem.search_space.space import SearchSpace

if TYPE_CHECKING:
    from evomem.runs.bench import Bench


def check_objectives(config: ExperimentConfig) -> None:
    """Raise `ConfigError` if a stage measures what does not exist, or not what its driver needs."""
    for stage in config.plan():
        rollouts = drivers.uses(stage.driver.name, "rollouts")
        objective = objective_of(stage.fitness)
        what = f"stage {stage.name!r}: fitness.objective {stage.fitness.objective!r}"
        check_normalisation(what, objective, stage.fitness)
        for model in {task.model or config.model.name for task in stage.tasks}:
            kind = config.protocol_on(model).kind
            where = f" on model {model!r}" if len(config.all_models) > 1 else ""
            if kind not in objective.protocols:
                kinds = " or ".join(sorted(objective.protocols))
                why = ": one decision about a whole context" if kinds == "compress_once" else ""
                raise ConfigError(f"{what} needs protocol.kind {kinds}{where}{why}")
            if stage.fitness.reading and (kind != "streaming" or not rollouts):
                raise ConfigError(
                    f"{what}: fitness.reading is for rollouts (driver policy_gradient) in protocol streaming{where}"
                )
        if stage.fitness.discount < 1 and not stage.fitness.reading:
            raise ConfigError(
                f"{what}: fitness.discount is of what is read between decisions; set fitness.reading, or leave it at 1"
            )
    kinds_of_all = {config.protocol_on(model.name).kind for model in config.all_models}
    if config.diagnostics.every and kinds_of_all != {"compress_once"}:
        raise ConfigError("diagnostics.every: a look at the oracle needs protocol.kind compress_once; leave it out")
    check_bytes_may_vary(config)


def check_normalisation(what: str, objective: Objective, fitness: FitnessConfig) -> None:
    """Raise `ConfigError` if a fitness cannot be normalised as it says.

    Parameters
    ----------
    what : names the stage and the objective.
    """
    if fitness.normalise == "full" and objective.against_full == "nothing":
        raise ConfigError(f"{what}: the full cache has no such value to normalise by; leave normalise out")
    if fitness.normalise != "range":
        return
    if objective.without_context is None:
        able = [name for name in objectives if make(name).without_context is not None]
        raise ConfigError(
            f"{what}: what it is worth to have read nothing is not known, so fitness.normalise range has no zero; take "
            f"objective {' or '.join(able)}, or fitness.normalise full"
        )
    if fitness.reading:
        raise ConfigError(
            f"{what}: fitness.reading adds nats, and fitness.normalise range is a share without a unit; take "
            "fitness.normalise full"
        )


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


def check_policies(config: ExperimentConfig, space: SearchSpace) -> None:
    """`check_policy` of every driver whose turn will come, before contexts are read for a calibration."""
    for stage in config.plan():
        if drivers.uses(stage.driver.name, "rollouts"):
            check_policy(config, space, [stage])


def check_policy(config: ExperimentConfig, space: SearchSpace, stages: Sequence[Stage]) -> None:
    """Raise `ConfigError` if a policy gradient cannot search this space by these stages' objectives."""
    name = config.space.manager.name
    for stage in stages:
        driver, objective = stage.driver, objective_of(stage.fitness)
        if options := searched_options(space, searched_coordinates(space, stage)):
            raise ConfigError(
                f"driver {driver.name!r}: space.options: {', '.join(options)} vary, and options have "
                "no gradient; leave them out, or take a driver of evolution"
            )
        if not objective.exact_gradient and not isinstance(space.template, StochasticManager):
            raise ConfigError(
                f"driver {driver.name!r}: stage {stage.name!r}: manager {name!r} draws no decisions, so its "
                f"objective {stage.fitness.objective!r} has no gradient; take objective expected_cost, which has an "
                "exact one for every manager that scores, or manager kv_policy"
            )
        if isinstance(space.template, StochasticManager) and not (objective.exact_gradient or objective.compares_draws):
            for budget in stage.budgets or (space.template.options.budget,):
                try:
                    space.template.with_options(budget=budget).require_draws()
                except ConfigError as error:
                    raise ConfigError(
                        f"driver {driver.name!r}: stage {stage.name!r}: objective {stage.fitness.objective!r} draws "
                        f"decisions of manager {name!r}, and cannot: {error}"
                    ) from None
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
