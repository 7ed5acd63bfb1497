"""Run: the bench on which a search measures its candidates: evaluator, tasks, and what both are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from evomem.devices import named
from evomem.errors import ConfigError, ModelError
from evomem.evaluation.measurement import LOGLIK, Evaluation, Measurement
from evomem.evaluation.measures import Draws
from evomem.files.strict_json import as_float
from evomem.managers.allocation.probed import keep_probes
from evomem.managers.base import MemoryManager
from evomem.models.identity import tokenizer_digest
from evomem.runs.config import ExperimentConfig
from evomem.runs.experiment_parts import ModelConfig, TaskConfig
from evomem.search_space.space import build_manager
from evomem.tasks.base import Sample, Task
from evomem.tasks.chance import ChanceReport, check

if TYPE_CHECKING:
    import torch

    from evomem.evaluation.evaluator import Evaluator, Reach
    from evomem.evaluation.future import KnownSamples
    from evomem.evaluation.store import Readings
    from evomem.models import LoadedModel


class CandidateEvaluator(Protocol):
    """What a search needs of an evaluator (`evomem.evaluation.evaluator.Evaluator` is one)."""

    def evaluate(
        self,
        managers: Sequence[MemoryManager],
        sample: Sample,
        task: Task,
        measurement: Measurement = LOGLIK,
        draws: Draws | None = None,
    ) -> list[Evaluation]:
        """Return one evaluation a manager, in order: a pure function of the arguments.

        ``draws`` is given only where rollouts are measured.
        """
        ...


@runtime_checkable
class PositionChecker(Protocol):
    """An evaluator that knows how far its model can read."""

    def check_positions(self, samples: Sequence[Sample], *, exact: bool = False) -> Reach:
        """Raise `TaskError` for a sample that is too long; return how long they are (`Evaluator.check_positions`)."""
        ...


@dataclass(frozen=True)
class Bench:
    """Evaluator and tasks of a search.

    Attributes
    ----------
    evaluator : measures managers on samples.
    make_task : builds the tasks of the experiment.
    calibrate : sets statistics that a manager measures once, before the search, on some samples of some tasks; None if
        none does.
    check : compares the full cache with no context at all on some samples; None if nothing can be said.
    in_workers : makes the same bench in another process; None: call the factory there.
    provenance : what the measurements depend on (model, hash of its weights); a run is resumed on the same only.
    benches : with several models, the bench of each by name; this one is then the first of them.
    devices : accelerators that are measured on; empty: the processor.
    weights : bytes of the models.
    facts : what else the run's record says of where it ran: names of devices, memory set aside. Nothing depends on it.
    """

    evaluator: CandidateEvaluator
    make_task: Callable[[TaskConfig], Task]
    calibrate: Callable[[MemoryManager, Sequence[tuple[TaskConfig, Sequence[Sample]]]], None] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[str, Task, Sequence[Sample], MemoryManager], ChanceReport] | None = None
    in_workers: WorkerBench | None = None
    benches: Mapping[str, Bench] = field(default_factory=dict)
    devices: Sequence[torch.device] = ()
    weights: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)

    def of(self, task: TaskConfig) -> Bench:
        """Return the bench of the model that a task is done on."""
        return self if task.model is None else self.benches.get(task.model, self)


@dataclass(frozen=True)
class WorkerBench:
    """How another process makes a bench from parts that all processes of a machine share.

    Attributes
    ----------
    parts : returns what is shared; see `evomem.workers.units.Recipe`.
    make : called in the other process with the experiment, the parts, and the store for contexts that were read.
    """

    parts: Callable[[], Mapping[str, Any]]
    make: Callable[[ExperimentConfig, Mapping[str, Any], Readings], Bench]


BenchFactory = Callable[[ExperimentConfig], Bench]


def model_bench(config: ExperimentConfig) -> Bench:
    """Return the bench of a real frozen model: loads it, and evaluates in this process."""
    from evomem.evaluation.store import PrefillStore, room_for_readings
    from evomem.models.sharing import why_not_shareable

    loaded = [load_model(model) for model in config.all_models]
    if any(map(why_not_shareable, loaded)):  # spread over devices, or quantised: every worker loads its own
        shared = WorkerBench(dict, partial(spread_bench, [one.device_type for one in loaded]))
    else:
        shared = WorkerBench(partial(_dismantled, loaded), shared_bench)
    limit = config.store_bytes
    if limit is None:
        limit = room_for_readings({device for one in loaded for device in one.devices})
    bench = _bench(config, loaded, PrefillStore(limit), shared)
    places = {device: None for one in loaded for device in one.devices if device.type != "cpu"}
    facts = {"devices": {one.name: named(one.devices) for one in loaded}, "store_bytes": limit}
    weights = sum(tensor.nbytes for one in loaded for tensor in one.model.parameters())
    return replace(bench, devices=tuple(places), weights=weights, facts=facts)


def shared_bench(config: ExperimentConfig, parts: Mapping[str, Any], readings: Readings) -> Bench:
    """Return the bench of `model_bench` in another process, around the same weights."""
    from evomem.models.sharing import assemble

    return _bench(config, [assemble(part) for part in parts["models"]], readings)


def spread_bench(kinds: Sequence[str], config: ExperimentConfig, parts: Mapping[str, Any], readings: Readings) -> Bench:
    """Return the bench of `model_bench` in another process, with models of its own.

    Raises `ModelError` where they came to lie on another kind of device than ``kinds``, those of the first process.
    """
    loaded = [load_model(model) for model in config.all_models]
    for one, kind in zip(loaded, kinds, strict=True):
        if one.device_type != kind:
            raise ModelError(
                f"model {one.name!r}: the search runs on {kind}, this worker on {one.device_type}. Give every worker "
                "what the search has (--gpus-per-worker), or search on the processor (--device cpu)"
            )
    return _bench(config, loaded, readings)


def _dismantled(loaded: Sequence[LoadedModel]) -> Mapping[str, Any]:
    from evomem.models.sharing import dismantle

    return {"models": [dismantle(one) for one in loaded]}


def load_model(config: ModelConfig, dtype: str | None = None) -> LoadedModel:
    """Return the model of an experiment; ``dtype`` takes the place of its type."""
    from evomem import models

    return models.load(
        config.name,
        dtype=dtype or config.dtype,
        device=config.device,
        device_map=config.device_map,
        quantization=config.quantization,
    )


def _bench(
    config: ExperimentConfig, loaded: Sequence[LoadedModel], readings: Readings, in_workers: WorkerBench | None = None
) -> Bench:
    benches = {one.name: _bench_of(config, one, readings) for one in loaded}
    first = benches[config.model.name]
    if len(benches) == 1:
        return replace(first, in_workers=in_workers)
    provenances = [benches[one.name].provenance for one in loaded]
    digests = [{("name" if key == "model" else key): value for key, value in one.items()} for one in provenances]

    def calibrate(manager: MemoryManager, chosen: Sequence[tuple[TaskConfig, Sequence[Sample]]]) -> None:
        calibrate_manager(manager, [(benches[str(task.model)].evaluator, samples) for task, samples in chosen])

    provenance = {**first.provenance, "model_digests": digests}
    return replace(first, calibrate=calibrate, provenance=provenance, in_workers=in_workers, benches=benches)


def _bench_of(config: ExperimentConfig, loaded: LoadedModel, readings: Readings) -> Bench:
    """Return the bench of one model."""
    from evomem import tasks
    from evomem.evaluation.streams import evaluator_of

    evaluator = evaluator_of(loaded, config.protocol_on(loaded.name), store=readings)
    evaluator.traces = traces_of(config, loaded)

    def make_task(task: TaskConfig) -> Task:
        return tasks.build(task.spec, loaded.tokenizer, task.length, **task.options)

    def calibrate(manager: MemoryManager, chosen: Sequence[tuple[TaskConfig, Sequence[Sample]]]) -> None:
        calibrate_manager(manager, [(evaluator, samples) for _, samples in chosen])

    provenance = {
        "model": loaded.name,
        "model_digest": loaded.digest,
        "tokenizer_digest": tokenizer_digest(loaded.tokenizer),
        **_how(loaded),
        **_reading(config, loaded, evaluator),
    }
    return Bench(evaluator, make_task, calibrate, provenance, partial(check_chance, evaluator))


def _reading(config: ExperimentConfig, loaded: LoadedModel, evaluator: Evaluator) -> dict[str, str]:
    """Return how texts are read, where that is not as they are: the tokenizer's prefix, the chat template's hash."""
    from evomem.tasks.building import parse
    from evomem.tasks.chat import template_digest

    facts = {"prefix": evaluator.encoder.spelled}
    chats = ({**task.options, **parse(task.spec)[1]}.get("chat_template") for s in config.plan() for task in s.tasks)
    if any(str(chat).lower() in ("true", "1", "yes", "on", "t", "y") for chat in chats):
        facts["chat_template"] = template_digest(loaded.tokenizer)
    return {key: value for key, value in facts.items() if value}


def _how(loaded: LoadedModel) -> dict[str, Any]:
    """Return how a model computes, as far as numbers depend on it."""
    quantised = {"quantization": loaded.quantization} if loaded.quantization is not None else {}
    return {"dtype": loaded.dtype, "device": loaded.device_type, **quantised}


def traces_of(config: ExperimentConfig, loaded: LoadedModel) -> KnownSamples | None:
    """Return the experiment's traces of a model; None if it names none.

    Raises
    ------
    RunError, ConfigError : a folder is none, or does not fit this model or what the manager looks at.
    """
    if not config.traces:
        return None
    from evomem.evaluation.traces.store import TraceCollection, Traces

    allocation = build_manager(config.space.manager).allocation
    if allocation.observes:
        missing = ", ".join(sorted(allocation.observes))
        raise ConfigError(
            f"traces: allocation {allocation.name!r} observes {missing}, which traces do not hold; leave "
            "traces out, or use an allocation that observes nothing"
        )
    opened = [Traces.open(folder) for folder in config.traces]
    others = {model.name for model in config.all_models} - {loaded.name}
    mine = [one for one in opened if one.manifest.header.model.name not in others]
    features = config.space.manager.options.get("features", ())
    for one in mine:
        one.matches(loaded, features, mode=config.protocol_on(loaded.name).mode)
    return TraceCollection(mine)


def check_chance(
    evaluator: Evaluator, label: str, task: Task, samples: Sequence[Sample], manager: MemoryManager | None = None
) -> ChanceReport:
    """Return whether a task measures memory on the evaluator's model; ``manager`` says what is recorded on the way.

    What is read for it stays in the evaluator's store, where the manager's first evaluations find it.
    """
    from evomem.managers.heuristics.full import Full

    observes = manager.observes if manager is not None else frozenset()
    evaluations = [evaluator.evaluate([Full()], sample, task, LOGLIK.observing(observes))[0] for sample in samples]
    full = [as_float(one.loglik) for one in evaluations]
    without = [evaluator.loglik_without_context(sample) for sample in samples]
    return check(label, (), task.uniform_chance, full, without)


def calibrate_manager(manager: MemoryManager, chosen: Sequence[tuple[Any, Sequence[Sample]]]) -> None:
    """Set the statistics of a manager that has some from contexts that models read with everything kept.

    A manager without statistics is left as it is (`MemoryManager.calibrates`). An allocation that looks at what heads
    do keeps the probes of the first model (`ProbedAllocation`).

    Parameters
    ----------
    chosen : evaluators, and samples that each of them reads; all are pooled.
    """
    from evomem.evaluation.streams import reads_streams

    if chosen:
        keep_probes(manager, chosen[0][0].loaded.model)
    if not manager.calibrates:
        return
    if not manager.uses_statistics and any(reads_streams(evaluator.loaded) for evaluator, _ in chosen):
        return  # a stream is no context that is read with everything kept
    manager.calibrate(
        view
        for evaluator, samples in chosen
        for sample in samples
        for view in evaluator.all_kept(evaluator.tokens(sample).read, manager.observes)
    )
