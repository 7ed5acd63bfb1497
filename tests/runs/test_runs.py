"""Runs: the loop equals a plain one, and what it is refused, tracked and given."""

from __future__ import annotations

import json
import math
import os

import numpy as np
import pytest
import yaml

from evomem.drivers import Fitness, build
from evomem.errors import FitnessError, RunError, TaskError
from evomem.evaluation.measurement import LOGLIK
from evomem.managers.vector import to_vector
from evomem.plugins import load as load_plugin
from evomem.runs import open_run, search
from evomem.runs.archive import Archive, evenly_spaced
from evomem.runs.bench import Bench
from evomem.runs.fitness import TaskValues, combine, preflight
from evomem.runs.folder import RunFolder
from evomem.runs.samples import Samples
from evomem.search_space.space import SearchSpace
from evomem.tasks.base import Split
from evomem.tracking import JsonlTracker, TerminalTracker
from tests.support.interrupted_search import SMALL, Interrupted, Stop, broken_off, outcome, same
from tests.support.synthetic_search import DIM, ToyEvaluator, ToyTask, experiment, factory


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    search(experiment(*SMALL), folder, factory(ToyEvaluator()))
    return outcome(folder)


# ---- the numbers ------------------------------------------------------------------------------------------------


def test_equals_a_plain_loop(tmp_path):
    """One candidate, one sample, one budget at a time, without journal, chunks or checkpoints; two stages."""
    stages = [
        {"generations": 3},
        {"generations": 2, "tasks": ["toy:c"], "length": 9, "budgets": [16], "samples_per_generation": 1},
    ]
    config = experiment(stages=stages, fitness={"price_per_megabyte": 0.01})
    result = search(config, tmp_path / "run", factory(ToyEvaluator()))
    generations = open_run(tmp_path / "run").generations()
    assert [g.stage for g in generations] == ["stage 1"] * 3 + ["stage 2"] * 2

    space, evaluator = SearchSpace(config.space), ToyEvaluator()
    samples = Samples(config, Bench(evaluator, lambda task: ToyTask(task.spec)))
    driver = build("cmaes", space.dim, space.start, 0, sigma=0.3, popsize=6)
    archive = []
    for generation in range(5):
        stage = config.plan()[0 if generation < 3 else 1]
        population, fitness = driver.ask(), []
        for vector in population.vectors:
            total = 0.0
            for task in stage.tasks:
                values = []
                for sample in samples.minibatch(stage, task, generation):
                    for budget in stage.budgets:
                        manager = space.decode(vector).with_options(budget=budget)
                        found = evaluator.evaluate([manager], sample, ToyTask(task.spec))[0]
                        values.append(found.loglik - 0.01 * found.bytes_mean / 1e6)
                total += task.weight * sum(values) / len(values)
            fitness.append(total / sum(task.weight for task in stage.tasks))
        assert generations[generation].fitness == pytest.approx(fitness, rel=1e-12)
        told = np.array(generations[generation].fitness)
        driver.tell(population, Fitness(told))
        archive += list(zip(told, population.vectors, strict=True))
        assert generations[generation].best == max(told)
        assert generations[generation].spread == pytest.approx(told.std(ddof=1))
        assert generations[generation].sigma == driver.sigma
    assert result.generations == 5
    finalists = [driver.mean, space.start, *[v for _, v in sorted(archive, key=lambda e: -e[0])[:2]]]
    assert any(np.array_equal(result.vector, vector) for vector in finalists) or result.winner.startswith("mean after")
    assert result.select.fitness == max(score.fitness for score in result.finalists.values())
    assert set(result.finalists) >= {"mean", "start"}


def test_sealed_samples_are_seen_once_by_the_winner_only(tmp_path):
    evaluator = ToyEvaluator()
    result = search(experiment(*SMALL), tmp_path / "run", factory(evaluator))
    sealed = [call for call in evaluator.calls if "/sealed/" in call[0]]
    assert len(sealed) == 2 * 2 * 2  # tasks, samples, budgets
    assert all(count == 1 and exact for _, count, exact in sealed)
    assert not any(exact for name, _, exact in evaluator.calls if "/sealed/" not in name)
    assert {call[0].split("/")[1] for call in evaluator.calls} == {"train", "select", "sealed"}
    assert result.sealed.exact is not None
    assert result.select.exact is None
    assert result.spent["evaluations"]["train"] == 3 * 6 * 2 * 2 * 2
    assert result.spent["tokens"] == 10 * sum(count for _, count, _ in evaluator.calls)
    assert "sealed" in "\n".join(result.lines())


