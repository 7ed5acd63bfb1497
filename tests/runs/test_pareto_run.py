"""Runs: a search for a front, on a formula whose front is known; killed, resumed, exported."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from evomem import plugins
from evomem.cli.app import app
from evomem.cli.commands.front import front_notes, front_table
from evomem.drivers.base import Population
from evomem.errors import ConfigError, RunError
from evomem.evaluation.measurement import LOGLIK
from evomem.managers.vector import to_vector
from evomem.report.evolving import compared_budgets
from evomem.report.plots import front_plot
from evomem.runs import open_run, search
from evomem.runs.front import MEMBERS, FrontArchive, front_of, member_of, plugin_folder, read_front, well_spread
from evomem.runs.samples import Samples
from evomem.tasks.base import Split
from tests.drivers.test_nsga2 import dominates, hypervolume
from tests.support.interrupted_search import outcome, same
from tests.support.synthetic_search import DIM, ToyEvaluator, ToyTask, experiment, factory, number

SPACE = {
    "manager": {"name": "toy"},
    "options": {"budget": {"kind": "log_integer", "low": 8, "high": 128, "start": 32}},
    "sigma": 0.3,
}


class Curve(ToyEvaluator):
    """Score: how near the weights are to their target, and less for small budgets; bytes: 10^6 a slot."""

    def __init__(self, stop_after=None, fails=None):
        super().__init__()
        self.stop_after, self.fails = stop_after, fails

    def evaluate(self, candidates, sample, task, measurement=LOGLIK):
        if self.stop_after is not None and len(self.calls) >= self.stop_after:
            os.kill(os.getpid(), signal.SIGKILL)
        found = super().evaluate(candidates, sample, task)
        found = [replace(e, values={"loglik": e.loglik - 20 / e.slots}) for e in found]
        return [
            replace(e, values={"loglik": self.fails}) if self.fails is not None and (m.options.budget or 0) > 64 else e
            for e, m in zip(found, candidates, strict=True)
        ]


def configured(*settings, **changes):
    return experiment(
        "driver={name: nsga2, population: 12}", "budgets=null", "fitness.normalise=full", "tasks=[toy:a]",
        "select={contexts: 5, top: 8}", *settings, space=SPACE, **changes,
    )  # fmt: skip


SMALL = ("generations=4", "samples_per_generation=2", "select.contexts=3", "sealed.contexts=3")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A finished run, long enough to find the front."""
    folder = tmp_path_factory.mktemp("front") / "run"
    config = configured("generations=36", "driver.population=48", "chunk=48")
    search(config, folder, factory(Curve()))
    return folder


# ---- geometry -----------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(-4, 4), st.integers(1, 6)), max_size=14), st.sampled_from([0.0, math.nan, math.inf])
)
def test_front_against_the_definition(points, spoil):
    scores, held = np.array([p[0] for p in points], float), np.array([p[1] for p in points], float)
    if spoil != 0.0:
        scores[::4], held[1::4] = spoil, spoil
    good = [n for n in range(len(points)) if math.isfinite(scores[n]) and math.isfinite(held[n])]
    slow = {
        (scores[n], held[n])
        for n in good
        if not any(dominates((scores[m], held[m]), (scores[n], held[n])) for m in good)
    }
    front = front_of(scores, held)
    assert {(scores[n], held[n]) for n in front} == slow
    assert len(front) == len(slow)  # equal ones count once, and the first of them
    assert all(not any((scores[m], held[m]) == (scores[n], held[n]) for m in good if m < n) for n in front)
    assert (np.diff(held[front]) > 0).all()
    assert (np.diff(scores[front]) > 0).all()


@given(st.integers(0, 1000), st.integers(1, 30), st.integers(1, 12))
def test_thinning_keeps_the_ends_and_the_gaps_small(seed, size, count):
    rng = np.random.default_rng(seed)
    held, scores = np.sort(rng.uniform(1, 100, size)), np.sort(rng.standard_normal(size))
    kept = well_spread(scores, held, count)
    assert len(kept) == min(size, count)
    assert (np.diff(kept) > 0).all()
    assert kept[-1] == size - 1
    if count > 1:
        assert kept[0] == 0


