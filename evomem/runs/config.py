"""Run: the configuration of one search, an *experiment*, read from YAML and kept resolved in the run's folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from evomem.bounds import BYTES, CONTEXTS, GENERATIONS, LARGE, LENGTH, LISTED, POPULATION, SEED, SMALL, UNITS
from evomem.errors import ConfigError
from evomem.evaluation.measurement import EvaluationProtocol
from evomem.files.reading import is_file, user_path
from evomem.managers.base import check_budget
from evomem.search_space.space import SpaceConfig, load_space
from evomem.validation import Settings, apply_settings, read_yaml, validate

Budget = int | float


class ModelConfig(Settings):
    """The frozen model: alias, folder or hub id, the type of its weights, and where they lie.

    Attributes
    ----------
    dtype : ``auto``: the checkpoint's own. By default float32 on the processor and ``auto`` on an accelerator.
    device : ``cpu``, ``cuda``, ``cuda:1``, …; by default the first GPU if there is one.
    device_map : "auto", or a mapping from modules to devices, as accelerate takes it: for models that are too big for
        one device.
    quantization : transformers' ``quantization_config`` as plain values, e.g. ``{load_in_8bit: true}``; by default what
        the model's own configuration says.
    """

    name: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    device: str | None = None
    device_map: str | dict[str, str | Annotated[int, Field(ge=0, le=LISTED)]] | None = None
    quantization: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.device is not None and self.device_map is not None:
            raise ValueError("give either a device or a device_map, not both")
        return self

    def accelerated(self) -> bool:
        """Whether the model runs on an accelerator here; raises `ConfigError` for a device that does not exist."""
        from evomem.devices import chosen_device

        return self.device_map is not None or chosen_device(self.device).type != "cpu"


class TaskConfig(Settings):
    """One task of the fitness: its name (and options), context length in tokens, and weight in the sum.

    ``model`` names the one of the experiment's models that it is done on; None: on each of them.
    """

    spec: str
    model: str | None = None
    length: int | None = Field(default=None, ge=1, le=LENGTH)
    options: dict[str, Any] = Field(default_factory=dict)
    weight: float = Field(default=1.0, gt=0, le=LARGE, allow_inf_nan=False)

    def for_all_models(self) -> TaskConfig:
        """Return the task, not limited to a model."""
        return self.model_copy(update={"model": None})

    @property
    def title(self) -> str:
        """Name in tables that say themselves which model it is done on."""
        return self.spec if self.length is None else f"{self.spec}@{self.length}"

    @property
    def label(self) -> str:
        """Name in messages."""
        return self.title if self.model is None else f"{self.title} on {self.model}"


class DriverConfig(Settings):
    """Who proposes the candidates.

    ``population`` is by default the driver's own, ``sigma`` the search space's.
    """

    name: str = "cmaes"
    options: dict[str, Any] = Field(default_factory=dict)
    population: int | None = Field(default=None, ge=2, le=POPULATION)
    sigma: float | None = Field(default=None, ge=SMALL, le=LARGE, allow_inf_nan=False)


class FitnessConfig(Settings):
    """What a candidate's fitness is.

    Attributes
    ----------
    objective : a name of `evomem.evaluation.objectives`, such as ``loglik`` (nats per answer token) or ``exact``.
    price_per_megabyte : taken off per 10^6 bytes of mean memory, in units of the objective.
    normalise : ``full`` measures against the full cache on the same samples: its likelihood is subtracted (nats lost
        to eviction), its exact score divides. With several models it should be set: they differ in what they can do.
    reading : for a policy gradient under ``streaming``: how much the mean log-likelihood of the tokens that are read
        after a decision, until the next, adds to the fitness; each decision is credited with what comes after it.
    """

    objective: str = "loglik"
    price_per_megabyte: float = Field(default=0.0, ge=0, le=LARGE, allow_inf_nan=False)
    normalise: Literal["none", "full"] = "none"
    reading: float = Field(default=0.0, ge=0, le=LARGE, allow_inf_nan=False)


class DiagnosticsConfig(Settings):
    """How often a search looks at how its mean compares with decisions that know the future; see docs/policies.md.

    Attributes
    ----------
    every : generations between two looks; 0: never. Needs ``compress_once``.
    contexts : training contexts per task to look at, always the same ones.
    """

    every: int = Field(default=0, ge=0, le=GENERATIONS)
    contexts: int = Field(default=4, ge=1, le=CONTEXTS)


class StageConfig(Settings):
    """A part of the search that changes what is evaluated, or who proposes it.

    Everything that is left out is as in the experiment. ``length`` is given to every task of the stage. The driver's
    whole state is carried on, unless ``driver`` names one for this stage (and for those after it that name none): it
    begins anew at the mean of the one before it.
    """

    name: str | None = None
    generations: int = Field(ge=1, le=GENERATIONS)
    tasks: list[TaskConfig] | None = Field(default=None, min_length=1, max_length=LISTED)
    length: int | None = Field(default=None, ge=1, le=LENGTH)
    budgets: list[Budget] | None = Field(default=None, min_length=1, max_length=LISTED)
    samples_per_generation: int | None = Field(default=None, ge=1, le=CONTEXTS)
    train_contexts: int | None = Field(default=None, ge=1, le=CONTEXTS)
    fitness: FitnessConfig | None = None
    driver: DriverConfig | None = None

    _driver = field_validator("driver", mode="before")(lambda value: _by_name(value))
    _tasks = field_validator("tasks", mode="before")(lambda value: _task_list(value))
    _budgets = field_validator("budgets")(lambda value: _checked_budgets(value))


class SelectConfig(Settings):
    """Which finalists are re-evaluated on the `select` split.

    Attributes
    ----------
    contexts : samples per task, the same for all finalists.
    top : candidates with the largest fitness of the run (noisy, each on its own generation's samples); for a driver
        that searches a front, members of the front over all generations, besides the last generation's.
    snapshots : means of the distribution at so many evenly spaced earlier generations (a long search overfits).
    """

    contexts: int = Field(default=48, ge=1, le=CONTEXTS)
    top: int = Field(default=4, ge=0, le=POPULATION)
    snapshots: int = Field(default=0, ge=0, le=POPULATION)


class SealedConfig(Settings):
    """How the one winner is reported on the `sealed` split: samples per task, and whether text is generated too."""

    contexts: int = Field(default=100, ge=1, le=CONTEXTS)
    exact: bool = True


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
    _tasks = field_validator("tasks", mode="before")(lambda value: _task_list(value))
    _budgets = field_validator("budgets")(lambda value: _checked_budgets(value))

    @model_validator(mode="before")
    @classmethod
    def _first_model(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("models"), list) or not values["models"]:
            return values
        models = [_by_name(value) for value in values["models"]]
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
    def _model_by_name(cls, value: Any) -> Any:
        return _by_name(value)

    @field_validator("driver", mode="before")
    @classmethod
    def _driver_by_name(cls, value: Any) -> Any:
        return _by_name(value)

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

    def plan(self) -> tuple[Stage, ...]:
        """Return the stages with everything filled in, and the generations at which they begin and end.

        With several models, a task that is for all of them becomes one for each.
        """
        stages, begin, driver, since = [], 0, self.driver, 0
        for place, stage in enumerate(self.stages or [StageConfig(generations=self.generations)]):
            if stage.driver is not None:
                driver, since = stage.driver, begin
            tasks = self.tasks if stage.tasks is None else stage.tasks
            if stage.length is not None:
                tasks = [task.model_copy(update={"length": stage.length}) for task in tasks]
            if len(self.all_models) > 1:
                names = [model.name for model in self.all_models]
                tasks = [t.model_copy(update={"model": n}) for t in tasks for n in names if t.model in (None, n)]
            stages.append(
                Stage(
                    place=place,
                    name=stage.name or f"stage {place + 1}",
                    begin=begin,
                    end=begin + stage.generations,
                    tasks=tuple(tasks),
                    budgets=tuple(self.budgets or () if stage.budgets is None else stage.budgets),
                    samples_per_generation=stage.samples_per_generation or self.samples_per_generation,
                    train_contexts=stage.train_contexts or self.train_contexts,
                    fitness=stage.fitness or self.fitness,
                    driver=driver,
                    since=since,
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

    Its driver began at generation ``since``, at or before the stage's own beginning.
    """

    place: int = Field(ge=0, le=LISTED)
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


def _by_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _task_list(value: Any) -> Any:
    return [{"spec": task} if isinstance(task, str) else task for task in value] if isinstance(value, list) else value


def _checked_budgets(value: list[Budget] | None) -> list[Budget] | None:
    for budget in value or []:
        try:
            check_budget(budget)
        except ConfigError as error:
            raise ValueError(str(error)) from None
    # One is evaluated once, however often it is named; 1 (a slot) and 1.0 (everything) are two.
    return None if value is None else list({(type(budget), budget): budget for budget in value}.values())


def load_experiment(name: str | Path, settings: Iterable[str] = (), *, device: str | None = None) -> ExperimentConfig:
    """Return the experiment of a file or of a name in `experiments/`, with ``key=value`` settings applied.

    ``space`` may be the name of a file of `search_spaces/`, or a mapping with ``name`` and what to change in it. The
    setting ``space=NAME`` takes another space as it is; ``space.name=NAME`` keeps what the experiment changes in it.
    What the processor's defaults are is filled in (`ExperimentConfig.placed`). ``device`` is where the models run, in
    place of what the experiment says.

    Raises
    ------
    ConfigError : names file, field, value and the nearest valid key; a device does not exist.
    """
    path = user_path(name)
    if not is_file(path):
        from evomem.files.resources import resource_path

        path = resource_path("experiments", str(name))
    return parse_experiment(read_yaml(path), settings, str(path), device=device)


def parse_experiment(
    data: Mapping[str, Any], settings: Iterable[str] = (), where: str = "experiment", *, device: str | None = None
) -> ExperimentConfig:
    """Return the `ExperimentConfig` of plain values; see `load_experiment`."""
    settings = list(settings)
    # What is changed in a space is changed in what its file says, so that file comes first.
    first = [setting for setting in settings if setting.partition("=")[0].strip() in ("space", "space.name")]
    others = [setting for setting in settings if setting not in first]
    values = apply_settings({**data, "space": _named(data.get("space"))}, first)
    values["space"] = _resolve_space(_named(values["space"]), where)
    config = validate(ExperimentConfig, apply_settings(values, others), where)
    return (config if device is None else config.on(device)).placed()


def _named(space: Any) -> Any:
    return {"name": space} if isinstance(space, str) else space


def _resolve_space(space: Any, where: str) -> Any:
    if isinstance(space, dict) and "name" in space:
        if not isinstance(space["name"], str):
            raise ConfigError(f"{where}: space.name: {space['name']!r} is not the name of a search space")
        changes = {key: value for key, value in space.items() if key != "name"}
        return load_space(space["name"], changes).model_dump(mode="json")
    if space is None:
        raise ConfigError(f"{where}: space: is required and missing; name a file of search_spaces/")
    return space


def to_yaml(data: Mapping[str, Any]) -> str:
    """Return plain values as YAML, in the order in which the models declare them."""
    text: str = yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True, width=120)
    return text
