"""Run: the search loop. Ask, evaluate what is missing, tell; then choose the winner and report it once.

Everything that is evaluated goes through the journal, and every decision is a pure function of the configuration and
of what was evaluated. That is why a run that was killed at any moment goes on bit-exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from evomem.drivers.base import Array, Driver, Population
from evomem.errors import FitnessError, RunError
from evomem.evaluation.costs import ORACLE
from evomem.evaluation.measurement import Measurement, Quantity
from evomem.evaluation.needs import require
from evomem.files.strict_json import as_float
from evomem.runs import checkpoint as checkpoints
from evomem.runs.archive import Archive, evenly_spaced
from evomem.runs.batch_size import choose_chunks
from evomem.runs.bench import BenchFactory, model_bench
from evomem.runs.candidates import Judge, Plan, rollout_vectors
from evomem.runs.checkpoint import Checkpoint
from evomem.runs.chunks import Chunks, digests
from evomem.runs.config import ExperimentConfig, Stage
from evomem.runs.driver_relay import Relay
from evomem.runs.fitness import MeasuredFitness, preflight
from evomem.runs.folder import RunFolder
from evomem.runs.front import FrontArchive, preflight_bytes, wants_bytes
from evomem.runs.identity import identify
from evomem.runs.inputs import pinned
from evomem.runs.journal import Record, read_journal
from evomem.runs.journaled_pool import JournaledPool
from evomem.runs.paths import base_of, resolve_paths
from evomem.runs.plan_checks import check_objectives
from evomem.runs.plan_needs import search_needs, vectors_needs
from evomem.runs.pools import limited_threads, make_pool
from evomem.runs.result import RunResult
from evomem.runs.resume import finished_generations, known_units, quarantined
from evomem.runs.samples import Samples
from evomem.runs.start import prepare_start
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

    def _journalled(self) -> Iterator[Record]:
        """Yield the lines of the journal so far; what is wrong with it has been reported."""
        return read_journal(self.run_folder.journal.path, report=False)

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
        self.space, self.start = prepare_start(self.path, self.config, self.bench, self.samples)
        require(vectors_needs(self.config, self.space.dim), check=self.plan_check, say=self.warn)
        self.identity = identify(self.path, self.config, journal)
        self._check_chance()
        self.chunks = choose_chunks(self)
        relay, finished = self._restore()
        pool = make_pool(
            self.config,
            self.space,
            self.bench,
            self.samples,
            self.factory,
            self.workers,
            report=self.warn,
            quarantined=quarantined(self._journalled()),
        )
        units = JournaledPool(pool, journal, known_units(self._journalled(), finished, self.warn))
        judge = Judge(units, self.samples, self.chunks)
        done = [self.records[g] for g in sorted(self.records) if g < finished]
        self.trackers.start(self.config.resolved(), self.generations, done)
        try:
            self._evolve(relay, judge, units, finished)
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

    def _check_chance(self) -> None:
        """Refuse a task that measures nothing on this model, before anything is spent on it; once per run."""
        if not self.config.chance_contexts:
            return
        journal = self.run_folder.journal
        events = (record for record in self._journalled() if record["kind"] == "event")
        passed = {event["task"] for event in events if event["event"] == "chance" and event["passed"]}
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
        """Return the drivers in the state of the newest checkpoint, and how many generations they have learned from.

        Without a checkpoint that counts they are at the beginning, and learn every generation again from the journal.
        """
        journal = self.run_folder.journal
        self.records = finished_generations(self._journalled())
        empty = self.archive.state_dict()
        for checkpoint in checkpoints.newest(
            self.path / "checkpoints", self.identity, journal.lines, list(self.records)
        ):
            if isinstance(checkpoint, str):  # why one does not count
                self.warn(checkpoint)
                continue
            relay = self._relay()
            try:
                relay.restore(checkpoint)
                self.archive.load_state_dict(checkpoint.archive)
                if not np.isfinite(relay.driver.mean).all():
                    raise RunError("its mean is not finite")
            except Exception as error:  # what a state that fits no driver makes of it
                self.warn(f"checkpoint {checkpoint.name} does not fit ({error}); {checkpoints.ALL_FROM_JOURNAL}")
                self.archive.load_state_dict(empty)
                continue
            return relay, checkpoint.generation
        return self._relay(), 0

    def _relay(self) -> Relay:
        return Relay(self.config, self.space, self.start, self.path)

    def all_failed(self, phase: str, generation: int | None, what: str) -> FitnessError:
        """Note that nothing of a phase has a finite fitness; return the error to raise."""
        self.run_folder.journal.event("all_failed", phase=phase, generation=generation)
        return FitnessError(
            f"{what} have no finite fitness (NaN or infinite). Look at the last units in journal.jsonl. If the cause "
            "can be mended, mend it and resume: they are evaluated again. Otherwise begin another run with a smaller "
            "driver.sigma, another space.start, or model.dtype=float32"
        )

    # ---- generations ----------------------------------------------------------------------------------------------

    def _evolve(self, relay: Relay, judge: Judge, units: JournaledPool, finished: int) -> None:
        generation = finished
        while generation < self.generations:
            stage = relay.stage(generation)
            relay.enter(stage)
            driver = relay.driver
            if driver.stopped() is not None:
                generation = relay.following(stage)
                continue
            if generation == stage.begin and stage.index and stage.fitness != self.plan[stage.index - 1].fitness:
                self.archive.best.clear()  # its numbers mean something else
            population = driver.ask()
            sizes = self.chunks.sizes  # memory may have ended in the middle of a generation
            if not units.agrees(generation, set[str]().union(*(digests(population, size) for size in sizes))):
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
            self._record(
                generation,
                stage,
                fitness,
                driver,
                {**self._look(driver, judge, stage, generation), **fitness.by_budget},
            )
            generation += 1
            self._checkpoint(driver, generation, asked=False)
            units.forget(generation - 1)
            self.trackers.log(self.records[generation - 1])

    def _look(self, driver: Driver, judge: Judge, stage: Stage, generation: int) -> dict[str, float]:
        """Return the driver's diagnostics, and every so often how its mean compares with the oracle."""
        diagnostics = dict(driver.diagnostics)
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
                    diagnostics[name] = float(np.mean([as_float(value) for value in values]))
            diagnostics["expected_cost"] = float(
                np.mean([np.mean(one.table("head_cost") or [np.nan]) for one in looks])
            )
        return diagnostics

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
