"""Run: the search loop. Ask, evaluate what is missing, tell; then choose the winner and report it once.

Everything that is evaluated goes through the journal, and every decision is a pure function of the configuration and
of what was evaluated. That is why a run that was killed at any moment goes on bit-exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import safetensors.torch

from evomem import drivers
from evomem.drivers.base import Array, Driver, Population
from evomem.errors import ConfigError, EvomemError, FitnessError, RunError
from evomem.evaluation.costs import ORACLE
from evomem.evaluation.measurement import Measurement, Quantity
from evomem.evaluation.needs import require
from evomem.files.atomic import write_atomically, write_vector
from evomem.files.strict_json import as_float
from evomem.runs import checkpoint as checkpoints
from evomem.runs.archive import Archive, evenly_spaced
from evomem.runs.batch_size import choose_chunks
from evomem.runs.bench import BenchFactory, model_bench
from evomem.runs.candidates import Judge, Measuring, Plan, rollout_vectors
from evomem.runs.checkpoint import Checkpoint
from evomem.runs.chunks import Chunks, digests
from evomem.runs.config import ExperimentConfig, Stage
from evomem.runs.driver_relay import Relay
from evomem.runs.driver_setup import check_heads
from evomem.runs.fitness import MeasuredFitness, objective_of, preflight
from evomem.runs.folder import RunFolder
from evomem.runs.folder_reading import read_numbers, read_state
from evomem.runs.front import FrontArchive, check_bytes_may_vary, preflight_bytes, wants_bytes
from evomem.runs.identity import check_identity, identity_of
from evomem.runs.inputs import check_unchanged, pinned
from evomem.runs.journal import Record, measured, read_journal
from evomem.runs.paths import base_of, resolve_paths
from evomem.runs.plan_needs import search_needs, vectors_needs
from evomem.runs.pools import limited_threads, make_pool
from evomem.runs.result import RunResult
from evomem.runs.samples import Samples
from evomem.runs.winner import choose
from evomem.search_space.space import SearchSpace
from evomem.tasks.base import Split
from evomem.tracking.base import GenerationRecord, Tracker, Trackers, logger
from evomem.workers.units import WorkerOptions

_LOOK = Measurement.of(Quantity.of("ranking_cost", how="expected"), "oracle")
"""What `DiagnosticsConfig` looks at."""


def search(
    config: ExperimentConfig,
    folder: str | Path,
    evaluator_factory: BenchFactory = model_bench,
    *,
    resume: bool = False,
    tracker: Tracker | Sequence[Tracker] = (),
    workers: WorkerOptions | None = None,
    plan_check: bool = True,
) -> RunResult:
    """Run a search in a folder, or go on with it.

    Parameters
    ----------
    config : the experiment.
    folder : of the run; it is made.
    evaluator_factory : makes the bench that candidates are measured on; called only when there is work to do.
    resume : go on with what the folder holds (with nothing there, begin; a finished run gives its result again).
    tracker : who is told.
    workers : where evaluations happen; this process if None. The result is the same to the bit.
    plan_check : refuse a plan that needs more memory, disk or time than there is (`evomem.evaluation.needs`).

    Raises
    ------
    RunError : the folder is in use, holds another run, or the disk is full. Whatever is finished is kept.
    FitnessError : every candidate of a generation failed.
    ConfigError, TaskError, ModelError : the experiment cannot be run as it is written.
    PlanError : it needs more than there is.
    """
    folder = Path(folder)
    config = config.placed()
    check_objectives(config)
    config = pinned(resolve_paths(config, base_of(folder) if resume else None))
    with RunFolder(folder, config, resume=resume) as run:
        finished = run.result
        if finished is not None:
            return finished
        trackers = list(tracker) if isinstance(tracker, Sequence) else [tracker]
        with limited_threads(config.threads):
            made = Search(run, config, evaluator_factory, trackers, workers or WorkerOptions())
            made.plan_check = plan_check
            return made.run()


def check_objectives(config: ExperimentConfig) -> None:
    """Raise `ConfigError` if a stage measures what does not exist, or not what its driver needs."""
    for stage in config.plan():
        rollouts = drivers.uses(stage.driver.name, "rollouts")
        objective, kind = objective_of(stage.fitness), config.protocol.kind
        what = f"stage {stage.name!r}: fitness.objective {stage.fitness.objective!r}"
        if objective.against_full == "nothing" and stage.fitness.normalise == "full":
            raise ConfigError(f"{what}: the full cache has no such value to normalise by; leave normalise out")
        if kind not in objective.protocols:
            kinds = " or ".join(sorted(objective.protocols))
            why = ": one decision about a whole context" if kinds == "compress_once" else ""
            raise ConfigError(f"{what} needs protocol.kind {kinds}{why}")
        if stage.fitness.reading and (kind != "streaming" or not rollouts):
            raise ConfigError(f"{what}: fitness.reading is for rollouts (driver policy_gradient) in protocol streaming")
    if config.diagnostics.every and config.protocol.kind != "compress_once":
        raise ConfigError("diagnostics.every: a look at the oracle needs protocol.kind compress_once; leave it out")
    check_bytes_may_vary(config)


class Search:
    """One search, from the state of its folder to its result."""

    def __init__(
        self,
        run: RunFolder,
        config: ExperimentConfig,
        factory: BenchFactory,
        trackers: Sequence[Tracker],
        workers: WorkerOptions,
    ) -> None:
        self.run_folder = run
        self.path = run.path
        self.config = config
        self.factory = factory
        self.bench = bench = factory(config)
        self.workers = workers
        self.plan_check = True
        self.plan = config.plan()
        self.generations = self.plan[-1].end
        self.samples = Samples(config, bench)
        self.trackers = Trackers(trackers, self.warn)
        self.space: SearchSpace
        self.chunks: Chunks
        self.start: Array
        self.records: dict[int, GenerationRecord] = {}
        self.identity: dict[str, str] = {}
        self.archive: Archive | FrontArchive = Archive(
            config.select.top, evenly_spaced(self.generations, config.select.snapshots)
        )
        if wants_bytes(config):
            self.archive = FrontArchive(config.select.top)

    def warn(self, message: str) -> None:
        """Tell the user and the journal."""
        logger.warning(message)
        self.run_folder.journal.event("warning", message=message)

    # ---- the whole ------------------------------------------------------------------------------------------------

    def run(self) -> RunResult:
        """Search, choose, report."""
        journal = self.run_folder.journal
        self.run_folder.check_provenance(dict(self.bench.provenance))
        journal.event("resume" if self.run_folder.resumed else "start", **self.bench.facts)
        if journal.repaired:
            self.warn(f"journal.jsonl: the last line was torn ({journal.repaired} bytes) and is cut off")
        for note in self.run_folder.notes:
            self.warn(note)
        if journal.checks.unchecked:
            self.warn(
                f"journal.jsonl: has {journal.checks.unchecked} lines without a checksum, from an earlier evomem: "
                "whether they are as they were written cannot be known"
            )
        for problem in journal.checks.problems():
            self.warn(f"journal.jsonl: {problem}; what is not there is evaluated again")
        if not self.run_folder.resumed:
            needs = search_needs(self.config, self.bench, self.samples, self.path, self.workers.count or 1)
            require(needs, check=self.plan_check, say=self.warn)
        self.samples.check()
        for remark in self.samples.remarks:
            self.warn(remark)
        self._prepare_start()
        require(vectors_needs(self.config, self.space.dim), check=self.plan_check, say=self.warn)
        self._identify()
        self._check_chance()
        self.chunks = choose_chunks(self)
        relay, told = self._restore()
        pool = make_pool(
            self.config,
            self.space,
            self.bench,
            self.samples,
            self.factory,
            self.workers,
            report=self.warn,
            quarantined=self._quarantined(),
        )
        measuring = Measuring(pool, journal, self._known_units(told))
        judge = Judge(measuring, self.samples, self.chunks)
        done = [self.records[g] for g in sorted(self.records) if g < told]
        self.trackers.start(self.config.resolved(), self.generations, done)
        try:
            self._evolve(relay, judge, measuring, told)
            result = choose(self, judge, relay.driver)
        except BaseException as error:
            status = "failed" if isinstance(error, Exception) else "interrupted"
            self.trackers.finish({"status": status, "error": str(error)})
            raise
        finally:
            pool.close()
        self.trackers.artifact("winner", self.path / "winner")
        self.trackers.finish({"status": "finished", **result.to_json(), "lines": result.lines()})
        return result

    def _prepare_start(self) -> None:
        """Make the manager that the search starts from, or take it from the folder: files may change in between."""
        vector, state = self.path / "start" / "vector.npy", self.path / "start" / "state.safetensors"
        if vector.exists():
            self.space = stored_space(self.config, state)
            self.start = read_numbers(vector)
            if self.start.shape != (self.space.dim,):
                raise RunError(f"{vector}: has {len(self.start)} numbers; this search space has {self.space.dim}")
            check_unchanged(self.config, start=False)
            return
        self.space = SearchSpace(self.config.space)
        self.start = self.space.start
        check_unchanged(self.config, start=True)
        check_heads(self.config, self.space, self.bench)
        if self.bench.calibrate is not None:
            stage = self.plan[0]
            first = {task.model: task for task in reversed(stage.tasks)}  # one task a model
            count = max(8, stage.samples_per_generation)
            pools = [(t, self.samples.pool(t, Split.TRAIN, stage.train_contexts)[:count]) for t in first.values()]
            self.bench.calibrate(self.space.template, pools)
        tensors = {name: value.contiguous() for name, value in self.space.template.state_dict().items()}
        write_atomically(state, safetensors.torch.save(tensors))
        write_vector(vector, self.start)  # last: it says that both are there

    def _identify(self) -> None:
        """Make sure that the journal is of this run; say in it which run that is, if it does not say so yet."""
        journal = self.run_folder.journal
        self.identity = identity_of(self.path, self.config)
        known = [
            record["files"]
            for record in read_journal(journal.path, report=False)
            if record["kind"] == "event" and record["event"] == "identity"
        ]
        for files in known:
            check_identity(self.path, files, self.identity)
        if not known:
            journal.event("identity", files=self.identity)

    def _check_chance(self) -> None:
        """Refuse a task that measures nothing on this model, before anything is spent on it; once per run."""
        if not self.config.chance_contexts:
            return
        journal = self.run_folder.journal
        records = read_journal(journal.path, report=False)
        passed = {r["task"] for r in records if r["kind"] == "event" and r["event"] == "chance" and r["passed"]}
        for stage in self.plan:
            for task in stage.tasks:
                name, check = self.samples.name(task), self.bench.of(task).check
                if name in passed or check is None:
                    continue
                count = min(self.config.chance_contexts, stage.train_contexts)
                pool = self.samples.pool(task, Split.TRAIN, max(2, count))
                if len(pool) < 2:
                    self.warn(f"task {task.label}: one training sample; whether it measures memory cannot be checked")
                    continue
                report = check(task.label, self.samples.tasks[name], pool, self.space.template)
                facts = report.to_json()
                del facts["task"]
                journal.event("chance", task=name, **facts)
                report.require()
                passed.add(name)

    def _restore(self) -> tuple[Relay, int]:
        """Return the drivers in the state of the newest checkpoint, and how many generations have been told.

        Without a checkpoint that counts they are at the beginning, and every generation is told again from the journal.
        """
        journal = self.run_folder.journal
        for record in read_journal(journal.path, report=False):
            if record["kind"] == "generation":
                self.records[record["generation"]] = generation_record(record)
        empty = self.archive.state_dict()
        for found in checkpoints.newest(self.path / "checkpoints", self.identity, journal.lines, list(self.records)):
            if isinstance(found, str):
                self.warn(found)
                continue
            relay = self._relay()
            try:
                relay.restore(found)
                self.archive.load_state_dict(found.archive)
                if not np.isfinite(relay.driver.mean).all():
                    raise RunError("its mean is not finite")
            except Exception as error:  # what a state that fits no driver makes of it
                self.warn(f"checkpoint {found.name} does not fit ({error}); {checkpoints.ALL_FROM_JOURNAL}")
                self.archive.load_state_dict(empty)
                continue
            return relay, found.generation
        return self._relay(), 0

    def _relay(self) -> Relay:
        return Relay(self.config, self.space, self.start, self.path)

    def _known_units(self, told: int) -> list[Record]:
        """Return the journal's units that may still be asked for.

        What failed as a whole is evaluated again: the user has been told to mend the cause and resume. So is a unit of
        which two lines say different things: an evaluation has one result.
        """
        known: list[Record] = []
        for record in read_journal(self.run_folder.journal.path, report=False):
            if record["kind"] == "unit" and (record["generation"] is None or record["generation"] >= told):
                known.append(record)
            elif record["kind"] == "event" and record["event"] == "all_failed":
                failed = (record["phase"], record["generation"])
                known = [unit for unit in known if (unit["phase"], unit["generation"]) != failed]
        lines: dict[tuple[str, str], list[Record]] = {}
        for unit in known:
            lines.setdefault((unit["key"], unit["candidates"]), []).append(unit)
        agreed = [self._agreed(units) for units in lines.values()]
        return [unit for unit in agreed if unit is not None]

    def _agreed(self, units: list[Record]) -> Record | None:
        """Return the line of a unit that counts; None if there are several, and none of them has been confirmed."""
        if len(units) == 1:
            return units[0]
        said = [repr(measured(unit)) for unit in units]
        place = max(range(len(units)), key=lambda n: said.count(said[n]))
        if len(set(said)) > 1:
            again = "it is evaluated again" if said.count(said[place]) == 1 else "what two of them say counts"
            self.warn(f"journal.jsonl: lines of unit {units[0]['key']} say different things; {again}")
            if said.count(said[place]) == 1:
                return None
        return units[place]

    def _quarantined(self) -> list[str]:
        """Return the candidates that ended their workers in earlier processes of this run."""
        records = read_journal(self.run_folder.journal.path, report=False)
        return [r["candidate"] for r in records if r["kind"] == "event" and r["event"] == "quarantined"]

    def all_failed(self, phase: str, generation: int | None, what: str) -> FitnessError:
        """Note that nothing of a phase has a finite fitness; return the error to raise."""
        self.run_folder.journal.event("all_failed", phase=phase, generation=generation)
        return FitnessError(
            f"{what} have no finite fitness (NaN or infinite). Look at the last units in journal.jsonl. If the cause "
            "can be mended, mend it and resume: they are evaluated again. Otherwise begin another run with a smaller "
            "driver.sigma, another space.start, or model.dtype=float32"
        )

    # ---- generations ----------------------------------------------------------------------------------------------

    def _evolve(self, relay: Relay, judge: Judge, measuring: Measuring, told: int) -> None:
        generation = told
        while generation < self.generations:
            stage = relay.stage(generation)
            relay.enter(stage)
            driver = relay.driver
            if driver.stopped() is not None:
                generation = relay.following(stage)
                continue
            if generation == stage.begin and stage.place and stage.fitness != self.plan[stage.place - 1].fitness:
                self.archive.best.clear()  # its numbers mean something else
            population = driver.ask()
            sizes = self.chunks.sizes  # memory may have ended in the middle of a generation
            if not measuring.agrees(generation, set[str]().union(*(digests(population, size) for size in sizes))):
                raise RunError(
                    f"{self.path}: generation {generation} cannot be gone on with: driver {stage.driver.name!r} "
                    "proposes other candidates than the journal has evaluations of (another version of its library, or "
                    "another kind of processor). Go on where the run began, or begin another one"
                )
            self._checkpoint(driver, generation, asked=True)
            draw = relay.since + (population.generation if population.draw is None else population.draw)
            samples = tuple(tuple(self.samples.minibatch(stage, task, draw)) for task in stage.tasks)
            wanted = rollout_vectors(population) if "rollouts" in driver.uses else None
            plan = Plan("train", generation, stage, samples, rollouts=wanted)
            fitness, _ = judge.judge(plan, population.vectors, population.seeds)
            self._check(fitness, generation, stage)
            self._tell(driver, population, fitness, generation)
            self._record(generation, stage, fitness, driver, self._look(driver, judge, stage, generation))
            generation += 1
            self._checkpoint(driver, generation, asked=False)
            measuring.forget(generation - 1)
            self.trackers.log(self.records[generation - 1])

    def _look(self, driver: Driver, judge: Judge, stage: Stage, generation: int) -> dict[str, float]:
        """Return the driver's diagnostics, and every so often how its mean compares with the oracle."""
        found = dict(driver.diagnostics)
        config = self.config.diagnostics
        if config.every and (generation + 1) % config.every == 0 and generation not in self.records:
            pools = (self.samples.pool(task, Split.TRAIN, stage.train_contexts) for task in stage.tasks)
            samples = tuple(tuple(pool[: config.contexts]) for pool in pools)
            plan = Plan("oracle", generation, stage, samples)
            seeds = np.zeros(1, dtype=np.int64)
            looks = [row.evaluations[0] for row in judge.measure(plan, _LOOK, driver.mean[None], seeds)]
            for name in ORACLE:
                values = [one.number(name) for one in looks]
                if None not in values:
                    found[name] = float(np.mean([as_float(value) for value in values]))
            found["expected_cost"] = float(np.mean([np.mean(one.table("head_cost") or [np.nan]) for one in looks]))
        return found

    def _tell(self, driver: Driver, population: Population, fitness: MeasuredFitness, generation: int) -> None:
        """Tell the driver all that came of its population, and the archive."""
        driver.tell(population, fitness)
        kept = replace(population, generation=generation)  # a later driver counts its own
        if isinstance(self.archive, FrontArchive):
            self.archive.update(kept, fitness.values, np.zeros(0) if fitness.costs is None else fitness.costs)
        else:
            self.archive.update(kept, fitness.values, driver.mean)

    def _check(self, fitness: MeasuredFitness, generation: int, stage: Stage) -> None:
        if fitness.failed == len(fitness.values):
            raise self.all_failed("train", generation, f"generation {generation}: all {fitness.failed} candidates")
        if generation == stage.since and generation not in self.records:
            sigma = stage.driver.sigma or self.space.sigma
            messages = [preflight(fitness, sigma, stage.samples_per_generation * len(stage.tasks))]
            if wants_bytes(self.config):
                messages.append(preflight_bytes(fitness))
            for message in messages:
                if message is not None:
                    self.warn(message)

    def _record(
        self, generation: int, stage: Stage, fitness: MeasuredFitness, driver: Driver, diagnostics: dict[str, float]
    ) -> None:
        """Write the generation's line, unless a killed process has done so already."""
        journal = self.run_folder.journal
        if generation not in self.records:
            record = GenerationRecord(
                generation=generation,
                stage=stage.name,
                fitness=tuple(fitness.values.tolist()),
                best=fitness.best,
                mean=fitness.mean,
                spread=fitness.spread,
                noise=fitness.noise,
                failed=fitness.failed,
                sigma=driver.sigma,
                evaluations=sum(journal.totals.evaluations.values()),
                tokens=journal.totals.tokens,
                seconds=journal.totals.seconds,
                diagnostics=diagnostics,
            )
            journal.append({"kind": "generation", **asdict(record)})
            self.records[generation] = record
        journal.sync()

    def _checkpoint(self, driver: Driver, generation: int, *, asked: bool) -> None:
        journal = self.run_folder.journal
        journal.sync()  # a checkpoint is never ahead of it
        state = Checkpoint(
            generation=generation,
            asked=asked,
            driver=driver.state_dict(),
            archive=self.archive.state_dict(),
            identity=self.identity,
            lines=journal.lines,
            generations=sum(known < generation for known in self.records),
        )
        checkpoints.save(self.path / "checkpoints", state)


def stored_space(config: ExperimentConfig, path: Path) -> SearchSpace:
    """Return the search space of a run, with the tensors that it started from; `RunError` if they do not fit."""
    tensors = read_state(path)
    try:
        return SearchSpace(config.space, tensors)
    except (RuntimeError, TypeError, ValueError, LookupError) as error:
        if isinstance(error, EvomemError):
            raise
        raise RunError(f"{path}: does not fit the search space: {' '.join(str(error).split())[:300]}") from None


def generation_record(record: Record) -> GenerationRecord:
    """Return the `GenerationRecord` of a journal line."""
    floats = ("best", "mean", "spread", "noise", "sigma", "seconds")
    try:
        return GenerationRecord(
            generation=record["generation"],
            stage=record["stage"],
            fitness=tuple(as_float(value) for value in record["fitness"]),
            failed=record["failed"],
            diagnostics={name: as_float(value) for name, value in record.get("diagnostics", {}).items()},
            evaluations=record["evaluations"],
            tokens=record["tokens"],
            **{name: as_float(record[name]) for name in floats},
        )
    except KeyError as error:
        raise RunError(f"journal.jsonl: a generation line has no {error}") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise RunError(f"journal.jsonl: a generation line is damaged: {error}") from None
