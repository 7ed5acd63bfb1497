"""Runs: what they read from outside their folder is known by content, and a change is never taken in silence."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from evomem import tasks
from evomem.cli.commands.export import export
from evomem.errors import ConfigError, RunError
from evomem.evaluation.measurement import Evaluation
from evomem.evaluation.results import SampleFile
from evomem.models.identity import tokenizer_digest
from evomem.report.conditions import Conditions, make_scenarios
from evomem.report.subjects import resolve, searched_tasks
from evomem.runs import Bench, inputs, open_run, search
from evomem.runs.experiment_file import load_experiment
from evomem.runs.folder import RunFolder
from evomem.runs.inputs import changed_tasks, inputs_of
from evomem.testing.models import tiny_tokenizer
from tests.support.interrupted_search import SMALL, Interrupted, Stop, outcome, same
from tests.support.synthetic_search import ToyEvaluator, ToyTask, experiment, factory
from tests.support.toy_tokenizer import ToyTokenizer

ROW = {"context": "Ann has a red cup.", "question": "What colour is it?", "answers": ["red"]}


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    return path


def of_file(path, *settings):
    return experiment(*SMALL, *settings, tasks=[f"file:{path}", "toy:b"])


def begun(folder, config, after=40):
    with pytest.raises(Stop):
        search(config, folder, factory(Interrupted(after)))
    return yaml.safe_load((folder / "config.yaml").read_text())["inputs"]


def test_every_kind_of_input_has_a_digest(tmp_path, questions):
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "manifest.json").write_text("{}")
    (tmp_path / "plug").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "plug" / name).write_text("x")
    essay = tmp_path / "essay.txt"
    essay.write_text("Prose.")
    config = experiment(
        tasks=[f"file:{questions}", {"spec": "single_2", "options": {"essay": str(essay)}}],
        stages=[{"generations": 1}, {"generations": 1, "tasks": [f"book:essay={essay}"]}],
        traces=[str(tmp_path / "traces")],
        space={"manager": {"name": "toy"}, "start": {"plugin": str(tmp_path / "plug")}},
    )
    names = {
        f"task file {questions}", f"task single_2 {essay}", f"task book {essay}", f"traces {tmp_path}/traces",
        f"start plug-in {tmp_path}/plug",
    }  # fmt: skip
    first = inputs_of(config)
    assert first.keys() == names
    for path in (questions, essay, tmp_path / "traces" / "manifest.json", tmp_path / "plug" / "model.safetensors"):
        before = inputs_of(config)
        path.write_text(path.read_text() + " ")
        assert before != inputs_of(config)
    (tmp_path / "plug" / "README.md").write_text("a card may be made anew")
    assert sum(first[name] != digest for name, digest in inputs_of(config).items()) == len(names)


def test_a_package_of_others_has_version_and_code(tmp_path, monkeypatch):
    module = tmp_path / "other_people.py"
    module.write_text("one = 1\n")
    monkeypatch.setitem(__import__("sys").modules, "other_people", SimpleNamespace(__file__=str(module)))
    kind = type("Theirs", (ToyTask,), {"__module__": "other_people"})
    monkeypatch.setattr(inputs, "_distributions", lambda: {"other_people": ["other-people"]})
    monkeypatch.setattr(inputs, "version", lambda name: "1.2")
    monkeypatch.setitem(tasks.tasks._classes, "theirs", kind)
    known = {"inputs": inputs_of(experiment(tasks=["theirs"]))}
    assert [(name, text.split()[0]) for name, text in known["inputs"].items()] == [
        ("task theirs of package other-people", "1.2")
    ]
    assert not changed_tasks(known)
    module.write_text("one = 2\n")
    assert "other-people" in changed_tasks(known)[0]


def test_a_changed_question_file_is_refused_by_name_and_put_back_goes_on(tmp_path, questions):
    search(of_file(questions), tmp_path / "whole", factory(ToyEvaluator()))
    digests = begun(tmp_path / "run", of_file(questions))
    text = questions.read_text()
    questions.write_text(text.replace("red", "blue"))
    now = inputs_of(of_file(questions))
    with pytest.raises(RunError, match="is not what it was") as refused:
        search(of_file(questions), tmp_path / "run", factory(ToyEvaluator()), resume=True)
    for part in (str(questions), *digests.values(), *now.values()):
        assert part in str(refused.value)
    questions.unlink()
    with pytest.raises(RunError, match="is not there"):
        search(of_file(questions), tmp_path / "run", factory(ToyEvaluator()), resume=True)
    questions.write_text(text)
    search(of_file(questions), tmp_path / "run", factory(ToyEvaluator()), resume=True)
    same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))
    plugin = open_run(tmp_path / "run").plugin
    assert json.loads((plugin / "provenance.json").read_text())["inputs"] == digests
    assert not digests.keys() ^ inputs_of(of_file(questions)).keys()


def test_a_run_without_digests_says_so_once_and_has_them_from_then_on(tmp_path, questions, caplog):
    folder = tmp_path / "run"
    begun(folder, of_file(questions))
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    del stored["inputs"]
    (folder / "config.yaml").write_text(yaml.safe_dump(stored))
    (folder / "journal.jsonl").write_text(
        "".join(line for line in (folder / "journal.jsonl").read_text().splitlines(True) if "identity" not in line)
    )
    for path in (folder / "checkpoints").iterdir():
        path.unlink()
    for _ in range(2):
        with pytest.raises(Stop):
            search(of_file(questions), folder, factory(Interrupted(5)), resume=True)
    assert caplog.text.count("kept no digests of its inputs") == 1
    questions.write_text(questions.read_text() * 2)
    with pytest.raises(RunError, match="is not what it was"):
        search(of_file(questions), folder, factory(ToyEvaluator()), resume=True)


def test_a_resolved_configuration_is_refused_where_its_files_are_others(tmp_path, questions):
    begun(tmp_path / "run", of_file(questions))
    again = load_experiment(tmp_path / "run" / "config.yaml")
    assert again.inputs
    questions.write_text("{}\n")
    with pytest.raises(ConfigError, match=r"(?s)inputs.*questions\.jsonl"):
        search(again, tmp_path / "other", factory(ToyEvaluator()))


def test_samples_that_changed_without_a_file_are_refused_too(tmp_path):
    """Whatever made them: a package, a tokenizer, a file that no option names."""

    class Other(ToyTask):
        def samples(self, split, n, seed):
            return [replace(sample, answer=" b") for sample in super().samples(split, n, seed)]

    begun(tmp_path / "run", experiment(*SMALL))
    bench = Bench(ToyEvaluator(), lambda task: Other(task.spec), provenance={"model_digest": "none"})
    with pytest.raises(RunError, match=r"sample toy:./train/0/\d is another one"):
        search(experiment(*SMALL), tmp_path / "run", lambda config: bench, resume=True)


@pytest.mark.parametrize("which", ["questions", "start"])
def test_a_file_that_is_exchanged_while_the_search_begins_is_refused(tmp_path, questions, which):
    """After its digest was taken, and before it is read; put back, the run goes on as if nothing had been."""
    start = tmp_path / "start.npy"
    np.save(start, np.zeros(6))
    config = of_file(questions, "space.start={vector: " + str(start) + "}")
    search(config, tmp_path / "whole", factory(ToyEvaluator()))
    path = questions if which == "questions" else start
    before = path.read_bytes()

    def exchanging(config):
        if which == "questions":
            path.write_bytes(before.replace(b"red", b"blue"))
        else:
            np.save(path, np.ones(6))
        return factory(ToyEvaluator())(config)

    with pytest.raises(RunError, match=rf"(?s)while the search was beginning.*{path.name}"):
        search(config, tmp_path / "run", exchanging)
    assert '"kind":"unit"' not in (tmp_path / "run" / "journal.jsonl").read_text()
    assert not (tmp_path / "run" / "start" / "vector.npy").exists()
    path.write_bytes(before)
    search(config, tmp_path / "run", factory(ToyEvaluator()), resume=True)
    same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))


def test_a_finished_run_notices_when_it_is_used_again(tmp_path, questions, capsys):
    search(of_file(questions), tmp_path / "run", factory(ToyEvaluator()))
    open_run(tmp_path / "run")
    subject = resolve(str(tmp_path / "run"))
    assert [task.spec for task in searched_tasks([subject])] == [f"file:{questions}", "toy:b"]
    questions.write_text("{}\n")
    conditions = Conditions(exact=False, dtype="float32")
    for source in (tmp_path / "run", tmp_path / "run" / "winner" / "plugin"):
        with pytest.raises(RunError, match=r"questions\.jsonl.*\n.*--task"):
            make_scenarios(conditions, [resolve(str(source))])
    search(of_file(questions), tmp_path / "run", factory(ToyEvaluator()), resume=True)  # its result is what it was
    capsys.readouterr()
    export(str(tmp_path / "run"), tmp_path / "mine")
    assert "since the search: task file" in capsys.readouterr().out


# ---- comparisons ------------------------------------------------------------------------------------------------


def evaluation(name):
    return Evaluation(name, {"loglik": -0.125}, 4.0, 8.0, 8.0, 10, 0.5)


def test_a_comparison_of_samples_with_odd_ids_goes_on(tmp_path):
    """U+2028, U+0085 and others end a line for some, but not in this file."""
    names = ["a\u2028b", "c\u0085d", "e\x0bf\x0c\x1c", "\u2029", 'g\\n"h']
    what = {"managers": ["one"], "samples": "x"}
    with SampleFile(tmp_path / "p.jsonl", what) as file:
        for name in names:
            file.append(0, name, [evaluation(name)])
    with SampleFile(tmp_path / "p.jsonl", what) as file:
        assert [file.get(0, name) for name in names] == [[evaluation(name)] for name in names]


def test_a_comparison_of_other_samples_is_refused_and_a_changed_line_is_measured_again(tmp_path, caplog):
    path, what = tmp_path / "p.jsonl", {"managers": ["one"], "samples": "x"}
    with SampleFile(path, what) as file:
        for name in "abc":
            file.append(0, name, [evaluation(name)])
    with pytest.raises(ConfigError, match="its samples"), SampleFile(path, {**what, "samples": "y"}):
        pass
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[2].replace("-0.125", "-0.124"), *lines[3:]]))
    with SampleFile(path, what) as file:
        assert [file.get(0, name) is None for name in "abc"] == [False, True, False]
    assert "line 3 is damaged" in caplog.text


def test_a_budget_named_twice_is_one(tmp_path):
    once, twice = experiment(*SMALL, budgets=[32, 64]), experiment(*SMALL, budgets=[32, 64, 32, 64])
    assert once == twice
    assert experiment(*SMALL, budgets=[1, 1.0, 1]).budgets == [1, 1.0]
    assert [type(budget) for budget in experiment(*SMALL, budgets=[1, 1.0, 1]).budgets] == [int, float]
    evaluator = ToyEvaluator()
    search(experiment(*SMALL, budgets=[16, 16], tasks=["toy:a"]), tmp_path / "run", factory(evaluator))
    assert np.isfinite(open_run(tmp_path / "run").result.sealed.fitness)
    assert len([call for call in evaluator.calls if "/sealed/" in call[0]]) == 2  # samples


def test_a_tokenizer_that_has_changed_is_another_model(tmp_path):
    tokenizer = tiny_tokenizer()
    digest = tokenizer_digest(tokenizer)
    tokenizer(["the", "the cat"], padding=True, truncation=True, max_length=9)
    assert tokenizer_digest(tokenizer) == digest
    assert tokenizer_digest(tiny_tokenizer(around="<s> $A")) != digest
    assert tokenizer_digest(ToyTokenizer()) == tokenizer_digest(ToyTokenizer())


@pytest.mark.parametrize("nested", [False, True])
def test_a_run_of_before_knows_no_tokenizer_and_one_of_today_keeps_to_it(tmp_path, nested):
    folder = SimpleNamespace(path=tmp_path)

    def told(**more):
        one = {"model": "m", "model_digest": "d", **more}
        return {**one, "model_digests": [one, one]} if nested else one

    path = tmp_path / "start" / "provenance.json"
    path.parent.mkdir()
    path.write_text(json.dumps(told()))
    RunFolder.check_provenance(folder, told(tokenizer_digest="t", dtype="float32"))
    path.write_text(json.dumps(told(tokenizer_digest="t")))
    RunFolder.check_provenance(folder, told(tokenizer_digest="t"))
    with pytest.raises(RunError, match=r"another model or tokenizer:\n.*tokenizer_digest: 't' -> 'u'"):
        RunFolder.check_provenance(folder, told(tokenizer_digest="u"))