def test_the_archive_believes_the_newest_measurement_of_a_candidate():
    archive = FrontArchive(top=4)
    vectors = np.arange(6.0)[:, None]
    archive.update(Population(0, vectors, np.arange(6)), np.array([9, 1, 2, 3, np.nan, 4.0]), np.arange(1.0, 7))
    assert [c.place for c in archive.best] == [0]
    # The lucky one is measured again, and is the worst of all.
    archive.update(Population(1, vectors[:3], np.arange(3)), np.array([-9.0, 5, 6]), np.array([1.0, 2, 3]))
    assert [(c.generation, c.place) for c in archive.best] == [(1, 0), (1, 1), (1, 2)]
    labels = [finalist.label for finalist in archive.finalists(np.zeros(1), vectors[1])]
    assert labels == ["start", "candidate 2/0", "candidate 2/2"]
    again = FrontArchive(top=4)
    again.load_state_dict(archive.state_dict())
    assert again == archive


# ---- what a run finds ---------------------------------------------------------------------------------------------


def test_the_front_approaches_the_true_one(found):
    """The best possible at every budget, in closed form: weights at the mean of the samples' targets."""
    members, config = read_front(found), configured()
    samples = Samples(config, factory(ToyEvaluator())(config)).pool(config.tasks[0], Split.SEALED, 6)
    targets = np.array([[0.7 + 0.1 * (number(s.id, i) - 0.5) for i in range(DIM)] for s in samples])
    lost = ((targets.mean(0) - targets) ** 2).sum(1).mean() - ((0.7 - targets) ** 2).sum(1).mean()
    budgets = np.arange(8, 129)
    best = -21 / budgets + 21 / 100 - lost
    sizes = [m.sealed.bytes_mean for m in members]
    scores = [m.sealed.fitness for m in members]
    for score, size in zip(scores, sizes, strict=True):
        assert score <= best[round(size / 1e6) - 8] + 1e-9  # nobody is better than possible
    worst, largest = best[0] - 1, 129e6
    assert hypervolume(scores, sizes, worst, largest) >= 0.9 * hypervolume(best, budgets * 1e6, worst, largest)


def test_members_are_not_dominated_and_well_spread(found):
    result, members = open_run(found).result, read_front(found)
    finalists = [(s.fitness, s.bytes_mean) for s in result.finalists.values()]
    assert 8 <= len(members) <= MEMBERS
    for member in members:
        point = (member.select.fitness, member.select.bytes_mean)
        assert result.finalists[member.label] == member.select
        assert not any(dominates(other, point) for other in finalists)
        assert math.isfinite(member.sealed.fitness)
    assert [m.place for m in members] == list(range(len(members)))
    assert sorted(m.sealed.bytes_mean for m in members) == [m.sealed.bytes_mean for m in members]
    assert result.winner == members[-1].label
    assert result.select == members[-1].select
    assert result.sealed == members[-1].sealed
    assert members[-1].select.fitness == max(score for score, _ in finalists)
    assert result.front == len(members)
    assert "start" in result.finalists


def test_every_member_is_a_plugin_that_scores_what_the_front_says(found):
    run, members, evaluator = open_run(found), read_front(found), Curve()
    samples = Samples(run.config, factory(evaluator)(run.config)).pool(run.config.tasks[0], Split.SEALED, 6)
    for member in members:
        plugin = plugins.read(plugin_folder(found, member.place))
        logliks = [evaluator.evaluate([plugin.manager], sample, ToyTask("toy:a"))[0].loglik for sample in samples]
        assert np.mean(logliks) == pytest.approx(member.sealed.loglik, rel=1e-6)
        assert plugin.manager.options.budget == member.budget == member.sealed.slots
        assert member.interval[0] <= member.sealed.loglik <= member.interval[1]
        told = plugin.provenance
        assert told["front"] == {"place": member.place, "members": len(members)}
        assert told["winner"] == member.label
        assert told["scores"]["sealed"]["loglik"] == member.sealed.loglik
        assert (plugin_folder(found, member.place) / "README.md").read_text().startswith("---")
    assert np.array_equal(to_vector(plugins.load(run.plugin)), to_vector(plugin.manager))
    assert run.winner.options.budget == members[-1].budget