def test_set_against_the_full_cache(tmp_path):
    found = {}
    for objective in ("loglik", "exact"):
        for normalise in ("none", "full"):
            config = experiment(*SMALL, fitness={"objective": objective, "normalise": normalise}, tasks=["toy:a"])
            evaluator = ToyEvaluator()
            search(config, tmp_path / f"{objective}-{normalise}", factory(evaluator))
            run = open_run(tmp_path / f"{objective}-{normalise}")
            full = [r["evaluations"][0] for r in run.records() if r["kind"] == "unit" and r["phase"] == "reference"]
            assert len({e["sample"] for e in full}) == len(full)
            found[objective, normalise] = run.generations()[0].fitness, {e["sample"]: e for e in full}, config
    for objective in ("loglik", "exact"):
        plain, (normal, full, config) = found[objective, "none"][0], found[objective, "full"]
        samples = Samples(config, Bench(ToyEvaluator(), lambda task: ToyTask(task.spec)))
        baseline = [full[s.id][objective] for s in samples.minibatch(config.plan()[0], config.tasks[0], 0)]
        mean = sum(baseline) / len(baseline)
        expected = np.array(plain) - mean if objective == "loglik" else np.array(plain) / max(mean, 0.1)
        assert np.allclose(normal, expected, rtol=1e-12)


def test_minibatches_use_every_context_before_any_again():
    config = experiment(train_contexts=7, samples_per_generation=3)
    stage = config.plan()[0]
    samples = Samples(config, Bench(ToyEvaluator(), lambda task: ToyTask(task.spec)))
    orders = []
    for begin in range(0, 8, 2):
        batches = [[s.id for s in samples.minibatch(stage, stage.tasks[0], g)] for g in (begin, begin + 1)]
        assert len(set(batches[0] + batches[1])) == 6
        orders.append(batches)
    assert len({repr(order) for order in orders}) == 4
    again = Samples(config, Bench(ToyEvaluator(), lambda task: ToyTask(task.spec)))
    assert [s.id for s in again.minibatch(stage, stage.tasks[0], 7)] == orders[3][1]
    pools = [samples.pool(config.tasks[0], split, 5) for split in Split]
    assert len({s.id for pool in pools for s in pool}) == 15


def test_noise_is_the_standard_error_of_paired_differences():
    """Against simulation: difficulty shared by all candidates must not count, each candidate's own deviation must."""
    rng, errors, noises = np.random.default_rng(0), [], []
    true = np.linspace(-1, 1, 16)
    for _ in range(300):
        tasks, weights, counts = [], (1.0, 3.0), (6, 10)
        for weight, count in zip(weights, counts, strict=True):
            own = rng.normal(0, 0.5, (16, count))
            tasks.append(TaskValues(weight, true[:, None] + rng.normal(0, 5, count) + own))
        fitness = combine(tasks)
        centred = fitness.values - fitness.values.mean()
        errors.append(centred - true)
        noises.append(fitness.noise)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.sqrt(np.mean(np.square(noises))), rel=0.05)


def test_preflight():
    rng = np.random.default_rng(0)

    def first(signal, noise, samples=6):
        values = signal * rng.standard_normal((16, 1)) + noise * rng.standard_normal((16, samples))
        return preflight(combine([TaskValues(1.0, values)]), 0.1, samples)

    assert first(1.0, 0.1) is None
    assert "driver.sigma=" in first(0.01, 1.0)
    assert "the same fitness" in first(0.0, 0.0)
    assert first(1.0, 1.0, samples=1) is None  # nothing is known about the noise


def test_archive():
    archive = Archive(2, evenly_spaced(9, 2))
    assert sorted(archive.snapshots) == [2, 5]
    from evomem.drivers import Population

    rng, everything = np.random.default_rng(0), []
    for generation in range(9):
        vectors, fitness = rng.standard_normal((4, 3)), rng.standard_normal(4)
        fitness[generation % 4] = np.nan
        archive.update(Population(generation, vectors, np.arange(4)), fitness, vectors[0])
        everything += list(zip(fitness, map(bytes, vectors), strict=True))
    best = sorted((e for e in everything if e[0] == e[0]), key=lambda e: -e[0])[:2]
    assert [bytes(entry[3]) for entry in archive.best] == [e[1] for e in best]
    finalists = archive.finalists(np.zeros(3), np.zeros(3))
    assert finalists[0].label == "mean"
    assert len(finalists) == 5  # the start is the mean here


# ---- refusals ---------------------------------------------------------------------------------------------------


