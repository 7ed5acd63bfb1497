"""Evaluation: contexts that were read once: bounded memory, disk for the rest, the same numbers from either."""

from __future__ import annotations

import errno
import gc
import os
import signal
import tempfile
import time
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from evomem.errors import EvomemError
from evomem.evaluation import Evaluator, PrefillStore, Reading, store
from evomem.evaluation.measurement import EXACT
from evomem.memory import LayerView
from evomem.models import LoadedModel
from evomem.testing.models import tiny, tiny_tokenizer
from tests.evaluation.test_evaluation import TASK, made, make_sample

CROWD = (
    "knorm",
    "h2o",
    "snapkv(window=8)",
    "expected_attention",
    "feature_scorer",
    "namm(scorer=linear, selection=capped)",
)


@pytest.fixture(scope="module")
def loaded():
    return LoadedModel("llama", tiny("llama", layers=2), tiny_tokenizer(), "llama")


def tensors(reading):
    for view in reading.views:
        own = {name: getattr(view, name) for name in ("keys", "values", "slots", "start")}
        yield from sorted({**own, **view.recorded}.items())


def size(reading):
    """Bytes, counted here: all tensors of the views and what was computed from them."""
    memos = (value for view in reading.views for value in view.memo.values())
    return sum(t.numel() * t.element_size() for t in [*(t for _, t in tensors(reading)), *memos])


def test_memory_is_bounded_and_what_leaves_it_comes_back_bit_equal(loaded):
    plenty = Evaluator(loaded, store=PrefillStore(1 << 30))
    crowd = [made(spec) for spec in CROWD]
    observes = frozenset().union(*(manager.observes for manager in crowd))
    samples = [make_sample(seed, context=30 + 4 * seed) for seed in range(7)]
    one = plenty.reading(plenty.tokens(samples[-1]).read, observes).nbytes()
    tight = Evaluator(loaded, store=PrefillStore(3 * one))
    alive: list[weakref.ref[Reading]] = []
    for sample in [*samples, *samples[::-1], samples[0], samples[6], samples[0], samples[3]]:
        read = tight.tokens(sample).read
        reading = tight.reading(read, observes)
        alive.append(weakref.ref(reading))
        assert reading.tokens == read.shape[1]
        for (name, mine), (_, other) in zip(tensors(reading), tensors(plenty.reading(read, observes)), strict=True):
            assert mine.dtype == other.dtype, name
            assert torch.equal(mine, other), name
        assert [(v.layer, v.layers, v.seen, v.fresh) for v in reading.views] == [
            (layer, 2, read.shape[1], read.shape[1]) for layer in range(2)
        ]
        newest = size(reading)
        del reading, mine, other
        gc.collect()
        held = sum({id(found): size(found) for found in (reference() for reference in alive) if found}.values())
        assert held == tight.store.bytes_in_memory <= tight.store.limit + newest
    assert tight.store.misses == len(samples)
    assert tight.store.hits == len(alive) - len(samples)
    assert 4 <= tight.store.spills <= len(samples)  # each of them once
    for sample in samples:
        found = [e.evaluate(crowd, sample, TASK, EXACT) for e in (plenty, tight)]
        plain, spilled = ([replace(e, seconds=0, tokens=0) for e in evaluations] for evaluations in found)
        assert plain == spilled
    assert tight.store.bytes_in_memory <= tight.store.limit + one * 2


def test_what_managers_compute_counts_at_the_next_look(loaded):
    evaluator, sample = Evaluator(loaded), make_sample()
    evaluator.evaluate([made("feature_scorer")], sample, TASK)
    observes = made("feature_scorer").observes
    before = evaluator.store.bytes_in_memory
    reading = evaluator.reading(evaluator.tokens(sample).read, observes)
    assert reading.nbytes() == size(reading) == evaluator.store.bytes_in_memory > before


def test_the_newest_stays_even_if_it_is_too_large(loaded):
    evaluator = Evaluator(loaded, store=PrefillStore(0))
    for seed in (0, 0, 1, 1, 0):
        evaluator.evaluate([made("keydiff")], make_sample(seed), TASK)
    assert (evaluator.store.misses, evaluator.store.hits, evaluator.store.spills) == (2, 3, 2)


def test_readings_differ_by_model_type_tokens_and_observations(loaded):
    shared = PrefillStore()
    other = LoadedModel("other", tiny("llama", layers=2, seed=1), loaded.tokenizer, "other")
    half = LoadedModel("llama", tiny("llama", layers=2).to(torch.bfloat16), loaded.tokenizer, loaded.digest)
    for model in (loaded, other, half):
        evaluator = Evaluator(model, store=shared)
        for seed in (0, 1):
            for observes in (frozenset[str](), frozenset({"attention_sum"})):
                for _ in range(2):
                    view = evaluator.reading(evaluator.tokens(make_sample(seed)).read, observes).views[0]
                    assert view.keys.dtype == model.model.dtype
                    assert set(view.recorded) == observes
    assert (shared.misses, shared.hits) == (12, 12)


