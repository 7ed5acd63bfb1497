"""Drivers that take turns: each begins where the one before it ended, whatever happens to the run."""

from __future__ import annotations

import numpy as np
import pytest

from evomem.drivers.base import Fitness, drivers
from evomem.drivers.random_search import RandomSearch
from evomem.errors import ConfigError, RunError, UnknownNameError
from evomem.evaluation import Evaluator
from evomem.runs import checkpoint as checkpoints
from evomem.runs import model_bench, open_run, parse_experiment, search
from evomem.runs.bench import Bench
from evomem.runs.driver_setup import make_driver
from evomem.runs.samples import Samples
from evomem.runs.warm_start import replay
from evomem.search_space.space import SearchSpace
from tests.runs.test_block_search import without_tokens
from tests.support.interrupted_search import Interrupted, Stop, outcome, same
from tests.support.policy_search import STAGES, configured
from tests.support.synthetic_search import ToyEvaluator, ToyTask, experiment, factory

SNES = {"name": "snes", "population": 5}
TURNS = [
    {"generations": 2, "budgets": [32], "samples_per_generation": 2},
    {"generations": 2, "driver": SNES, "budgets": [32], "samples_per_generation": 2},
    {"generations": 1, "budgets": [16], "samples_per_generation": 1},
]
NO_LOOKS = {"every": 0}
SHORT = ("select={contexts: 2, top: 2, snapshots: 2}", "sealed.contexts=2")


def taking_turns(stages=TURNS, **changes):
    return experiment(*SHORT, stages=stages, **changes)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("turns") / "run"
    search(taking_turns(), folder, factory(ToyEvaluator()))
    return folder


def test_the_second_begins_where_the_first_ended_and_stays_at_work(undisturbed):
    generations = open_run(undisturbed).generations()
    assert [len(g.fitness) for g in generations] == [6, 6, 5, 5, 5]
    # The first driver by itself, told what it was told, ends where the second begins.
    config, space = taking_turns(), open_run(undisturbed).space
    start = np.load(undisturbed / "start" / "vector.npy")
    first = make_driver(config, space, start, undisturbed)
    for generation in generations[:2]:
        first.tell(first.ask(), Fitness(np.array(generation.fitness)))
    assert np.array_equal(np.load(undisturbed / "start" / "driver-2.npy"), first.mean)
    # And the second, told what it was told, ends where the run does: the last stage names no driver.
    second = make_driver(config, space, first.mean, undisturbed, config.plan()[1])
    for generation in generations[2:]:
        second.tell(second.ask(), Fitness(np.array(generation.fitness)))
    state = checkpoints.load(max((undisturbed / "checkpoints").iterdir()))
    assert state.generation == 5
    again = make_driver(config, space, first.mean, undisturbed, config.plan()[2])
    again.load_state_dict(state.driver)
    assert np.array_equal(again.mean, second.mean)
    # The archive counts generations as the run does, not as its drivers do.
    assert [generations[g].fitness[place] for _, g, place, _ in state.archive["best"]] == [
        fitness for fitness, *_ in state.archive["best"]
    ]
    assert [generation for generation, _ in state.archive["means"]] == [1, 2]


def test_candidates_are_measured_on_the_runs_minibatches(tmp_path):
    """With next to no spread all candidates of the second driver are the first one's mean."""
    stages = [{"generations": 3}, {"generations": 3, "driver": {"name": "random_search", "sigma": 1e-9}}]
    config = taking_turns(stages)
    search(config, tmp_path / "run", factory(ToyEvaluator()))
    mean, evaluator = np.load(tmp_path / "run" / "start" / "driver-3.npy"), ToyEvaluator()
    space, samples = SearchSpace(config.space), Samples(config, Bench(evaluator, lambda task: ToyTask(task.spec)))
    generations, stage = open_run(tmp_path / "run").generations(), config.plan()[1]
    for generation in generations[3:]:
        total = 0.0
        for task in stage.tasks:
            minibatch = samples.minibatch(stage, task, generation.generation)
            managers = [space.decode(mean).with_options(budget=budget) for budget in stage.budgets]
            values = [evaluator.evaluate(managers, sample, ToyTask(task.spec)) for sample in minibatch]
            total += task.weight / 3 * np.mean([one.loglik for row in values for one in row])
        assert generation.fitness == pytest.approx([total] * len(generation.fitness), abs=1e-6)


@pytest.mark.parametrize("every", [1, 2, 5, 11])
def test_interrupted_again_and_again(tmp_path, undisturbed, every):
    for _ in range(300):
        try:
            search(taking_turns(), tmp_path / "run", factory(Interrupted(every)), resume=True)
            break
        except Stop:
            continue
    same(outcome(tmp_path / "run"), outcome(undisturbed))


@pytest.mark.parametrize("kept", [0, 1])
def test_with_fewer_checkpoints_the_journal_is_enough(tmp_path, undisturbed, kept):
    for after in range(4, 34, 3):
        folder = tmp_path / f"run-{after}"
        with pytest.raises(Stop):
            search(taking_turns(), folder, factory(Interrupted(after)))
        for path in sorted((folder / "checkpoints").iterdir())[kept:]:
            path.unlink()
        search(taking_turns(), folder, factory(ToyEvaluator()), resume=True)
        same(outcome(folder), outcome(undisturbed))


