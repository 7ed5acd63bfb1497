"""Heads of different lengths pay for their own slots: against the padded storage, and against plain sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomem.errors import CacheError
from evomem.managers import MemoryManager, build
from evomem.memory import Decision, LayerView, SlotCache, attached
from evomem.memory.kv import layer as layer_module
from evomem.memory.kv import ragged_attention as kernels
from evomem.memory.kv.ragged import RaggedLayout
from evomem.memory.kv.storage import SlotStorage
from evomem.memory.observations import Recorder, Wanted
from evomem.plugins import load_cache, save_cache
from evomem.testing.comparing import greedy, random_rows, read, same_logits
from evomem.testing.conformance import CHECKS, run_check
from evomem.testing.models import tiny
from evomem.testing.reference import Batch
from tests.support.layouts import layouts
from tests.support.padded_storage import PaddedStorage

# ---- the layout --------------------------------------------------------------------------------------------------


@given(layout=layouts(), index=st.lists(st.integers(0, 10**6), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_padding_flattening_and_rows_are_those_of_lists(layout: RaggedLayout, index: list[int]) -> None:
    lengths = layout.lengths.tolist()
    numbers = iter(range(1, layout.total + 1))
    heads = [[[next(numbers) for _ in range(count)] for count in row] for row in lengths]
    flat = torch.arange(1, layout.total + 1)
    longest = max(map(max, lengths))
    padded = [[[0] * (longest - len(head)) + head for head in row] for row in heads]
    assert layout.pad(flat).tolist() == padded
    assert layout.pad(flat[:, None].expand(-1, 2))[..., 1].tolist() == padded
    assert layout.filled.tolist() == [[[number > 0 for number in head] for head in row] for row in padded]
    assert layout.flatten(layout.pad(flat)).tolist() == flat.tolist()
    rows = [number % len(heads) for number in index]
    chosen, source = layout.rows(torch.tensor(rows))
    assert chosen.lengths.tolist() == [lengths[row] for row in rows]
    assert flat[source].tolist() == [number for row in rows for head in heads[row] for number in head]


# ---- managers over both storages ---------------------------------------------------------------------------------

MANAGERS = {
    "adakv": "adakv(keydiff, budget=9)",
    "per head": "keydiff(budget=9, allocation=per_head_shares(layers=2, heads=2))",
    "threshold": "knorm(budget=12, allocation=across_heads, every=7)",
    "observed": "h2o(budget=9, allocation=across_heads(safeguard=0.1), every=8)",
    "spectrum": "namm(budget=12, every=16)",
}


def ragged_manager(name: str) -> MemoryManager:
    manager = build(MANAGERS[name])
    with torch.no_grad():
        for parameter_name, parameter in manager.named_parameters():
            if "log_shares" in parameter_name:
                parameter.copy_(torch.linspace(-1.5, 1.5, parameter.numel()).view(parameter.shape))
    return manager


class Recalling:
    """A policy that does what a manager does, and keeps its decisions."""

    def __init__(self, manager: MemoryManager) -> None:
        self.manager, self.decisions = manager, list[Decision]()
        self.observes, self.schedule = manager.observes, manager.schedule
        self.whole_model = getattr(manager, "whole_model", False)

    def decide(self, view: LayerView) -> Decision:
        self.decisions.append(self.manager.decide(view))
        return self.decisions[-1]

    def decide_all(self, views: Any) -> list[Decision]:
        decided = self.manager.decide_all(views)
        self.decisions += decided
        return decided


def same_decisions(mine: Recalling, theirs: Recalling) -> None:
    assert len(mine.decisions) == len(theirs.decisions) > 0
    for one, other in zip(mine.decisions, theirs.decisions, strict=True):
        wide = max(one.keep.shape[2], other.keep.shape[2])
        keeps = [torch.nn.functional.pad(d.keep, (wide - d.keep.shape[2], 0)) for d in (one, other)]
        assert torch.equal(*keeps)


PIECES = [30, 1, 1, 1, 9, 1, 1, 12, 1, 1]


@pytest.mark.parametrize("short", [True, False], ids=["padded for a call", "per head"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma"])
@pytest.mark.parametrize("name", MANAGERS)
def test_decisions_and_logits_are_those_of_padded_heads(name: str, family: str, short: bool, monkeypatch: Any) -> None:
    """Left-padded rows, chunks and single tokens; then rows are repeated, and tokens cropped where that is possible."""
    model = tiny(family, layers=2)
    batch = Batch.of(random_rows(model, [sum(PIECES), sum(PIECES) - 9], 3))
    if not short:
        monkeypatch.setattr(kernels, "SHORT", -1)
    outcomes, policies = [], []
    for kind in (SlotStorage, PaddedStorage):
        monkeypatch.setattr(layer_module, "SlotStorage", kind)
        policy = Recalling(ragged_manager(name))
        with attached(model):
            cache = SlotCache.for_model(model, policy)  # type: ignore[arg-type]
            logits = [read(model, cache, batch, PIECES[:-2])]
            cache.reorder_cache(torch.tensor([1, 0]))
            cache.reorder_cache(torch.tensor([1, 0]))
            logits.append(read(model, cache.clone(), batch, PIECES[-2:], at=sum(PIECES[:-2])))
            logits.append(read(model, cache, batch, PIECES[-2:], at=sum(PIECES[:-2])))
        assert torch.equal(logits[1], logits[2])
        outcomes.append(torch.cat(logits[:2], 1))
        policies.append(policy)
        slots = [layer.slots for layer in cache.layers]
        assert any(int((one < 0).sum()) for one in slots)  # or nothing was tried
        if kind is SlotStorage:
            assert all(
                layer.storage.layout is not None
                for layer, one in zip(cache.layers, slots, strict=True)
                if (one < 0).any()
            )
            ragged = slots
    for mine, theirs in zip(ragged, slots, strict=True):
        wide = max(mine.shape[2], theirs.shape[2])
        assert torch.equal(
            *(torch.nn.functional.pad(one, (wide - one.shape[2], 0), value=-1) for one in (mine, theirs))
        )
    same_decisions(*policies)
    same_logits(f"{name}, {family}", *outcomes, batch.real)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", ["per head", "observed"])
def test_conformance_with_a_call_per_head(name: str, check: str, monkeypatch: Any) -> None:
    """As the kit does with short heads, which are padded for a call, in `test_conformance`."""
    monkeypatch.setattr(kernels, "SHORT", -1)
    run_check(check, ragged_manager(name), tiny("llama", layers=2))


# ---- bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MANAGERS)
def test_bytes_are_those_of_the_slots_held(name: str) -> None:
    """After every pass, padding and unequal rows included; a row is charged what it costs alone."""
    model = tiny("llama", layers=2)
    batch = Batch.of(random_rows(model, [sum(PIECES), sum(PIECES) - 9, sum(PIECES)], 3))
    size = model.config.head_dim * 2 * 4 + 8
    with attached(model):
        cache = SlotCache.for_model(model, ragged_manager(name))
        alone = [SlotCache.for_model(model, ragged_manager(name)) for _ in range(3)]
        at = 0
        for count in PIECES:
            read(model, cache, batch, [count], at=at)
            for row, single in enumerate(alone):
                own, begin = batch.row(row), max(at - 9 * (row == 1), 0)
                end = at + count - 9 * (row == 1)
                if end > begin:
                    read(model, single, own, [end - begin], at=begin)
            at += count
            recorded = sum(t.numel() * t.element_size() for layer in cache.layers for t in layer.recorder.tensors())
            slots = sum(int(one.sum()) for one in cache.slots_held())
            assert cache.nbytes() - recorded == slots * size
            if name != "spectrum":  # whose frame that is not full yet is as long for all rows
                assert cache.bytes_by_row().tolist() == [single.nbytes() for single in alone]
            assert int(cache.bytes_by_row().sum()) == cache.nbytes()
            for layer in cache.layers:
                for tensor in (*layer.storage.tensors(), *layer.recorder.tensors()):
                    assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_equal_heads_are_stored_as_ever() -> None:
    model = tiny("llama", layers=2)
    with build("keydiff(budget=9)").attach(model) as cache:
        read(model, cache, Batch.of(random_rows(model, [40, 40], 3)), [30, 1, 9])
        assert all(layer.storage.layout is None and layer.aligned and not layer.storage.flat for layer in cache.layers)


def test_what_padding_has_left_goes_with_the_pass() -> None:
    """Padding is not kept until something is decided: bytes are those of the real tokens."""
    model = tiny("llama", layers=2)
    batch = Batch.of(random_rows(model, [30, 11], 3))
    with build("streaming_llm(budget=60, every=99)").attach(model) as cache:
        read(model, cache, batch, [28, 1, 1])
        assert [one.tolist() for one in cache.slots_held()] == [[[30, 30], [11, 11]]] * 2
        assert cache.nbytes() == sum(cache.bytes_by_row().tolist()) == 2 * 2 * 41 * (2 * model.config.head_dim * 4 + 8)


@pytest.mark.parametrize("spec", ["keydiff(budget=9)", MANAGERS["adakv"], MANAGERS["observed"]])
def test_rows_are_named_as_tensors_take_them_and_wrong_ones_change_nothing(spec: str) -> None:
    """By numbers, from the end too, and by truths; whether heads are equal, unequal or observed."""
    model = tiny("llama", layers=2)
    batch = Batch.of(random_rows(model, [30, 22, 26], 3))
    with build(spec).attach(model) as cache:
        read(model, cache, batch, [25])
        before = [layer.slots.clone() for layer in cache.layers]
        for wrong in ([3], [0, -4], [], [1.0], [[0, 1]], [True, False], [False] * 3):
            for select in (cache.batch_select_indices, cache.reorder_cache):
                with pytest.raises(CacheError, match="of a cache of 3: give the numbers of the rows that stay"):
                    select(torch.tensor(wrong))
        with pytest.raises(CacheError, match="at least one"):
            cache.batch_repeat_interleave(0)
        assert all(torch.equal(layer.slots, slots) for layer, slots in zip(cache.layers, before, strict=True))
        found = []
        for index in ([2, 0], [-1, 0], [True, False, True]):
            one, rows = cache.clone(), torch.tensor(index)
            one.batch_select_indices(rows)
            part = Batch(batch.ids[rows], batch.real[rows], batch.positions[rows])
            assert one.layers[0].starts == tuple(one.layers[0].start.tolist()) == tuple(part.start.tolist())
            found.append(read(model, one, part, [1, 4], at=25))
        assert torch.equal(found[0], found[1])
        torch.testing.assert_close(found[2], found[0].flip(0))


# ---- operations that tests above do not reach --------------------------------------------------------------------


def test_new_observations_begin_in_step_with_the_slots() -> None:
    """What `SlotLayer.observe_again` begins on a ragged layer follows it through compaction."""
    storage, recorder = SlotStorage(), Recorder(Wanted.parse(["attention_sum"]))
    keys = torch.randn(2, 2, 6, 4)
    storage.append(keys, keys, 0, None, recorder)
    recorder.slotwise["attention_sum"] = torch.arange(24.0).view(2, 2, 6)
    mask = torch.rand(2, 2, 6, generator=torch.Generator().manual_seed(1)) < 0.6
    storage.keep(mask, recorder)
    assert recorder.flat["attention_sum"].tolist() == torch.arange(24.0).view(2, 2, 6)[mask].tolist()
    storage.append(keys[:, :, :2], keys[:, :, :2], 6, None, recorder)
    whole = recorder.whole(storage.layout).slotwise["attention_sum"]
    assert whole.shape == storage.shape == storage.whole("slots").shape
    assert torch.equal(whole > 0, (storage.whole("slots") >= 0) & (storage.whole("slots") < 6) & (whole > 0))
    again = storage.whole("slots") >= 2
    wanted = [head[kept].tolist() for head, kept in zip(whole.flatten(0, 1), again.flatten(0, 1), strict=True)]
    storage.keep(again, recorder)
    joined = recorder.whole(storage.layout).slotwise["attention_sum"]
    valid = storage.whole("slots") >= 0
    assert [h[v].tolist() for h, v in zip(joined.flatten(0, 1), valid.flatten(0, 1), strict=True)] == wanted


@pytest.mark.parametrize("name", MANAGERS)
def test_a_saved_cache_goes_on_to_the_bit(name: str, tmp_path: Any) -> None:
    model = tiny("llama", layers=2)
    batch = Batch.of(random_rows(model, [45, 36], 3))
    with ragged_manager(name).attach(model) as cache:
        read(model, cache, batch, [37, 1])
        save_cache(cache, tmp_path / "saved")
        loaded = load_cache(tmp_path / "saved", model)
        assert (loaded.nbytes(), loaded.bytes_by_row().tolist()) == (cache.nbytes(), cache.bytes_by_row().tolist())
        at = 38
        assert torch.equal(read(model, loaded, batch, [3, 1, 3], at=at), read(model, cache, batch, [3, 1, 3], at=at))
        for one, other in zip(loaded.layers, cache.layers, strict=True):
            assert torch.equal(one.slots, other.slots)
            assert one.recorder.flat.keys() == other.recorder.flat.keys()


def test_a_cache_saved_with_padded_heads_still_loads(tmp_path: Any, monkeypatch: Any) -> None:
    model = tiny("llama", layers=2)
    batch = Batch.of(random_rows(model, [45, 36], 3))
    manager = ragged_manager("observed")
    with manager.attach(model):
        with monkeypatch.context() as patch:
            patch.setattr(layer_module, "SlotStorage", PaddedStorage)
            before = manager.new_cache(model)
            read(model, before, batch, [38])
            assert any(layer.storage.padded for layer in before.layers)
            save_cache(before, tmp_path / "before")
        loaded, new = load_cache(tmp_path / "before", model), manager.new_cache(model)
        read(model, new, batch, [38])
        assert loaded.nbytes() == new.nbytes() < before.nbytes()
        same_logits("after loading", read(model, loaded, batch, at=38), read(model, new, batch, at=38))
        assert all(torch.equal(a.slots, b.slots) for a, b in zip(loaded.layers, new.layers, strict=True))


def test_beams_and_greedy_tokens_are_those_of_padded_heads(monkeypatch: Any) -> None:
    model = tiny("llama", layers=2)
    batch = Batch.of(random_rows(model, [40, 31], 3))
    said = []
    for kind in (SlotStorage, PaddedStorage):
        monkeypatch.setattr(layer_module, "SlotStorage", kind)
        with ragged_manager("per head").attach(model):
            cache = ragged_manager("per head").new_cache(model)
            said.append(greedy(model, cache, batch.ids, 8, batch.real, num_beams=3))
    assert torch.equal(*said)
