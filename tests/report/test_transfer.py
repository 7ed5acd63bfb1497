"""Managers moved to other models: the matrix against plain comparisons, on tiny models in folders."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from evomem import plugins
from evomem.cli.commands import transfer as command
from evomem.cli.commands.compare import parse_budgets
from evomem.errors import ConfigError, TaskError
from evomem.evaluation import Evaluator
from evomem.managers import build
from evomem.models import load
from evomem.report import evolving
from evomem.report.conditions import Conditions
from evomem.report.tables import read_rows
from evomem.report.transfer import TransferRow, cells, summary, transfer_markdown
from evomem.statistics import paired_bootstrap
from evomem.tasks import Split
from evomem.tasks import build as build_task
from tests.workers.test_several_models import folders  # noqa: F401

BUDGETS, SAMPLES = (6, 0.5), 6
FIELD = ("keydiff", "knorm", "fifo", "streaming_llm")


def conditions(folders, *families, budgets="6,0.5", **changes):  # noqa: F811
    given = {
        "models": [",".join(str(folders / family) for family in families)],
        "tasks": [f"file:{folders / 'questions.jsonl'}"],
        "budgets": parse_budgets(budgets), "samples": SAMPLES, "exact": False, "dtype": "float32",
    }  # fmt: skip
    return Conditions(**{**given, **changes})


@pytest.fixture(scope="module")
def travellers(tmp_path_factory):
    """A scorer found on the one family, and a NAMM found on both; random weights."""
    root = tmp_path_factory.mktemp("plugins")
    generator = torch.Generator().manual_seed(1)
    for name, spec, models in (
        ("scorer", "feature_scorer(budget=6)", ["llama"]),
        ("bam", "namm(budget=6)", ["a", "b"]),
    ):
        manager = build(spec)
        for tensor in manager.parameters():
            tensor.data.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
        if name == "bam":
            manager.get_parameter("scorer.score_bias").data.fill_(1e3)  # its budget decides alone
        plugins.save(manager, root / name, {"experiment": name, "models": [{"name": model} for model in models]})
    return [str(root / "scorer"), str(root / "bam")]


def moved(
    travellers, measured_on, output, *, recalibrate=False, against="keydiff,knorm,fifo,streaming_llm", check=False
):
    command.transfer(
        travellers, against, measured_on, None if output is None else str(output), recalibrate=recalibrate, check=check
    )
    return None if output is None else read_rows(output, TransferRow)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory, travellers, folders):  # noqa: F811
    path = tmp_path_factory.mktemp("matrix") / "transfer.json"
    return path, moved(travellers, conditions(folders, "llama", "gpt_neox"), path, recalibrate=True)


def test_every_cell_is_what_the_plain_way_measures(matrix, travellers, folders):  # noqa: F811
    found = {(c.row.subject, c.row.model, c.row.budget): c for c in cells(matrix[1])}
    names = {"scorer", "bam", "bam (recalibrated)"}
    assert set(found) == {
        (name, str(folders / family), budget)
        for name in names
        for family in ("llama", "gpt_neox")
        for budget in BUDGETS
    }
    for family in ("llama", "gpt_neox"):
        loaded = load(str(folders / family))
        task = build_task(f"file:{folders / 'questions.jsonl'}", loaded.tokenizer)
        samples, evaluator = task.samples(Split.SEALED, SAMPLES, 0), Evaluator(loaded)

        def plain(manager, evaluator=evaluator, task=task, samples=samples):
            found = [evaluator.evaluate_plainly(manager, sample, task) for sample in samples]
            return [one.loglik for one in found], np.mean([one.bytes_mean for one in found])

        full, _ = plain(build("full"))
        for budget in BUDGETS:
            cell = found["scorer", str(folders / family), budget]
            mine, held = plain(plugins.load(travellers[0]).with_options(budget=budget))
            field = {spec: plain(build(f"{spec}(budget={budget})"))[0] for spec in FIELD}
            best = max(field, key=lambda spec: np.mean(field[spec]))
            assert cell.row.loglik == pytest.approx(np.mean(mine), abs=1e-4)
            assert cell.full.loglik == pytest.approx(np.mean(full), abs=1e-4)
            assert cell.best.manager == best
            interval = paired_bootstrap(mine, field[best])
            assert cell.best.difference == pytest.approx(interval.mean, abs=1e-4)
            assert cell.best.interval == pytest.approx([interval.low, interval.high], abs=1e-3)
            assert cell.best.bytes_mean == pytest.approx(cell.row.bytes_mean, rel=0.02)
            assert cell.verdict == ("wins" if interval.low > 0 else "loses" if interval.high < 0 else "ties")
            trivial = max(FIELD[2:], key=lambda spec: np.mean(field[spec]))
            interval = paired_bootstrap(mine, field[trivial])
            assert (cell.trivial.manager, cell.row.floor) == (trivial, trivial)
            assert cell.trivial.difference == pytest.approx(interval.mean, abs=1e-4)
            assert cell.trivial.interval == pytest.approx([interval.low, interval.high], abs=1e-3)
            lost = np.mean(full) - np.mean(field[trivial])
            share = None if lost <= 0 else pytest.approx((np.mean(mine) - np.mean(field[trivial])) / lost, abs=1e-2)
            assert cell.row.recovered == share
            assert cell.row.tokens_per_second > 0
            assert cell.full.tokens_per_second > 0
            assert cell.row.bytes_mean == pytest.approx(held)


def test_every_subject_says_where_it_was_found(matrix):
    path, rows = matrix
    assert {(row.subject, row.train_model) for row in rows} == {
        ("scorer", "llama"), ("bam", "a + b"), ("bam (recalibrated)", "a + b")
    }  # fmt: skip
    assert {row.manager for row in rows if row.role == "subject"} == {row.subject for row in rows}
    # A reader of comparisons reads the same file.
    assert [row.loglik for row in read_rows(path)] == [row.loglik for row in rows]
    assert {"train_model", "interval", "bytes_mean"} <= set(json.loads(path.read_text())[0])
    assert path.with_suffix(".png").stat().st_size > 10_000
    text = path.with_suffix(".md").read_text()
    assert text.startswith("| budget | manager | found on | test model")
    assert text.count("\n| 6 | ") == 6
    assert text == transfer_markdown(cells(rows))
    assert len(summary(cells(rows))) == 6
    assert all("against the best heuristic there; " in line for line in summary(cells(rows)))
    assert all(line.endswith("against the best trivial manager") for line in summary(cells(rows)))
    assert [item.name for item in path.parent.iterdir() if "partial" in item.name] == []


def test_statistics_are_collected_anew_on_each_model(travellers, folders):  # noqa: F811
    bam = plugins.load(travellers[1])
    made = []
    for family in ("llama", "gpt_neox"):
        loaded = load(str(folders / family))
        tasks = [command.TaskConfig(spec=f"file:{folders / 'questions.jsonl'}")]
        place = evolving.scenarios_of(loaded, tasks, command.EvaluationProtocol())[0]
        made.append(command._recalibrated(bam, place))
        assert command._recalibrated(plugins.load(travellers[0]), place) is None
    assert not torch.equal(made[0].spectrum_mean, made[1].spectrum_mean)
    assert torch.equal(bam.spectrum_mean, torch.zeros(17))
    assert all(torch.equal(a, b) for m in made for a, b in zip(m.parameters(), bam.parameters(), strict=True))


def test_a_killed_matrix_goes_on(tmp_path, travellers, folders, monkeypatch):  # noqa: F811
    path, measured_on = tmp_path / "transfer.json", conditions(folders, "llama", "gpt_neox")
    plain, calls = Evaluator.on_samples, []

    def dying(self, managers, samples, *arguments, **options):
        calls.extend((self.loaded.name, sample.id) for sample in samples)
        if len(calls) == limit:
            raise KeyboardInterrupt
        return plain(self, managers, samples, *arguments, **options)

    monkeypatch.setattr(Evaluator, "on_samples", dying)
    limit = 15
    with pytest.raises(KeyboardInterrupt):
        moved(travellers[:1], measured_on, path, against="random")
    assert not path.exists()
    before, limit = set(calls[:-1]), -1
    calls.clear()
    rows = moved(travellers[:1], measured_on, path, against="random")
    assert len(before & set(calls)) <= 1  # only the sample that was being measured
    other = moved(travellers[:1], measured_on, tmp_path / "whole.json", against="random")
    assert [row.loglik for row in rows] == [row.loglik for row in other]


def test_a_task_may_be_for_one_model_and_what_cannot_be_done_is_said(tmp_path, travellers, folders):  # noqa: F811
    task = f"file:{folders / 'questions.jsonl'}"
    llama, neox = str(folders / "llama"), str(folders / "gpt_neox")
    rows = moved(
        travellers[:1], conditions(folders, "llama", "gpt_neox", tasks=[f"{llama}={task}"]), tmp_path / "one.json"
    )
    assert {row.model for row in rows} == {llama}
    # Random models cannot do anything: with the check, nothing remains.
    with pytest.raises(TaskError, match=r"nothing was measured.*questions"):
        moved(travellers[:1], conditions(folders, "llama"), tmp_path / "none.json", check=True)
    for changes, message in (
        ({"models": []}, "--models: say which"),
        ({"tasks": [f"other={task}"]}, "'other' is not among"),
        ({"budgets": "many"}, "'many' is no number"),
    ):
        with pytest.raises(ConfigError, match=message):
            moved(travellers[:1], conditions(folders, "llama", **changes), None)
    with pytest.raises(ConfigError, match="--tasks: say what"):
        moved(travellers[:1], conditions(folders, "llama", tasks=[]), None)
    assert neox not in (tmp_path / "one.md").read_text()
