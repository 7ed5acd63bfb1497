"""Run: the configuration of one search, an *experiment*; it is kept resolved in the run's folder."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from evomem.bounds import BYTES, CONTEXTS, GENERATIONS, LISTED, POPULATION, SEED, UNITS
from evomem.errors import ConfigError
from evomem.evaluation.measurement import EvaluationProtocol
from evomem.runs.experiment_parts import (
    Budget,
    DiagnosticsConfig,
    DriverConfig,
    FitnessConfig,
    ModelConfig,
    SealedConfig,
    SelectConfig,
    StageConfig,
    TaskConfig,
    by_name,
    checked_budgets,
    task_list,
)
from evomem.search_space.space import SpaceConfig
from evomem.validation import Settings


class ExperimentConfig(Settings):
    """One search. See `experiments/` for examples.

    Attributes
    ----------
    seed : of everything random: driver, minibatches, samples.
    model, models : one model, or a list of several: then every task is done on each of them (`TaskConfig.model` limits
        it to one), and all count alike. ``model`` is the first.
    tasks, samples_per_generation, train_contexts : each generation draws so many contexts per task from a pool of
        ``train_contexts``, the same for all candidates (common random numbers); every context is used once before any
        is used again.
    protocol : when managers decide, on models that have no protocol of their own (`ModelConfig.protocol`).
    budgets : every candidate is evaluated at each of these budgets, and the fitness is the average; by default at the
        manager's own.
    stages : see `StageConfig`; without them there is one, of ``generations``.
    against : heuristics that a comparison sets beside the winner.
    chunk : candidates evaluated as one batch. It is part of the experiment because a batch's shape moves results in
        the last digits. By default 32 on the processor; on an accelerator it is chosen once, from free memory and what
        two candidates take, and is an event of the journal.
    store_bytes : memory for contexts that were read once and are used again, on the device that the model is on. By
        default a share of what is free (`evomem.evaluation.store.room_for_readings`). It moves no result.
    chance_contexts : on so many training contexts per task the full cache must beat having read nothing, before the
        search begins; 0 leaves the check out.
    attempts : how often a failing evaluation is tried before the search stops.
    traces : folders that `evomem trace` made: what is recorded there is not read by the model again.
    diagnostics : see `DiagnosticsConfig`.
    base : folder at which relative paths begin; by default the one that the process works in when the run is made.
        A run notes it, with the absolute paths, so that it may be resumed from elsewhere (`evomem.runs.paths`).
    inputs : digests of what is read from outside the run's folder (`evomem.runs.inputs`). A run fills it in when it is
        made; an experiment that has some is refused where the files are others.
    threads : processor threads that an evaluation uses, in this process or in a worker. Part of the experiment because
        another number moves results in the last digits; to use more cores, take more workers.
    """

    name: str = Field(min_length=1)
    seed: int = Field(default=0, ge=0, le=SEED)
    model: ModelConfig
    models: list[ModelConfig] | None = Field(default=None, min_length=1, max_length=LISTED)
    space: SpaceConfig
    tasks: list[TaskConfig] = Field(min_length=1, max_length=LISTED)
    protocol: EvaluationProtocol = EvaluationProtocol()
    driver: DriverConfig = DriverConfig()
    generations: int = Field(default=50, ge=1, le=GENERATIONS)
    samples_per_generation: int = Field(default=6, ge=1, le=CONTEXTS)
    train_contexts: int = Field(default=100, ge=1, le=CONTEXTS)
    fitness: FitnessConfig = FitnessConfig()
    budgets: list[Budget] | None = Field(default=None, min_length=1, max_length=LISTED)
    stages: list[StageConfig] | None = Field(default=None, min_length=1, max_length=LISTED)
    select: SelectConfig = SelectConfig()
    sealed: SealedConfig = SealedConfig()
    against: list[str] = Field(default_factory=list, max_length=LISTED)
    chunk: int | None = Field(default=None, ge=1, le=POPULATION)
    store_bytes: int | None = Field(default=None, ge=0, le=BYTES)
    chance_contexts: int = Field(default=8, ge=0, le=CONTEXTS)
    attempts: int = Field(default=2, ge=1, le=LISTED)
    threads: int = Field(default=1, ge=1, le=UNITS)
    traces: list[str] = Field(default_factory=list, max_length=LISTED)
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()
    base: str | None = Field(default=None, max_length=4096)
    inputs: dict[str, str] = Field(default_factory=dict)

    _name = field_validator("name")(lambda value: file_name(value))
    _tasks = field_validator("tasks", mode="before")(task_list)
    _budgets = field_validator("budgets")(checked_budgets)

    @model_validator(mode="before")
    @classmethod
    def _first_model(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("models"), list) or not values["models"]:
            return values
        models = [by_name(value) for value in values["models"]]
        return {"model": models[0], **values, "models": models}

    @model_validator(mode="before")
    @classmethod
    def _first_driver(cls, values: Any) -> Any:
        """The first stage's driver is the experiment's, in whichever of the two places it is named."""
        stages = values.get("stages") if isinstance(values, dict) else None
        if not isinstance(stages, list) or not stages or not isinstance(stages[0], dict):
            return values
        first = stages[0]
        if first.get("driver") is None:
            return values
        if values.get("driver") is not None:
            raise ValueError("the first driver is named twice, in driver and in stages.0.driver; leave one out")
        moved = {key: value for key, value in first.items() if key != "driver"}
        return {**values, "driver": first["driver"], "stages": [moved, *stages[1:]]}

    @field_validator("model", mode="before")
    @classmethod
    def _modelby_name(cls, value: Any) -> Any:
        return by_name(value)

    @field_validator("driver", mode="before")
    @classmethod
    def _driverby_name(cls, value: Any) -> Any:
        return by_name(value)

    @field_validator("chance_contexts")
    @classmethod
    def _pairs(cls, value: int) -> int:
        if value == 1:
            raise ValueError("one context says nothing; give 2 or more, or 0 for no check")
        return value

    @model_validator(mode="after")
    def _models_hold(self) -> Self:
        known = [model.name for model in self.all_models]
        if self.model != self.all_models[0]:
            raise ValueError(f"model: {self.model.name!r} is not the first of models; leave model out")
        if len(set(known)) < len(known):
            raise ValueError(f"models: {', '.join(known)}: one is given twice")
        for task in [*self.tasks, *(task for stage in self.stages or () for task in stage.tasks or ())]:
            if task.model is not None and task.model not in known:
                raise ValueError(f"task {task.spec}: model {task.model!r} is none of: {', '.join(known)}")
        return self

    @model_validator(mode="after")
    def _plan_holds(self) -> Self:
        for place, stage in enumerate(self.plan()):
            kinds = [task.model_dump(exclude={"weight"}) for task in stage.tasks]
            twice = [task.label for i, task in enumerate(stage.tasks) if kinds[i] in kinds[:i]]
            if twice:
                raise ValueError(f"stage {place}: task {twice[0]} is given twice; raise its weight instead")
            if stage.samples_per_generation > stage.train_contexts:
                raise ValueError(
                    f"stage {place}: samples_per_generation {stage.samples_per_generation} is more than the pool of "
                    f"train_contexts {stage.train_contexts}"
                )
        return self

    @property
    def all_models(self) -> tuple[ModelConfig, ...]:
        """The models that candidates are measured on."""
        return tuple(self.models or (self.model,))

    def protocol_on(self, model: str) -> EvaluationProtocol:
        """Return the protocol under which candidates are measured on a model, by its name."""
        protocol = next((one.protocol for one in self.all_models if one.name == model), None)
        return protocol or self.protocol

    def plan(self) -> tuple[Stage, ...]:
        """Return the stages with everything filled in, and the generations at which they begin and end.

        With several models, a task that is for all of them becomes one for each.
        """
        stages, begin, driver, since = [], 0, self.driver, 0
        searches: tuple[str, ...] | None = None
        for index, stage in enumerate(self.stages or [StageConfig(generations=self.generations)]):
            if stage.driver is not None or stage.searches is not None:
                driver, since = stage.driver or driver, begin
                searches = None if stage.searches is None else tuple(stage.searches)
            tasks = self.tasks if stage.tasks is None else stage.tasks
            if stage.length is not None:
                tasks = [task.model_copy(update={"length": stage.length}) for task in tasks]
            if len(self.all_models) > 1:
                names = [model.name for model in self.all_models]
                tasks = [t.model_copy(update={"model": n}) for t in tasks for n in names if t.model in (None, n)]
            stages.append(
                Stage(
                    index=index,
                    name=stage.name or f"stage {index + 1}",
                    begin=begin,
                    end=begin + stage.generations,
                    tasks=tuple(tasks),
                    budgets=tuple(self.budgets or () if stage.budgets is None else stage.budgets),
                    samples_per_generation=stage.samples_per_generation or self.samples_per_generation,
                    train_contexts=stage.train_contexts or self.train_contexts,
                    fitness=stage.fitness or self.fitness,
                    driver=driver,
                    since=since,
                    searches=searches,
                )
            )
            begin += stage.generations
        return tuple(stages)

    def on(self, device: str) -> ExperimentConfig:
        """Return the experiment with its models on a device.

        Raises
        ------
        ConfigError : a model is spread over devices.
        """
        if any(model.device_map is not None for model in self.all_models):
            raise ConfigError(f"--device {device}: model.device_map says already where models lie; leave one out")

        def moved(model: ModelConfig) -> ModelConfig:
            return model.model_copy(update={"device": device})

        models = None if self.models is None else [moved(model) for model in self.models]
        return self.model_copy(update={"model": moved(self.model), "models": models})

    def placed(self) -> ExperimentConfig:
        """Return the experiment as it is on this machine: what the processor's defaults are is filled in.

        On an accelerator type and chunk stay open: the checkpoint says the one, a measurement the other.
        """
        if any(model.accelerated() for model in self.all_models):
            return self

        def filled(model: ModelConfig) -> ModelConfig:
            return model.model_copy(update={"dtype": model.dtype or "float32"})

        models = None if self.models is None else [filled(model) for model in self.models]
        return self.model_copy(update={"model": filled(self.model), "models": models, "chunk": self.chunk or 32})

    def resolved(self) -> dict[str, Any]:
        """Return everything as plain values: what is kept in the run and compared on a resume."""
        return self.model_dump(mode="json")


class Stage(Settings):
    """A stage with everything filled in; it covers the generations from ``begin`` to before ``end``.

    Its driver began at generation ``since``, at or before the stage's own beginning, and searches what ``searches``
    names; None: everything.
    """

    index: int = Field(ge=0, le=LISTED)
    name: str
    begin: int = Field(ge=0, le=LISTED * GENERATIONS)
    end: int = Field(ge=0, le=LISTED * GENERATIONS)
    tasks: tuple[TaskConfig, ...]
    budgets: tuple[Budget, ...]
    samples_per_generation: int = Field(ge=0, le=CONTEXTS)
    train_contexts: int = Field(ge=0, le=CONTEXTS)
    fitness: FitnessConfig
    driver: DriverConfig
    since: int = Field(ge=0, le=LISTED * GENERATIONS)
    searches: tuple[str, ...] | None = None


_RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10))}


def file_name(name: str) -> str:
    """Return a name that a folder may have everywhere: it leads nowhere else; raise ValueError otherwise."""
    if not name.isprintable() or set(name) & set('/\\:*?"<>|') or name[0] in ". " or name[-1] in ". ":
        raise ValueError(
            'a run lies in a folder of this name: no / \\ : * ? " < > |, no control characters, and no dot or blank at '
            "the beginning or the end"
        )
    if len(name.encode()) > 100 or name.partition(".")[0].upper() in _RESERVED:
        raise ValueError(
            "a run lies in a folder of this name: at most 100 bytes, and none that a system keeps for itself"
        )
    return name
