"""A run knows where its files are, wherever it is resumed; and a search on a file of two rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evomem.errors import RunError, TaskError
from evomem.evaluation import Evaluator
from evomem.models import LoadedModel
from evomem.runs import open_run, search
from evomem.runs.bench import Bench, calibrate_manager
from evomem.runs.config import ExperimentConfig
from evomem.runs.experiment_file import parse_experiment
from evomem.runs.paths import resolve_paths
from evomem.search_space.start import Start
from evomem.tasks import build
from evomem.testing.models import tiny, tiny_tokenizer

CONTEXT = "the magic number for cat is 1 2 3 . the sky is blue . the grass is green . here we go ."
LOADED = LoadedModel("tiny", tiny("llama", layers=2), tiny_tokenizer(), "tiny")


def experiment(*settings: str, tasks: list | None = None) -> ExperimentConfig:
    values = {
        "name": "own", "model": "tiny", "space": "feature_scorer", "tasks": tasks or ["file:data/own.jsonl"],
        "driver": {"name": "random_search", "population": 2}, "generations": 2, "budgets": [8], "train_contexts": 100,
        "sealed": {"contexts": 50, "exact": False}, "select": {"contexts": 20, "top": 1}, "chance_contexts": 0,
    }  # fmt: skip
    return parse_experiment(values, settings)


def bench(stop: int | None = None):
    """Return the factory of a bench that is interrupted at its n-th evaluation."""
    count = 0

    class Interrupted(Evaluator):
        def evaluate(self, *arguments, **more):
            nonlocal count
            count += 1
            if count == stop:
                raise KeyboardInterrupt
            return super().evaluate(*arguments, **more)

    def make(config: ExperimentConfig) -> Bench:
        evaluator = Interrupted(LOADED, config.protocol)
        return Bench(
            evaluator,
            lambda task: build(task.spec, LOADED.tokenizer, task.length, **task.options),
            lambda manager, chosen: calibrate_manager(manager, [(evaluator, samples) for _, samples in chosen]),
            {"model_digest": "tiny"},
        )

    return make


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a file of two rows."""
    (tmp_path / "data").mkdir()
    rows = [{"context": CONTEXT + f" {n} .", "question": "what ?", "answers": ["1 2 3"], "id": n} for n in range(2)]
    (tmp_path / "data" / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_search_on_two_rows_that_is_resumed_from_elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = search(experiment(), folder / "whole", bench())
    with pytest.raises(KeyboardInterrupt):
        search(experiment(), folder / "cut", bench(stop=4))
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    with pytest.raises(RunError, match="another configuration"):
        search(experiment(tasks=["file:other.jsonl"]), folder / "cut", bench(), resume=True)
    resumed = search(experiment(), folder / "cut", bench(), resume=True)
    assert resumed.vector.tolist() == whole.vector.tolist()
    assert repr(resumed.sealed) == repr(whole.sealed)  # of one sample there is no error: NaN
    assert not any("nan" in line for line in whole.lines())
    for name in ("whole", "cut"):
        run = open_run(folder / name)
        assert run.config.tasks[0].spec == f"file:{folder}/data/own.jsonl"
        provenance = json.loads((run.plugin / "provenance.json").read_text())
        assert "2 rows: one trains and selects, the other is sealed" in provenance["remarks"]
        assert any("1 of 100 samples: the train split has no more" in remark for remark in provenance["remarks"])
    # A run of an earlier evomem, with the path as it was given, goes on where it was made.
    stored = folder / "cut" / "config.yaml"
    stored.write_text(stored.read_text().replace(f"file:{folder}/", "file:").replace(f"base: {folder}", "base: null"))
    monkeypatch.chdir(folder)
    again = search(experiment(), folder / "cut", bench(), resume=True)
    assert repr(again.sealed) == repr(whole.sealed)


def test_one_row_is_no_search(folder: Path) -> None:
    own = folder / "data" / "own.jsonl"
    own.write_text(own.read_text().splitlines()[0])
    with pytest.raises(TaskError, match="at least two different rows"):
        search(experiment(), folder / "run", bench())


def test_every_path_of_an_experiment(folder: Path) -> None:
    (folder / "start").mkdir()
    stage = {"generations": 1, "tasks": ["book:essay=b.txt,length=9", "passkey"]}
    tasks = [
        "file:a=b,c.jsonl,length=50", "file:path=data/own.jsonl", {"spec": "file", "options": {"path": "../x.jsonl"}},
        "single_2:essay=~/e.txt", {"spec": "multikey_1:length=9", "options": {"essay": "e.txt"}}, "mqar", "none:a=b",
        'file("a (1), b.jsonl", length=50)',
    ]  # fmt: skip
    config = experiment(tasks=tasks).model_copy(update={"traces": ["t", "/abs/t"]})
    config = config.model_copy(update={"stages": parse_stages(stage)})
    found = resolve_paths(config)
    assert [task.spec for task in found.tasks] == [
        f"file:{folder}/a=b,c.jsonl,length=50", f"file:{folder}/data/own.jsonl", "file",
        f"single_2:essay={Path.home()}/e.txt", "multikey_1:length=9", "mqar", "none:a=b",
        f'file(path="{folder}/a (1), b.jsonl", length=50)',
    ]  # fmt: skip
    assert found.tasks[2].options == {"path": f"{folder.parent}/x.jsonl"}
    assert found.tasks[4].options == {"essay": f"{folder}/e.txt"}
    assert [task.spec for task in found.stages[0].tasks] == [f"book:essay={folder}/b.txt,length=9", "passkey"]
    assert found.traces == [f"{folder}/t", "/abs/t"]
    assert found.base == str(folder)
    assert resolve_paths(found, "/elsewhere").model_dump() == found.model_dump()
    plain = experiment(tasks=["passkey"])
    assert resolve_paths(plain) is plain
    for name, expected in (("start", f"{folder}/start"), ("owner/name", "owner/name")):
        started = plain.space.model_copy(update={"start": Start(plugin=name)})
        there = resolve_paths(plain.model_copy(update={"space": started})).space.start
        assert there.plugin == expected


def parse_stages(stage: dict):
    return experiment(tasks=["passkey"]).model_validate({**experiment().model_dump(), "stages": [stage]}).stages