def test_a_run_is_not_begun_twice_and_not_resumed_as_another(tmp_path):
    folder = tmp_path / "run"
    broken_off(folder)
    with pytest.raises(RunError, match="holds a run already"):
        search(experiment(*SMALL), folder, factory(ToyEvaluator()))
    with pytest.raises(RunError, match=r"driver\.population: 6 -> 8"):
        search(experiment(*SMALL, "driver.population=8"), folder, factory(ToyEvaluator()), resume=True)
    other = Bench(ToyEvaluator(), lambda task: ToyTask(task.spec), provenance={"model_digest": "other"})
    with pytest.raises(RunError, match="model_digest: 'none' -> 'other'"):
        search(experiment(*SMALL), folder, lambda config: other, resume=True)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("x")
    with pytest.raises(RunError, match=r"not empty.*dear\.txt"):
        search(experiment(*SMALL), tmp_path / "letters", factory(ToyEvaluator()), resume=True)


@pytest.mark.parametrize("after", [40, None])
def test_a_run_of_an_older_version_is_resumed_with_todays_defaults(tmp_path, undisturbed, after):
    """Its configuration lacks what has been added since, at the top and within; it may be finished."""
    folder = tmp_path / "run"
    if after is None:
        search(experiment(*SMALL), folder, factory(ToyEvaluator()))
    else:
        broken_off(folder, after)
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    del stored["threads"], stored["model"]["device_map"], stored["tasks"][0]["weight"]

    def resume(*settings):
        (folder / "config.yaml").write_text(yaml.safe_dump(stored))
        search(experiment(*SMALL, *settings), folder, factory(ToyEvaluator()), resume=True)

    with pytest.raises(RunError, match=r"threads: 1 -> 2\nResume"):
        resume("threads=2")
    resume()
    same(outcome(folder), undisturbed)
    stored["retired"] = 1
    with pytest.raises(RunError, match=r"retired: 1 -> \(absent\)"):
        resume()


def test_a_folder_in_use_is_refused(tmp_path):
    with (
        RunFolder(tmp_path / "run", experiment(), resume=False),
        pytest.raises(RunError, match=f"in use by process {os.getpid()}"),
    ):
        search(experiment(), tmp_path / "run", factory(ToyEvaluator()), resume=True)
    with RunFolder(tmp_path / "run", experiment(), resume=True) as again:
        assert again.resumed


def test_a_finished_run_gives_its_result_without_any_work(tmp_path):
    first = search(experiment(*SMALL), tmp_path / "run", factory(ToyEvaluator()))

    def nobody(config):
        raise AssertionError("a finished run needs no bench")

    again = search(experiment(*SMALL), tmp_path / "run", nobody, resume=True)
    assert repr(again.to_json()) == repr(first.to_json())
    assert np.array_equal(again.vector, first.vector)
    run = open_run(tmp_path / "run")
    assert run.config == experiment(*SMALL)
    assert run.winner.options.budget == 32
    plugin = load_plugin(run.plugin)
    assert type(plugin) is type(run.winner)
    assert np.array_equal(to_vector(plugin), to_vector(run.winner))
    assert np.allclose(run.space.encode(run.winner), first.vector, atol=1e-6)
    with pytest.raises(RunError, match="no run folder"):
        open_run(tmp_path)


def test_what_the_search_starts_from_is_kept(tmp_path, undisturbed):
    """The file that a search started from may change afterwards; the run does not."""
    start = tmp_path / "start.npy"
    np.save(start, np.zeros(DIM))
    settings = (*SMALL, f"space.start={{vector: {start}}}")
    search(experiment(*settings), tmp_path / "whole", factory(ToyEvaluator()))
    with pytest.raises(Stop):
        search(experiment(*settings), tmp_path / "run", factory(Interrupted(40)))
    np.save(start, np.ones(DIM))
    search(experiment(*settings), tmp_path / "run", factory(ToyEvaluator()), resume=True)
    same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))


# ---- failures ---------------------------------------------------------------------------------------------------


def test_candidates_without_fitness_are_counted_and_do_not_win(tmp_path):
    def broken(loglik, sample, place):
        return math.nan if place == 1 else -math.inf if place == 2 and sample.id.endswith("/1") else loglik

    result = search(experiment(*SMALL), tmp_path / "run", factory(ToyEvaluator(broken=broken)))
    generations = open_run(tmp_path / "run").generations()
    assert all(g.failed >= 2 and math.isnan(g.fitness[1]) and math.isnan(g.fitness[5]) for g in generations)
    assert math.isfinite(result.select.fitness)
    for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize("phase", ["train/0", "train/1", "select"])
