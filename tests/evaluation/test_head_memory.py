"""Evaluation: slots and bytes of every layer and KV head equal what an attached cache holds when reading has ended."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from evomem.errors import RunError
from evomem.evaluation import EvaluationProtocol, Evaluator
from evomem.evaluation.measurement import EXACT, HEAD_MEMORY, LOGLIK, Evaluation
from evomem.evaluation.reference import recorded_bytes
from evomem.evaluation.rows import Measured, Row, rows_of
from evomem.managers import build
from evomem.models import LoadedModel
from evomem.report.tables import read_rows, write_rows
from evomem.tasks.base import Sample
from evomem.testing.models import tiny, tiny_tokenizer

SPECS = (
    "full",
    "keydiff",
    "h2o",
    "pyramidkv(window=8)",
    "adakv(keydiff)",
    "keydiff(allocation=per_head_shares(layers=2, heads=2))",
    "kv_policy(actions=[store, evict, forget], hidden=3)",
    "namm(scorer=linear, selection=threshold)",
)
"""Even and uneven heads and layers; one that fades, whose decays the others of its batch do not pay for."""
PROTOCOLS = [{}, {"kind": "streaming", "every": 16}]


@pytest.fixture(scope="module")
def loaded():
    return LoadedModel("tiny", tiny("llama", layers=2), tiny_tokenizer(), "digest")


@pytest.fixture(scope="module")
def sample():
    words = ["the", "cat", "dog", "bird", "tree", "house", "red", "black", "white", "big", "small", "sky", "blue"]
    text = " ".join(np.random.default_rng(0).choice(words, 44))
    return Sample("s", text, " what ?", " red cat", ("red",), 0)


def managers():
    torch.manual_seed(0)
    made = [build(spec) if spec == "full" or "namm" in spec else build(spec, budget=10) for spec in SPECS]
    for manager in made:
        for parameter in manager.parameters():
            parameter.data = torch.randn_like(parameter)
    return made


class Scored:
    has_exact = False


@torch.no_grad()
def attached(evaluator, manager, sample):
    """One manager on a cache of its own: slots by head, and the bytes of every layer without what is recorded."""
    manager = evaluator.scheduled(manager).for_model(evaluator.loaded.model)
    with manager.attach(evaluator.loaded.model) as cache:
        with cache.reading():
            evaluator.forward_in_pieces(evaluator.tokens(sample).read, cache, 1)
        held = [[(head >= 0).sum().item() for head in layer.slots[0]] for layer in cache.layers]
        storage = [sum(t.numel() * t.element_size() for t in layer.storage.tensors()) for layer in cache.layers]
        recorded = recorded_bytes(cache)
        assert sum(storage) + recorded == cache.nbytes()
        slotwise = [
            sum(t.numel() * t.element_size() for t in layer.recorder.tensors())
            - sum(t.numel() * t.element_size() for t in layer.recorder.rowwise.values())
            for layer in cache.layers
        ]
    return held, storage, slotwise


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_head_holds_what_it_holds_in_a_cache_of_its_own(loaded, sample, protocol):
    evaluator = Evaluator(loaded, EvaluationProtocol(**protocol))
    made = managers()
    found = evaluator.evaluate(made, sample, Scored(), LOGLIK.also(HEAD_MEMORY))
    shapes = set()
    for spec, manager, one in zip(SPECS, made, found, strict=True):
        slots, storage, slotwise = attached(evaluator, manager, sample)
        assert [list(layer) for layer in one.table("head_slots")] == slots, spec
        assert np.mean(slots) == pytest.approx(one.slots)
        # After the one decision of compress_once nothing needs the observations.
        observed = slotwise if protocol else [0, 0]
        sizes = [sum(layer) for layer in one.table("head_bytes")]
        assert sizes == [a + b for a, b in zip(storage, observed, strict=True)], spec
        shapes.add(json.dumps(slots))
    assert len(shapes) > 4


def test_nobody_else_gets_tables_and_exact_scores_change_nothing(loaded, sample):
    evaluator = Evaluator(loaded)
    (plain,) = evaluator.evaluate([build("keydiff", budget=10)], sample, Scored(), LOGLIK)
    assert set(plain.values) == {"loglik"}
    (told,) = evaluator.evaluate([build("keydiff", budget=10)], sample, Scored(), EXACT.also(HEAD_MEMORY))
    assert told.loglik == plain.loglik
    assert Evaluation.from_json(json.loads(json.dumps(told.to_json())), EXACT) == told


# ---- rows ----------------------------------------------------------------------------------------------------------


def measured(tables):
    found = [
        Evaluation(
            str(number),
            {"loglik": -1.0} | ({} if table is None else {"head_slots": table, "head_bytes": table}),
            1.0, 8.0, 8.0, 1, 0.1,
        )
        for number, table in enumerate(tables)
    ]  # fmt: skip
    return Measured("m", "t", "mine", 8, "compress_once/query_agnostic", "sealed", "subject", found)


def test_a_row_has_the_means_over_samples_or_none_at_all(tmp_path):
    ragged = [((1.0, 4.0), (2.0,)), ((3.0, 5.0), (2.0,))]  # layers may have different numbers of heads
    (row,) = rows_of("mine", [measured(ragged)])
    assert row.head_slots == row.head_bytes == [[2.0, 4.5], [2.0]]
    (without,) = rows_of("mine", [measured([*ragged, None])])  # a sample that an earlier version has measured
    assert without.head_slots is None
    assert without.head_bytes is None
    write_rows(tmp_path / "rows.json", [row, without])
    assert read_rows(tmp_path / "rows.json") == [row, without]
    data = json.loads((tmp_path / "rows.json").read_text())
    old = [{key: value for key, value in one.items() if not key.startswith("head_")} for one in data]
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert read_rows(tmp_path / "old.json") == [replace(row, head_slots=None, head_bytes=None), without]


@pytest.mark.parametrize("bad", [[], [[]], [1.0], [["1"]], [[None]], "1", {"0": [1.0]}, [[True]]])
def test_heads_of_a_file_that_are_no_numbers_are_refused(tmp_path, bad):
    (row,) = rows_of("mine", [measured([((1.0,),)])])
    (tmp_path / "rows.json").write_text(json.dumps([{**row.to_json(), "head_slots": bad}]))
    with pytest.raises(RunError, match="heads have a number each"):
        read_rows(tmp_path / "rows.json")
    assert isinstance(row, Row)
