"""Readings in several passes: a manager that decides once bounds the memory after each, whatever cut the text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from evomem.errors import CacheError
from evomem.managers import build
from evomem.memory import SlotCache, attached
from evomem.plugins import load_cache, save_cache
from evomem.testing.comparing import greedy, kept_tokens, random_rows, read, same_kept_tokens, same_logits, same_tensors
from evomem.testing.models import tiny
from evomem.testing.reference import Batch, Tracing, explicit_biases, explicit_logits

BUDGET, NEW = 8, 4
MANAGERS = {
    "keydiff": BUDGET, "h2o": BUDGET, "snapkv(window=4)": BUDGET, "expected_attention": BUDGET,
    "feature_scorer": BUDGET, "streaming_llm": BUDGET,
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama", layers=2)


@pytest.fixture(scope="module")
def batch(model: Any) -> Batch:
    return Batch.of(random_rows(model, [70, 61], 0))


def manager(name: str) -> Any:
    return build(name, budget=BUDGET)


def most(cache: SlotCache) -> int:
    return max(int(counts.max()) for counts in cache.slots_held())


@pytest.mark.parametrize("name", MANAGERS)
def test_chunked_prefill_is_one_reading(model: Any, batch: Batch, name: str) -> None:
    """The same slots, text and peak as a prompt read at once; a last chunk of one token too."""
    with manager(name).attach(model) as cache:
        wanted = greedy(model, cache, batch.ids, NEW, batch.real)
        assert most(cache) == BUDGET + NEW - 1
        for size in (16, 23):  # 70 = 3 * 23 + 1
            chunked = manager(name).new_cache(model)
            got = greedy(model, chunked, batch.ids, NEW, batch.real, prefill_chunk_size=size)
            same_tensors(f"{name}, chunks of {size}", got, wanted)
            for row in range(2):
                same_kept_tokens(f"{name}, chunks of {size}", kept_tokens(chunked, row), kept_tokens(cache, row))


@pytest.mark.parametrize("name", MANAGERS)
def test_passes_of_a_loop_and_turns_of_a_chat_are_readings(model: Any, batch: Batch, name: str) -> None:
    """After every pass of more than one token the budget is held; what was evicted is hidden, as decided."""
    tracing = Tracing(manager(name))
    with attached(model):
        cache = SlotCache.for_model(model, tracing)
        logits = []
        at = 0
        for piece in (9, 1, 1, 30, 1, 2, 20, 1, 1):
            logits.append(read(model, cache, batch, [piece], at=at))
            at += piece
            if piece > 1:
                assert most(cache) == BUDGET
                assert all(layer.nbytes() == tensors(layer) for layer in cache.layers)  # nothing observed is kept
    assert most(cache) == BUDGET + 2
    assert len(tracing.events[0]) == 4
    part = Batch(batch.ids[:, :at], batch.real[:, :at], batch.positions[:, :at])
    biases = explicit_biases(tracing.events, part, 2, 2, None)
    same_logits(name, torch.cat(logits, 1), explicit_logits(model, part, biases), part.real)


def tensors(layer: Any) -> int:
    """Bytes of the tokens that have a slot."""
    held = [layer.keys, layer.values, layer.slots, *([] if layer.decays is None else [layer.decays])]
    return int((layer.slots >= 0).sum()) * sum(t.shape[3:].numel() * t.element_size() for t in held)


@pytest.mark.parametrize("name", ["h2o", "snapkv(window=4)", "expected_attention", "feature_scorer"])
def test_a_row_of_a_padded_batch_is_decided_about_as_alone(model: Any, batch: Batch, name: str) -> None:
    with attached(model):
        together = SlotCache.for_model(model, manager(name))
        read(model, together, batch, [30, 1, 20])
        for row, padding in ((0, 0), (1, 9)):
            alone = SlotCache.for_model(model, manager(name))
            read(model, alone, batch.row(row), [30 - padding, 1, 20])
            same_kept_tokens(f"{name}, row {row}", kept_tokens(together, row), kept_tokens(alone, 0))


def test_spectra_begin_anew(model: Any, batch: Batch) -> None:
    """NAMM that decides once: frames of a later reading count from its first token."""
    with build("namm", every=None, budget=BUDGET).attach(model) as cache:
        read(model, cache, batch, [30, 1, 39])
    alone = []
    with build("namm", every=None, budget=BUDGET).attach(model) as cache:
        for row, pieces in ((0, [30, 1, 39]), (1, [21, 1, 39])):
            alone.append(build("namm", every=None, budget=BUDGET).new_cache(model))
            read(model, alone[-1], batch.row(row), pieces)
        together = build("namm", every=None, budget=BUDGET).new_cache(model)
        read(model, together, batch, [30, 1, 39])
    for row in range(2):
        same_kept_tokens(f"row {row}", kept_tokens(together, row), kept_tokens(alone[row], 0))


def test_observations_of_a_later_reading_are_those_of_its_queries(model: Any, batch: Batch) -> None:
    """With everything kept, attention sums are the difference of those before and after; statistics skip no query."""
    from evomem.testing.conformance import KeepEverything

    class Watching(KeepEverything):
        def decide(self, view: Any) -> Any:
            views.append(view)
            return super().decide(view)

    views: list[Any] = []
    row = batch.row(0)
    wants = build("feature_scorer").observes | {"attention_sum", "query_statistics"}
    policy = Watching(type("Like", (), {"observes": frozenset(wants), "schedule": build("h2o").schedule})())
    with attached(model):
        read(model, SlotCache.for_model(model, policy), row, [30, 40])
        later, views[:] = views[2:], []
        for length in (30, 70):
            read(model, SlotCache.for_model(model, policy), Batch.of([row.ids[0, :length]]))
    for layer in range(2):
        first, whole, got = (view.recorded for view in (views[layer], views[2 + layer], later[layer]))
        before = torch.nn.functional.pad(first["attention_sum"], (0, 40))
        torch.testing.assert_close(got["attention_sum"], whole["attention_sum"] - before, atol=1e-4, rtol=1e-4)
        mean = (66 * whole["query_mean"] - 26 * first["query_mean"]) / 40
        torch.testing.assert_close(got["query_mean"], mean, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got["future_rotation"], whole["future_rotation"])


def test_a_question_after_a_reading_block_is_kept(model: Any, batch: Batch) -> None:
    """Who reads inside blocks says what is compressed; a further block decides again, by what it showed."""
    with manager("h2o").attach(model) as cache:
        with cache.reading():
            read(model, cache, batch, [20, 10])
        assert most(cache) == BUDGET
        read(model, cache, batch, [10], at=30)
        assert most(cache) == BUDGET + 10
        with cache.reading():
            read(model, cache, batch, [15, 15], at=40)
        assert most(cache) == BUDGET
        cache.reset()
        read(model, cache, batch, [30])  # as new: a reading of its own
        assert most(cache) == BUDGET
        with cache.reading():  # also after decisions of its own
            read(model, cache, batch, [20, 20], at=30)
        assert most(cache) == BUDGET
        with pytest.raises(ZeroDivisionError), cache.reading():
            print(1 / 0)


@pytest.mark.parametrize("name", ["h2o", "expected_attention"])
def test_what_a_later_reading_recorded_is_saved_and_cloned(model: Any, batch: Batch, name: str, tmp_path: Any) -> None:
    with manager(name).attach(model) as cache:
        read(model, cache, batch, [30])
        with cache.reading():
            read(model, cache, batch, [9], at=30)
        save_cache(cache, tmp_path / "cache.safetensors")
        copies = [cache.clone(), load_cache(tmp_path / "cache.safetensors", model)]
        for one in (cache, *copies):
            with one.reading():
                read(model, one, batch, [20], at=39)
            for row in range(2):
                same_kept_tokens(name, kept_tokens(one, row), kept_tokens(cache, row))


def test_guesses_are_no_readings(model: Any) -> None:
    """Tokens that an assistant guesses are verified in passes of several, and no decision is made about them."""
    ids: Tensor = random_rows(model, [6], 3)[0].repeat(5)[None]
    for name in ("keydiff", "h2o"):
        with manager(name).attach(model) as cache:
            greedy(model, cache, ids, 12, assistant_model=tiny("llama", layers=2))  # right in every guess
        assert BUDGET < most(cache) <= BUDGET + 12
        assert cache.layers[0].decided < 30 + 6 < cache.get_seq_length()  # after the prompt, which came with guesses


def test_generating_without_a_cache_into_a_cache_is_refused(model: Any, batch: Batch) -> None:
    for deciding in (manager("keydiff"), build("keydiff(budget=8, every=10)")):
        with deciding.attach(model) as cache, pytest.raises(CacheError, match="use_cache=False"):
            greedy(model, cache, batch.ids, 3, batch.real, use_cache=False)