def test_a_generation_that_fails_as_a_whole_stops_the_search_and_is_evaluated_again(tmp_path, undisturbed, phase):
    folder, name = tmp_path / "run", phase.partition("/")[0]
    calls = []

    def broken(loglik, sample, place):
        calls.append(sample.id)
        late = phase != "train/1" or len(calls) > 6 * 2 * 2 * 2
        return math.nan if f"/{name}/" in sample.id and late else loglik

    with pytest.raises(FitnessError, match=r"no finite fitness.*resume"):
        search(experiment(*SMALL), folder, factory(ToyEvaluator(broken=broken)))
    search(experiment(*SMALL), folder, factory(ToyEvaluator()), resume=True)
    run = open_run(folder)
    assert repr([g.fitness for g in run.generations()]) == undisturbed[1]
    assert run.winner_vector.tobytes() == undisturbed[2]


class Flaky(ToyEvaluator):
    def __init__(self, failures):
        super().__init__()
        self.failures = failures

    def evaluate(self, candidates, sample, task, measurement=LOGLIK):
        if self.failures.get(sample.id, 0) > 0:
            self.failures[sample.id] -= 1
            raise OSError("a cable was loose")
        return super().evaluate(candidates, sample, task, measurement)


def test_failing_evaluations_are_tried_again_and_counted(tmp_path, undisturbed):
    failures = {f"toy:a/train/0/{k}": 1 for k in range(7)}
    result = search(experiment(*SMALL), tmp_path / "run", factory(Flaky(failures)))
    assert result.spent["failed_attempts"] == 7 - sum(failures.values()) > 0
    same(outcome(tmp_path / "run"), undisturbed)
    with pytest.raises(RunError, match=r"failed 2 times.*a cable was loose"):
        search(experiment(*SMALL), tmp_path / "other", factory(Flaky({f"toy:b/train/0/{k}": 9 for k in range(7)})))
    search(experiment(*SMALL), tmp_path / "other", factory(ToyEvaluator()), resume=True)
    same(outcome(tmp_path / "other"), undisturbed)


def test_too_few_samples(tmp_path):
    class Small(ToyTask):
        def samples(self, split, n, seed):
            return super().samples(split, min(n, 4), seed)

    bench = Bench(ToyEvaluator(), lambda task: Small(task.spec))
    with pytest.raises(TaskError, match="split 'train' has 4 samples, 7 are needed"):
        search(experiment(), tmp_path / "run", lambda config: bench)


# ---- trackers ---------------------------------------------------------------------------------------------------


class Bad:
    calls = 0

    def start(self, *arguments):
        self.calls += 1

    def log(self, generation):
        self.calls += 1
        raise ValueError("no network")


def test_trackers_hear_the_journal_and_cannot_stop_a_run(tmp_path, undisturbed, caplog, capsys):
    bad, good = Bad(), JsonlTracker(tmp_path / "heard.jsonl")
    search(experiment(*SMALL), tmp_path / "run", factory(ToyEvaluator()), tracker=[bad, good, TerminalTracker()])
    assert bad.calls == 2
    assert capsys.readouterr().err.count("no network") == 1
    heard = [json.loads(line) for line in (tmp_path / "heard.jsonl").read_text().splitlines()]
    assert [h["event"] for h in heard] == ["start", *["generation"] * 3, "artifact", "finish"]
    journal = [r for r in open_run(tmp_path / "run").records() if r["kind"] == "generation"]
    for said, written in zip(heard[1:4], journal, strict=True):
        assert {**said, "kind": "generation"} == {**written, "event": "generation"}
    assert heard[-1]["status"] == "finished"
    same(outcome(tmp_path / "run"), undisturbed)


def test_trackers_hear_of_the_end_whatever_it_is(tmp_path):
    tracker = JsonlTracker(tmp_path / "heard.jsonl")
    with pytest.raises(Stop):
        search(experiment(*SMALL), tmp_path / "run", factory(Interrupted(25)), tracker=tracker)
    search(experiment(*SMALL), tmp_path / "run", factory(ToyEvaluator()), resume=True, tracker=tracker)
    heard = [json.loads(line) for line in (tmp_path / "heard.jsonl").read_text().splitlines()]
    assert [h["status"] for h in heard if h["event"] == "finish"] == ["interrupted", "finished"]
    assert [h["done"] for h in heard if h["event"] == "start"] == [0, 1]
    assert [h["generation"] for h in heard if h["event"] == "generation"] == [0, 1, 2]
