"""Run: the parts of an experiment: model, task, driver, fitness, stage, and how the winner is chosen and reported."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from evomem.bounds import CONTEXTS, GENERATIONS, LARGE, LENGTH, LISTED, POPULATION, SMALL
from evomem.errors import ConfigError
from evomem.evaluation.measurement import EvaluationProtocol
from evomem.managers.base import check_budget
from evomem.validation import Settings

Budget = int | float


def by_name(value: Any) -> Any:
    """Return a mapping; a string stands for its ``name``."""
    return {"name": value} if isinstance(value, str) else value


def task_list(value: Any) -> Any:
    """Return a list of tasks as mappings; a string stands for a task's ``spec``."""
    return [{"spec": task} if isinstance(task, str) else task for task in value] if isinstance(value, list) else value


def checked_budgets(value: list[Budget] | None) -> list[Budget] | None:
    """Return budgets, each once; raise ValueError for one that no manager takes."""
    for budget in value or []:
        try:
            check_budget(budget)
        except ConfigError as error:
            raise ValueError(str(error)) from None
    # One is evaluated once, however often it is named; 1 (a slot) and 1.0 (everything) are two.
    return None if value is None else list({(type(budget), budget): budget for budget in value}.values())


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
    protocol : under which managers decide about this model's memory; by default the experiment's. Models whose memories
        are of different kinds may so be searched on at once, each under its own.
    """

    name: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    device: str | None = None
    device_map: str | dict[str, str | Annotated[int, Field(ge=0, le=LISTED)]] | None = None
    quantization: dict[str, Any] | None = None
    protocol: EvaluationProtocol | None = None

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
    price_per_megabyte : taken off per 10^6 bytes of mean memory, in units of the objective as it is normalised.
    normalise : ``full`` measures against the full cache on the same samples: its likelihood is subtracted (nats lost
        to eviction), its exact score divides. With several models it should be set: they differ in what they can do.
        ``range`` is for models with memories of different kinds, on which a nat is not worth the same: of each task,
        0 is having read nothing and 1 the full cache, (v - v_nothing) / (v_full - v_nothing). v_nothing is each
        sample's own; the divisor is a mean over the generation's samples, at least a tenth of a nat.
    reading : for a policy gradient under ``streaming``: how much the mean log-likelihood of the tokens that are read
        after a decision, until the next, adds to the fitness; each decision is credited with what comes after it. On
        a stream of requests it is the share of right reads in place of the likelihood.
    discount : how much of what is read n decisions later a decision is credited with: discount^n.
    """

    objective: str = "loglik"
    price_per_megabyte: float = Field(default=0.0, ge=0, le=LARGE, allow_inf_nan=False)
    normalise: Literal["none", "full", "range"] = "none"
    reading: float = Field(default=0.0, ge=0, le=LARGE, allow_inf_nan=False)
    discount: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)


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

    Attributes
    ----------
    searches : patterns of names (shell style) of the weights and options that this stage searches, such as
        ``allocation.*``; all others stay as the stage before it left them. The driver begins anew with it. It holds for
        the stages after this one, up to the next that names a driver or what it searches; by default everything that
        the space lets vary.
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
    searches: list[str] | None = Field(default=None, min_length=1, max_length=LISTED)

    _driver = field_validator("driver", mode="before")(by_name)
    _tasks = field_validator("tasks", mode="before")(task_list)
    _budgets = field_validator("budgets")(checked_budgets)


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
