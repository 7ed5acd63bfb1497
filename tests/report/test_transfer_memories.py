"""A manager moved between kinds of memory: pairs and a KV cache in one matrix, each under a protocol of its own."""

from __future__ import annotations

import pytest
import torch

from evomem import plugins
from evomem.cli.commands import transfer as command
from evomem.errors import ConfigError
from evomem.evaluation import Evaluator
from evomem.evaluation.measurement import EvaluationProtocol
from evomem.evaluation.streams import evaluator_of
from evomem.managers import build
from evomem.models import load
from evomem.report.conditions import Conditions
from evomem.report.tables import read_rows
from evomem.report.transfer import TransferRow, cells, transfer_markdown, transfer_tables
from evomem.tasks import Split
from evomem.tasks import build as build_task
from tests.workers.test_several_models import folders  # noqa: F401

STREAM, SAMPLES, BUDGET = "zipf:length=60,keys=20,dim=8", 4, 6
SHARED = (
    "feature_scorer(features=['recency', 'frequency', 'relevance:4', 'novelty', 'age'], knots=1, sinks=0, recent=1)"
)
SURPRISED = "feature_scorer(features=['surprise', 'age'], knots=1, sinks=0, recent=1)"


@pytest.fixture(scope="module")
def moved(tmp_path_factory, folders):  # noqa: F811
    """Two scorers, one of which observes what a KV cache has not, on pairs and on a small llama."""
    root, draw = tmp_path_factory.mktemp("memories"), torch.Generator().manual_seed(0)
    for name, spec in (("shared", SHARED), ("surprised", SURPRISED)):
        manager = build(spec, budget=BUDGET)
        manager.weights.data.copy_(torch.randn(manager.weights.shape, generator=draw))
        plugins.save(manager, root / name, {"experiment": name, "models": [{"name": "pair-memory"}]})
    llama = str(folders / "llama")
    command.transfer(
        [str(root / "shared"), str(root / "surprised")],
        "lru,knorm,random,expected_attention",
        Conditions(
            models=[f"pair-memory,{llama}"],
            tasks=[f"pair-memory={STREAM}", f"{llama}=file:{folders / 'questions.jsonl'}"],
            budgets=[BUDGET], samples=SAMPLES, exact=False, dtype="float32",
        ),
        str(root / "cells.json"), recalibrate=False, check=False,
        protocols=["compress_once", "pair-memory=streaming:2"],
    )  # fmt: skip
    return root, llama, read_rows(root / "cells.json", TransferRow)


def test_the_same_numbers_decide_on_each_memory_under_its_protocol(moved, folders):  # noqa: F811
    root, llama, rows = moved
    known = {(cell.row.subject, cell.row.model): cell for cell in cells(rows)}
    assert {cell.row.model: cell.row.protocol for cell in known.values()} == {
        "pair-memory": "streaming:2/query_agnostic", llama: "compress_once/query_agnostic"
    }  # fmt: skip
    manager = plugins.load(root / "shared")
    for model, spec, evaluator in (
        (load("pair-memory"), STREAM, lambda one: evaluator_of(one, EvaluationProtocol(kind="streaming", every=2))),
        (load(llama), f"file:{folders / 'questions.jsonl'}", Evaluator),
    ):
        task = build_task(spec, model.tokenizer)
        samples = task.samples(Split.SEALED, SAMPLES, 0)
        plain = [evaluator(model).evaluate_plainly(manager, sample, task).loglik for sample in samples]
        cell = known["shared", model.name]
        assert cell.row.loglik == pytest.approx(sum(plain) / SAMPLES, abs=1e-4)
        assert cell.row.tokens_per_second > 0
        assert cell.full.loglik >= cell.row.loglik - 0.5