def test_sealed_is_looked_at_once_by_members_only(tmp_path):
    evaluator = Curve()
    search(configured(*SMALL), tmp_path / "run", factory(evaluator))
    members = read_front(tmp_path / "run")
    sealed = [count for name, count, _ in evaluator.calls if "/sealed/" in name]
    assert sum(sealed) == 3 * (len(members) + 1)  # samples, and the full cache beside them


@pytest.mark.parametrize("fails", [math.nan, -math.inf, math.inf])
def test_who_fails_is_never_on_the_front(tmp_path, fails):
    search(configured(*SMALL), tmp_path / "run", factory(Curve(fails=fails)))
    run, members = open_run(tmp_path / "run"), read_front(tmp_path / "run")
    assert sum(g.failed for g in run.generations()) > 0
    assert members
    assert all(m.budget <= 64 and math.isfinite(m.sealed.fitness) for m in members)


# ---- killed -------------------------------------------------------------------------------------------------------


def everything(folder):
    """What `outcome` says, the front, and the members' files."""
    units, *others = outcome(folder)
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted((folder / "front").rglob("*"))
        if path.is_file() and path.name not in ("provenance.json", "README.md")  # they say what was spent
    }
    return units, (*others, (folder / "front.json").read_bytes(), files)


@pytest.mark.parametrize("every", [3, 11, 17])
def test_killed_again_and_again(tmp_path, every):
    """With SIGKILL, in a process of its own, at every so many evaluations: in all phases."""
    small = (*SMALL, "select.top=1")  # so that the last generation's own front matters
    search(configured(*small), tmp_path / "whole", factory(Curve()))
    assert len(read_front(tmp_path / "whole")) > 2
    folder, kills = tmp_path / "run", 0
    while True:
        child = os.fork()
        if child == 0:
            search(configured(*small), folder, factory(Curve(stop_after=every)), resume=True)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
    assert kills >= 2
    same(everything(folder), everything(tmp_path / "whole"))


