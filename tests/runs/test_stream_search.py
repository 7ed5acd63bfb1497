"""Runs: a search on a memory that reads streams, interrupted and gone on with; its winner, plug-in and comparison."""

from __future__ import annotations

import time

import pytest
import torch
import yaml
from typer.testing import CliRunner

import evomem
from evomem.cli.app import app
from evomem.errors import ConfigError
from evomem.evaluation import EXACT
from evomem.evaluation.measurement import EvaluationProtocol
from evomem.evaluation.streams import StreamEvaluator, evaluator_of
from evomem.models.architectures.pair_memory import pair_memory_tokenizer
from evomem.report.tables import read_rows
from evomem.report.transfer import TransferRow
from evomem.runs import open_run, parse_experiment, search
from evomem.runs.bench import model_bench
from evomem.tasks import build as build_task
from tests.runs.test_block_search import lines
from tests.support.interrupted_search import Stop, outcome, same
from tests.support.processes import forkserver
from tests.support.stream_search import CONFIG, POLICY, run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams") / "run"
    search(parse_experiment(CONFIG), folder, model_bench)
    return folder


def test_an_interrupted_search_ends_the_same(tmp_path, whole, monkeypatch):
    evaluate, units = StreamEvaluator.evaluate, []

    def stopping(self, *arguments, **options):
        units.append(1)
        if len(units) == 4:
            raise Stop
        return evaluate(self, *arguments, **options)

    monkeypatch.setattr(StreamEvaluator, "evaluate", stopping)
    folder = tmp_path / "run"
    with pytest.raises(Stop):
        search(parse_experiment(CONFIG), folder, model_bench)
    monkeypatch.undo()
    search(parse_experiment(CONFIG), folder, model_bench, resume=True)
    same(outcome(folder), outcome(whole))


def test_a_search_that_is_killed_ends_the_same(tmp_path, whole):
    processes, folder, total = forkserver(), tmp_path / "run", lines(whole)
    process = processes.Process(target=run, args=(folder, 0.05))
    process.start()
    deadline = time.monotonic() + 120
    while process.is_alive() and lines(folder) < total // 2 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -9
    assert total // 2 <= lines(folder) < total
    search(parse_experiment(CONFIG), folder, model_bench, resume=True)
    same(outcome(folder), outcome(whole))


def test_a_policy_gradient_moves_by_what_is_read(tmp_path):
    search(parse_experiment(POLICY), tmp_path / "run", model_bench)
    found = open_run(tmp_path / "run")
    units = [record for record in found.records() if record["kind"] == "unit" and record["phase"] == "train"]
    steps = [step for unit in units for one in unit["evaluations"] for step in one["steps"]]
    assert {0.0, 1.0} <= {step["reward"] for step in steps} <= {0.0, 0.5, 1.0}
    assert found.winner.weights.tolist() != [[[-2.0, 0.0]]]
    first = found.generations()[0]
    evaluations = [unit["evaluations"] for unit in units if unit["generation"] == 0]
    for place, fitness in enumerate(first.fitness):
        rewards = [[step["reward"] for step in one[place]["steps"]] for one in evaluations]
        worth = [one[place]["exact"] + 5 * sum(row) / len(row) for one, row in zip(evaluations, rewards, strict=True)]
        assert fitness == pytest.approx(sum(worth) / len(worth))
    wrong = parse_experiment({**POLICY, "fitness": {"objective": "exact", "discount": 0.8}})
    with pytest.raises(ConfigError, match=r"fitness.discount is of what is read"):
        search(wrong, tmp_path / "wrong", model_bench)


def test_an_exported_plugin_hits_as_often_where_it_is_loaded_and_is_measured_on_other_streams(tmp_path, whole):
    """Export, load, and the same hits; then `transfer`, from streams to streams of other kinds."""
    folder, table = tmp_path / "plugin", tmp_path / "transfer.json"
    assert CliRunner().invoke(app, ["export", str(whole), str(folder)]).exit_code == 0
    loaded, winner = evomem.load(folder), open_run(whole).winner
    task = build_task("zipf:length=50,keys=24,dim=8,topics=4", pair_memory_tokenizer())
    sample = task.samples("sealed", 1, 0)[0]
    evaluator = evaluator_of(evomem.load_model("pair-memory"), EvaluationProtocol(kind="streaming", every=2))
    mine, theirs = evaluator.evaluate([loaded, winner], sample, task, EXACT)
    assert (mine.values, mine.bytes_mean) == (theirs.values, theirs.bytes_mean)
    assert 0 < mine.exact < 1
    arguments = [
        "transfer", str(folder), "--models", "pair-memory", "--tasks", "key_overwrites:length=40,keys=12,dim=8",
        "--budgets", "4,6", "--samples", "2", "--against", "lru,fifo", "--protocol", "streaming:2",
        "--exact", "--json", str(table),
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    rows = read_rows(table, TransferRow)
    mine = [row for row in rows if row.role == "subject"]
    assert [(row.train_model, row.budget, row.protocol) for row in mine] == [
        ("pair-memory", budget, "streaming:2/query_agnostic") for budget in (4, 6)
    ]
    assert all(0 <= row.score <= 1 for row in rows)


def test_a_winner_is_a_plugin_that_is_compared_like_any_other(tmp_path, whole):
    winner = open_run(whole).winner
    winner.save_pretrained(tmp_path / "plugin")
    rows = evomem.compare([str(whole), str(tmp_path / "plugin")], against=["lru"], budgets=[6], samples=2, check=False)
    by_name = {row.manager: row for row in rows}
    assert len(by_name) == 4
    assert {row.model for row in rows} == {"pair-memory"}
    assert {row.protocol for row in rows} == {"streaming:2/query_agnostic"}
    of_run, of_plugin = (row for row in rows if row.role == "subject")
    assert (of_run.score, of_run.loglik) == (of_plugin.score, of_plugin.loglik)
    assert by_name["full"].score >= max(row.score for row in rows)


def test_streams_choose_their_model_and_protocol():
    rows = evomem.compare(
        "random", against=[], tasks="zipf:length=30,keys=20,dim=4", budgets=[4], samples=2, check=False
    )
    assert [(row.model, row.protocol) for row in rows] == [("pair-memory", "streaming:1/query_agnostic")]
    assert torch.tensor(rows[0].score).isfinite()


def test_what_to_do_next_fits_the_memory(tmp_path):
    file = tmp_path / "streams.yaml"
    file.write_text(yaml.safe_dump({**CONFIG, "generations": 1, "against": ["lru"]}))
    result = CliRunner().invoke(app, ["evolve", str(file), "--out", str(tmp_path / "run")])
    assert result.exit_code == 0
    assert "evomem compare" in result.output
    assert "generate" not in result.output  # a stream has no text to go on with