def test_what_a_memory_has_not_is_left_out_there_and_said(moved):
    root, llama, rows = moved
    assert {row.model for row in rows if row.subject == "surprised"} == {"pair-memory"}
    assert {row.model for row in rows if row.manager == "expected_attention"} == {llama}
    text = transfer_markdown(cells(rows), ["a reason"])
    assert "- left out: a reason" in text
    assert f"{STREAM}, streaming:2/query_agnostic" in text
    written = (root / "cells.md").read_text()
    assert f"- left out: surprised on {llama}: observation 'surprise' needs predictions of what is written" in written
    assert "- left out: expected_attention on pair-memory: " in written
    assert "streaming:2" in "".join(
        str(column.header) for table in transfer_tables(cells(rows)) for column in table.columns
    )
    assert Evaluator(load(llama)).refusal(plugins.load(root / "shared")) == ""


def test_a_stream_says_its_length_and_refuses_allocations_by_heads():
    loaded = load("pair-memory")
    task = build_task(STREAM, loaded.tokenizer)
    evaluator = evaluator_of(loaded, EvaluationProtocol(kind="streaming", every=2))
    sample = task.samples(Split.SEALED, 1, 0)[0]
    assert evaluator.length_of(sample) == 60
    allocated = build("feature_scorer(features=['age'], allocation=razor)", budget=BUDGET)
    assert "looks at what attention heads do" in evaluator.refusal(allocated)
    with pytest.raises(ConfigError, match="looks at what attention heads do"):
        evaluator.evaluate([allocated], sample, task)


def test_a_search_on_streams_brings_its_protocol_to_no_language_model_and_what_fits_no_model_is_named(
    tmp_path, folders, caplog  # noqa: F811
):  # fmt: skip
    """And curves of another model's heads are left out there, by name, while the others are measured."""
    llama = str(folders / "llama")
    streaming = {"kind": "streaming", "every": 4, "mode": "query_agnostic"}
    found = {"experiment": "requests", "models": [{"name": "pair-memory"}], "protocol": streaming}
    plugins.save(build(SHARED, budget=BUDGET), tmp_path / "requests", found)
    curves = build("keydiff(allocation=lukv(layers=5, heads=1, points=1))", budget=BUDGET)
    curves.allocation.set_curves(torch.tensor([0.0, 1.0]), torch.ones(5, 1, 1))
    plugins.save(curves, tmp_path / "curves", {"experiment": "curves"})
    command.transfer(
        [str(tmp_path / "requests"), str(tmp_path / "curves")], "keydiff",
        Conditions(
            models=[llama], tasks=[f"file:{folders / 'questions.jsonl'}"], budgets=[BUDGET], samples=2, exact=False,
            dtype="float32",
        ),
        str(tmp_path / "cells.json"), recalibrate=False, check=False, speed=False,
    )  # fmt: skip
    rows = read_rows(tmp_path / "cells.json", TransferRow)
    assert {row.protocol for row in rows} == {"compress_once/query_agnostic"}
    assert {row.subject for row in rows} == {"requests"}
    assert "is measured under compress_once/query_agnostic, the default there" in caplog.text
    assert "requests was searched under streaming:4/query_agnostic" in caplog.text
    written = (tmp_path / "cells.md").read_text()
    assert f"- left out: curves on {llama}: allocation 'lukv': its curves are of 5 layers of 1 KV heads" in written


def test_protocols_are_read_by_model():
    read = command._protocols
    assert read(["streaming:2", "a=compress_once"], ["a", "b"]) == {None: "streaming:2", "a": "compress_once"}
    assert read(["./x=y=streaming:2"], ["./x=y"]) == {"./x=y": "streaming:2"}
    assert read([], ["a"]) == {}
    for words, message in (
        (["other=streaming:1"], "'other' is not among"),
        (["streaming:1", "compress_once"], "two are given for all models"),
        (["a=streaming:1", "a=streaming:2"], "two are given for a"),
    ):
        with pytest.raises(ConfigError, match=message):
            read(words, ["a", "b"])