def test_killed_while_the_front_is_written(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    save, written = plugins.folder.save, []

    def torn(manager, target, *arguments, **options):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(target)
        save(manager, target, *arguments, **options)

    monkeypatch.setattr("evomem.plugins.save", torn)
    with pytest.raises(KeyboardInterrupt):
        search(configured(*SMALL), folder, factory(Curve()))
    monkeypatch.undo()
    assert len(written) == 1
    assert open_run(folder).result is None
    assert read_front(folder) == []
    search(configured(*SMALL), folder, factory(Curve()), resume=True)
    search(configured(*SMALL), tmp_path / "whole", factory(Curve()))
    same(everything(folder), everything(tmp_path / "whole"))


# ---- taken away ---------------------------------------------------------------------------------------------------


def exported(*words):
    result = CliRunner().invoke(app, ["export", *map(str, words)])
    return result.exit_code, result.output


def test_export_by_place_and_by_bytes(found, tmp_path):
    members = read_front(found)
    for place in (0, len(members) // 2):
        assert exported(found, tmp_path / "out", "--place", place, "--overwrite")[0] == 0
        assert plugins.load(tmp_path / "out").options.budget == members[place].budget
    sizes = [member.sealed.bytes_mean for member in members]
    for size in (*sizes, 1e12, (sizes[1] + sizes[2]) / 2):
        assert exported(found, tmp_path / "out", "--bytes", size, "--overwrite")[0] == 0
        fitting = [member for member in members if member.sealed.bytes_mean <= size]
        assert plugins.load(tmp_path / "out").options.budget == fitting[-1].budget
        assert member_of(found, None, size) == fitting[-1]
    assert exported(found, tmp_path / "out", "--overwrite")[0] == 0
    assert plugins.load(tmp_path / "out").options.budget == members[-1].budget


def test_exports_that_cannot_be(found, tmp_path):
    smallest = read_front(found)[0].sealed.bytes_mean
    for words, message in (
        ((found, "--place", 99), "places 0 to"),
        ((found, "--bytes", smallest - 1), "the smallest holds"),
        ((found, "--place", 1, "--bytes", 1e9), "give one"),
        ((plugin_folder(found, 0), "--place", 1), "is a plug-in"),
    ):
        code, text = exported(words[0], tmp_path / "out", *words[1:])
        assert code == 2
        assert message in " ".join(text.split())
    search(experiment("generations=1", "budgets=[16]"), tmp_path / "plain", factory(ToyEvaluator()))
    with pytest.raises(RunError, match="has no front"):
        member_of(tmp_path / "plain", 0, None)
    (tmp_path / "plain" / "front.json").write_text("[{}]")
    with pytest.raises(RunError, match="cannot be read"):
        read_front(tmp_path / "plain")


def test_the_table_the_notes_and_the_picture(found, tmp_path):
    members = read_front(found)
    table = front_table(members)
    assert table.row_count == len(members)
    budgets = compared_budgets(members)
    assert len(budgets) == 3
    assert (budgets[0], budgets[-1]) == (members[0].budget, members[-1].budget)
    assert compared_budgets([replace(m, budget=None) for m in members]) == []
    assert compared_budgets(members[:1]) == [members[0].budget]
    worse = replace(members[-1], sealed=replace(members[-1].sealed, fitness=-99.0))
    assert len(front_notes(members[:-1])) + 1 == len(front_notes([*members[:-1], worse]))
    front_plot(tmp_path / "front.png", members, [], "a front")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


# ---- refused ------------------------------------------------------------------------------------------------------


def test_budgets_and_a_memory_that_cannot_vary(tmp_path, caplog):
    with pytest.raises(ConfigError, match=r"leave budgets out.*feature_scorer_pareto"):
        search(configured("budgets=[32]"), tmp_path / "run", factory(Curve()))
    stages = [{"generations": 1}, {"name": "second", "generations": 1, "budgets": [16]}]
    with pytest.raises(ConfigError, match=r"second.*leave budgets out"):
        search(configured(stages=stages), tmp_path / "run", factory(Curve()))
    assert not (tmp_path / "run").exists()
    space = {"manager": {"name": "toy", "options": {"budget": 64}}}
    config = experiment(*SMALL, "driver={name: nsga2, population: 4}", "budgets=null", space=space)
    search(config, tmp_path / "run", factory(Curve()))
    assert "there is no front to find" in caplog.text
    assert len(read_front(tmp_path / "run")) == 1


def test_another_search_begins_at_a_member_and_not_in_the_middle_of_a_front(found, tmp_path):
    options = f"driver={{name: cmaes, population: 6, options: {{warm_start: {found}}}}}"
    with pytest.raises(RunError, match="member of its front"):
        search(configured(*SMALL, options), tmp_path / "warm", factory(Curve()))
    start = f"space.start={{plugin: {plugin_folder(found, 0)}}}"
    search(configured(*SMALL, "driver={name: cmaes, population: 6}", start), tmp_path / "run", factory(Curve()))
    assert np.allclose(
        to_vector(plugins.load(plugin_folder(found, 0))), to_vector(open_run(tmp_path / "run").space.template)
    )


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 100))
def test_the_same_seed_gives_the_same_front(seed):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        config = configured("generations=2", "driver.population=6", f"seed={seed}", "select.contexts=2")
        fronts = []
        for name in ("a", "b"):
            torch.manual_seed(len(fronts))
            search(config, Path(folder) / name, factory(Curve()))
            fronts.append(json.loads((Path(folder) / name / "front.json").read_text()))
        assert fronts[0] == fronts[1]