def test_two_of_one_kind_draw_different_candidates(tmp_path):
    config = taking_turns([{"generations": 1}, {"generations": 1, "driver": {"name": "cmaes", "population": 6}}])
    space = SearchSpace(config.space)
    first, second, again = (
        make_driver(config, space, space.start, tmp_path, config.plan()[place]).ask() for place in (0, 1, 1)
    )
    assert not np.isin(second.vectors, first.vectors).any()
    assert not np.isin(second.seeds, first.seeds).any()
    assert np.array_equal(second.vectors, again.vectors)


def test_one_that_has_converged_hands_over_early(tmp_path, monkeypatch):
    class Converges(RandomSearch):
        def stopped(self):
            return "enough" if self.ask().generation >= 2 else None

    monkeypatch.setitem(drivers._classes, "converges", Converges)
    stages = [{"generations": 4}, {"generations": 1}, {"generations": 2, "driver": SNES}]
    config = taking_turns(stages, driver={"name": "converges", "population": 4})
    for _ in range(300):
        try:
            result = search(config, tmp_path / "run", factory(Interrupted(5)), resume=True)
            break
        except Stop:
            continue
    assert [g.generation for g in open_run(tmp_path / "run").generations()] == [0, 1, 5, 6]
    assert result.stopped is None
    # Without a successor the search ends, and the result says why.
    ended = search(
        taking_turns(stages[:2], driver=config.driver.model_dump()), tmp_path / "one", factory(ToyEvaluator())
    )
    assert (ended.stopped, ended.generations) == ("enough", 2)


@pytest.mark.parametrize(
    ("driver", "error", "message"),
    [
        ({"name": "cmeas"}, UnknownNameError, "Did you mean 'cmaes'"),
        ({"name": "snes", "options": {"diagonal": True}}, ConfigError, "snes"),
        ({"name": "policy_gradient"}, ConfigError, "draws no decisions"),
        ({"name": "cmaes", "options": {"warm_start": "runs/other"}}, ConfigError, "begins where the one before it"),
        ({"name": "nsga2"}, ConfigError, "for one or the other"),
    ],
)
def test_what_a_later_driver_cannot_do_is_said_before_anything_is_spent(driver, error, message, tmp_path):
    evaluator = ToyEvaluator()
    with pytest.raises(error, match=message):
        search(taking_turns([{"generations": 1}, {"generations": 1, "driver": driver}]), tmp_path, factory(evaluator))
    assert evaluator.calls == []


def test_a_stage_that_its_driver_cannot_work_in_is_refused_at_the_beginning(tmp_path):
    evaluator = ToyEvaluator()
    headwise = {"generations": 1, "fitness": {"objective": "attention"}}
    with pytest.raises(ConfigError, match="nothing in the search space belongs to one head"):
        search(taking_turns([{"generations": 1}, headwise], driver="block_cmaes"), tmp_path, factory(evaluator))
    assert evaluator.calls == []


def test_the_first_driver_may_be_named_with_its_stage_but_not_twice():
    data = taking_turns().resolved()
    stages = [{**data["stages"][0], "driver": SNES}, *data["stages"][1:]]
    named = parse_experiment({**data, "driver": None, "stages": stages})
    assert named == parse_experiment({**data, "driver": SNES})
    assert parse_experiment(named.resolved()) == named
    assert [stage.since for stage in named.plan()] == [0, 2, 2]
    with pytest.raises(ConfigError, match="named twice"):
        parse_experiment({**data, "stages": stages})


def test_such_a_run_is_not_followed(undisturbed):
    with pytest.raises(RunError, match="took turns"):
        next(replay(open_run(undisturbed)))


def test_exact_gradients_then_evolution(tmp_path, monkeypatch):
    """A real policy: evolution begins at the average that the gradients reached; stopped there, it ends the same."""
    exact, evolved = STAGES[0], {"name": "evolution", "generations": 2, "driver": {"name": "cmaes", "population": 4}}
    alone = configured(stages=[exact], diagnostics=NO_LOOKS)
    search(alone, tmp_path / "alone", model_bench)
    config = configured(stages=[exact, evolved], diagnostics=NO_LOOKS)
    search(config, tmp_path / "whole", model_bench)
    reached = checkpoints.load(max((tmp_path / "alone" / "checkpoints").iterdir())).driver["_average"]
    assert np.array_equal(np.load(tmp_path / "whole" / "start" / "driver-3.npy"), reached)
    generations = open_run(tmp_path / "whole").generations()
    assert [len(g.fitness) for g in generations] == [1, 1, 1, 4, 4]
    assert "policy_gradient, then cmaes, seed 0" in (open_run(tmp_path / "whole").plugin / "README.md").read_text()
    assert np.isfinite([g.sigma for g in generations[3:]]).all()

    def stop(*_, **__):
        raise Stop

    with monkeypatch.context() as broken:
        broken.setattr(Evaluator, "answer", stop)  # the exact phase lets nothing be answered
        with pytest.raises(Stop):
            search(config, tmp_path / "run", model_bench)
    assert len(open_run(tmp_path / "run").generations()) == 3
    search(config, tmp_path / "run", model_bench, resume=True)
    same(without_tokens(outcome(tmp_path / "run")), without_tokens(outcome(tmp_path / "whole")))
