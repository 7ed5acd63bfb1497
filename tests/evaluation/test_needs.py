"""A plan that needs more memory, disk or time than there is says so before it begins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evomem.errors import PlanError
from evomem.evaluation import needs
from evomem.evaluation.needs import Needs, Work, bytes_per_token, free_disk, free_memory, length_of, needs_of, require
from evomem.runs import search
from evomem.runs.plan_needs import vectors_needs
from evomem.tasks import build
from evomem.testing.models import tiny, tiny_tokenizer
from tests.support.synthetic_search import ToyEvaluator, experiment, factory

GIB = 1 << 30


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture
def room(monkeypatch):
    """A machine with 8 GiB of memory and 50 GiB of disk free."""
    monkeypatch.setattr(needs, "free_memory", lambda: 8 * GIB)
    monkeypatch.setattr(needs, "free_disk", lambda folder: 50 * GIB)


def test_bytes_of_a_token_are_those_that_a_cache_holds(model):
    import torch

    held = model(torch.arange(10)[None], use_cache=True).past_key_values
    total = sum(layer.keys.nbytes + layer.values.nbytes for layer in held.layers)
    assert bytes_per_token(model) == total / 10
    assert bytes_per_token(None) == 0


def test_lengths_are_the_tasks_own_or_those_of_its_samples(tmp_path):
    row = {"context": "the cat " * 50, "question": "what", "answers": ["cat"]}
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(row) for _ in range(12)))
    assert length_of(build("passkey:length=70", tiny_tokenizer())) == 70
    assert 100 <= length_of(build(f"file:{tmp_path}/q.jsonl", tiny_tokenizer())) <= 105


def test_a_plan_grows_with_each_of_its_parts(model, tmp_path):
    task = build("passkey:length=1000", tiny_tokenizer())

    def of(**changes):
        given = {"model": model, "task": task, "contexts": 100, "evaluations": 1000, "rows": 8, "keeps": True}
        return needs_of([Work(**{**given, **changes})], store=GIB, spill=tmp_path)

    base, reading = of(), 1000 * bytes_per_token(model)
    assert of(contexts=200).memory - base.memory == 100 * (reading + 1000 * needs.PER_SAMPLE)
    assert of(rows=16).memory - base.memory == 8 * reading
    assert of(rows=16, share=0.5).memory == base.memory
    assert base.disk == {}
    many = of(contexts=10**6)
    assert many.disk == {tmp_path: 10**6 * reading - GIB}
    assert many.evaluations == 1000


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (Needs(memory=9 * GIB), "9.0 GiB of memory, 8.0 GiB are free"),
        (Needs(disk={None: 60 * GIB}), "60.0 GiB of disk"),
        (Needs(seconds=40 * 86400, evaluations=10**6), r"about 40\.0 days for 1,000,000 evaluations"),
        (Needs(seconds=1e12), "years"),
    ],
)
def test_what_there_is_not_is_refused_and_can_be_insisted_on(room, plan, said):
    with pytest.raises(PlanError, match=f"{said}.*--no-plan-check"):
        require(plan)
    told = []
    require(plan, check=False, say=told.append)
    assert len(told) == 1


def test_what_takes_days_is_said_and_what_fits_is_not(room):
    told = []
    require(Needs(memory=GIB, seconds=2 * 86400, evaluations=5), say=told.append)
    assert told == ["this will take about 2.0 days (5 evaluations)"]
    require(Needs(memory=GIB, seconds=3600), say=pytest.fail)


def test_time_is_measured_only_where_it_matters(model, monkeypatch):
    assert needs._seconds(model, 1000) == 0
    monkeypatch.setattr(needs, "_CHEAP", 0)
    short, long = needs._seconds(model, 10**6), needs._seconds(model, 10**9)
    assert 0 < short < long
    assert needs._seconds(None, 10**9) == 0


def test_free_is_what_the_system_says(tmp_path):
    assert (free_memory() or GIB) > 1 << 20
    assert free_disk(tmp_path / "not" / "there") == free_disk(tmp_path)


def test_a_search_that_has_no_end_is_refused_before_anything_is_drawn(tmp_path, room, monkeypatch):
    settings = ("generations=1000000", "driver.population=1000", "samples_per_generation=20", "train_contexts=20")
    with pytest.raises(PlanError, match="disk"):
        search(experiment(*settings), tmp_path / "run", factory(ToyEvaluator()))
    assert not (tmp_path / "run" / "start" / "vector.npy").exists()


def test_populations_and_covariances_count(room):
    config = experiment("driver.name=cmaes", "driver.population=16", "driver.options.diagonal=false")
    assert vectors_needs(config, 20_000).memory > 8 * GIB
    assert vectors_needs(experiment("driver.options.diagonal=true"), 20_000).memory < GIB
    with pytest.raises(PlanError, match="memory"):
        require(vectors_needs(config, 20_000))


def test_streams_take_the_time_that_every_batch_reads_for_itself():
    from evomem.models.architectures.pair_memory import PairMemoryConfig, PairMemoryModel, pair_memory_tokenizer

    model, task = PairMemoryModel(PairMemoryConfig()), build("zipf:length=1000", pair_memory_tokenizer())
    work = Work(model, task, contexts=10, evaluations=400, rows=8)
    needed = needs_of([work], store=GIB, spill=Path("."))
    assert needed.seconds == pytest.approx(50 * 1000 * needs.PER_REQUEST)
    assert needed.evaluations == 400