def test_bfloat16_survives_the_disk(loaded):
    model = LoadedModel("llama", tiny("llama", layers=2).to(torch.bfloat16), loaded.tokenizer, "half")
    evaluator = Evaluator(model, store=PrefillStore(0))
    read = evaluator.tokens(make_sample()).read
    first = evaluator.reading(read, frozenset({"attention_sum"}))
    evaluator.reading(evaluator.tokens(make_sample(1)).read, frozenset())
    again = evaluator.reading(read, frozenset({"attention_sum"}))
    assert evaluator.store.spills == 2
    assert first is not again
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(tensors(first), tensors(again), strict=True))


def test_temporary_folder_is_removed_and_a_given_one_stays(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()

    def use(contexts):
        evaluator = Evaluator(loaded, store=contexts)
        for seed in range(3):
            evaluator.reading(evaluator.tokens(make_sample(seed)).read, frozenset())
        return evaluator

    for end in ("close", "forget"):
        evaluator = use(PrefillStore(0))
        assert len(list((tmp_path / "tmp").glob("evomem-prefill-*/*.safetensors"))) == 2
        if end == "close":
            evaluator.store.close()
            assert evaluator.store.bytes_in_memory == 0
            evaluator.reading(evaluator.tokens(make_sample()).read, frozenset())  # goes on with nothing
            assert evaluator.store.misses == 4
        del evaluator
        gc.collect()
        assert list((tmp_path / "tmp").iterdir()) == []
    evaluator = use(PrefillStore(0, tmp_path / "given" / "deep"))
    evaluator.store.close()
    assert len(list((tmp_path / "given" / "deep").iterdir())) == 2
    again = use(PrefillStore(0, tmp_path / "given" / "deep"))
    assert (again.store.misses, again.store.hits) == (1, 2)


def test_a_full_disk_is_said_plainly_and_nothing_half_written_stays(loaded, tmp_path, monkeypatch):
    evaluator = Evaluator(loaded, store=PrefillStore(0, tmp_path))
    full = True

    def save(content, path, **options):
        if full:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(content, path, **options)

    monkeypatch.setattr(store, "save_file", save)
    evaluator.evaluate([made("keydiff")], make_sample(0), TASK)
    with pytest.raises(EvomemError, match=r"No space left.*free some disk space.*store_bytes is 0") as caught:
        evaluator.evaluate([made("keydiff")], make_sample(1), TASK)
    assert str(tmp_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    full = False
    expected = Evaluator(loaded).evaluate([made("keydiff")], make_sample(0), TASK)
    found = evaluator.evaluate([made("keydiff")], make_sample(0), TASK)  # space was made: it goes on
    assert found[0].loglik == expected[0].loglik
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_made_is_said_plainly(loaded, tmp_path):
    (tmp_path / "file").write_text("in the way")
    evaluator = Evaluator(loaded, store=PrefillStore(0, tmp_path / "file" / "folder"))
    evaluator.evaluate([made("keydiff")], make_sample(0), TASK)
    with pytest.raises(EvomemError, match="no folder for contexts"):
        evaluator.evaluate([made("keydiff")], make_sample(1), TASK)


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_damaged_file_is_read_again(loaded, tmp_path, damage, caplog):
    first = Evaluator(loaded, store=PrefillStore(0, tmp_path))
    expected = [first.evaluate([made("keydiff")], make_sample(seed), TASK)[0].loglik for seed in (0, 1)]
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "other": b"not at all" * 9}[damage])
    second = Evaluator(loaded, store=PrefillStore(0, tmp_path))
    assert [second.evaluate([made("keydiff")], make_sample(seed), TASK)[0].loglik for seed in (0, 1)] == expected
    assert "damaged" in caplog.text
    assert second.store.misses == 2
    assert len(file.read_bytes()) == len(content)  # written anew when it had to make room


def test_what_a_killed_process_has_spilled_is_removed_by_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spilled, told = os.pipe()
    process = os.fork()
    if process == 0:
        store = PrefillStore(limit=1)
        for key in "ab":
            store.get(key, lambda: Reading((view(),), 8))
        os.write(told, b".")
        time.sleep(100)
        os._exit(0)
    os.close(told)
    assert os.read(spilled, 1) == b"."
    for killed in (False, True):
        if killed:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        monkeypatch.setattr(PrefillStore, "swept", False)  # as in a process that has just begun
        PrefillStore().close()
        assert len(list(tmp_path.glob("evomem-prefill-*/*.safetensors"))) == (not killed)
    assert list(tmp_path.iterdir()) == []


def view():
    keys, slots = torch.zeros(1, 1, 8, 2), torch.zeros(1, 1, 8, dtype=torch.int64)
    return LayerView(keys, keys.clone(), slots, torch.zeros(1, dtype=torch.int64), 8, 8, 0, 1)
