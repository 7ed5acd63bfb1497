"""The slot cache against a cache of plain Python lists, and what it says about its memory."""

from __future__ import annotations

import copy
import itertools
import weakref
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomem.errors import CacheError
from evomem.managers import Full, KNorm, Schedule, build
from evomem.memory import Decision, LayerView, SlotCache, attached
from evomem.memory.kv.attention import managed_attention
from evomem.testing.comparing import kept_tokens as kept
from evomem.testing.comparing import random_rows, read, same_kept_tokens, same_logits
from evomem.testing.models import tiny
from evomem.testing.reference import Batch

KV, GROUP, DIM = 2, 2, 4


@dataclass(frozen=True)
class Nothing:
    """A policy that is never asked."""

    observes: frozenset[str] = frozenset()
    schedule: Schedule = field(default_factory=Schedule)

    def decide(self, view: LayerView) -> Decision:
        return Decision(view.valid)


class ListCache:
    """The slow cache: per row and KV head a list of (token, key, value, log-decay)."""

    def __init__(self, rows: int) -> None:
        self.heads = [[[] for _ in range(KV)] for _ in range(rows)]
        self.real: list[list[bool]] = [[] for _ in range(rows)]

    @property
    def seen(self) -> int:
        return len(self.real[0])

    def append(self, query, key, value, real, scale, window) -> np.ndarray:
        first = self.seen
        out = np.zeros(query.shape)
        for row, heads in enumerate(self.heads):
            self.real[row] += real[row].tolist()
            for head, entries in enumerate(heads):
                for token in range(key.shape[2]):
                    if real[row, token]:
                        entries.append((first + token, key[row, head, token], value[row, head, token], 0.0))
                for q in range(GROUP):
                    for token in range(key.shape[2]):
                        near = [
                            e
                            for e in entries
                            if e[0] <= first + token and (window is None or e[0] > first + token - window)
                        ]
                        if not real[row, token]:
                            continue
                        logits = np.array([query[row, head * GROUP + q, token] @ e[1] * scale + e[3] for e in near])
                        weights = np.exp(logits - logits.max())
                        mixed = sum(w * e[2] for w, e in zip(weights / weights.sum(), near, strict=True))
                        out[row, head * GROUP + q, token] = mixed
        return out

    def decide(self, keep, decay) -> None:
        """keep, decay by (row, head, token)."""
        for row, heads in enumerate(self.heads):
            for head, entries in enumerate(heads):
                heads[head] = [
                    (t, k, v, decay[row, head, t] if decay is not None else d)
                    for t, k, v, d in entries
                    if keep[row, head, t]
                ]

    def rows(self, index: list[int]) -> None:
        self.heads = [copy.deepcopy(self.heads[i]) for i in index]
        self.real = [list(self.real[i]) for i in index]

    def crop(self, length: int) -> None:
        self.heads = [[[e for e in entries if e[0] < length] for entries in heads] for heads in self.heads]
        self.real = [r[:length] for r in self.real]


def check_equal(cache: SlotCache, slow: ListCache) -> None:
    layer = cache.layers[0]
    assert cache.get_seq_length() == layer.get_seq_length() == slow.seen
    assert cache.get_mask_sizes(3, 0) == (slow.seen + 3, 0)
    if not slow.seen:
        return
    longest = 0
    for row, heads in enumerate(slow.heads):
        for head, entries in enumerate(heads):
            valid = layer.slots[row, head] >= 0
            assert layer.slots[row, head][valid].tolist() == [e[0] for e in entries]
            longest = max(longest, len(entries))
            for got, at in ((layer.keys, 1), (layer.values, 2)):
                wanted = np.array([e[at] for e in entries]).reshape(-1, DIM)
                np.testing.assert_array_equal(got[row, head][valid].double().numpy(), wanted)
            if layer.decays is not None:
                wanted = np.array([e[3] for e in entries])
                np.testing.assert_allclose(layer.decays[row, head][valid].numpy(), wanted, atol=1e-6)
    assert not layer.aligned or bool((layer.slots >= 0).all())
    if layer.dense:
        assert all([e[0] for e in entries] == list(range(slow.seen)) for heads in slow.heads for entries in heads)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10**6), window=st.sampled_from([None, 5]))
def test_any_sequence_of_operations_equals_plain_lists(data, seed: int, window) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = data.draw(st.integers(1, 3))
    cache, slow = SlotCache(1, Nothing()), ListCache(rows)
    evicted = False
    for _ in range(data.draw(st.integers(1, 7))):
        rows = len(slow.real)
        kind = data.draw(
            st.sampled_from(["append", "append", "append", "decide", "rows", "repeat", "crop", "clone", "keep"])
        )
        layer = cache.layers[0]
        if kind == "append" or not slow.seen:
            count = data.draw(st.sampled_from([1, 1, 2, 5]))
            query, key, value = (
                torch.randn(rows, heads, count, DIM, generator=generator) for heads in (KV * GROUP, KV, KV)
            )
            real = torch.rand(rows, count, generator=generator) < data.draw(st.sampled_from([1.0, 0.6]))
            wanted = slow.append(
                query.double().numpy(), key.double().numpy(), value.double().numpy(), real, 0.5, window
            )
            everything = torch.tensor(slow.real)
            padding = None if bool(everything.all()) else everything
            cache.update(key, value, 0)
            got, _ = managed_attention(
                torch.nn.Identity(), query, key, value, padding, scaling=0.5, sliding_window=window
            )
            got = torch.where(real[:, None, :, None], got.transpose(1, 2), 0.0)
            np.testing.assert_allclose(got.numpy(), wanted, atol=2e-5)
        elif kind in ("decide", "keep"):
            keep = torch.rand(layer.slots.shape, generator=generator) < data.draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
            decay = -torch.rand(layer.slots.shape, generator=generator) if kind == "decide" else None
            by_token = [np.zeros((rows, KV, slow.seen)) for _ in range(2)]
            for row, head, at in (layer.slots >= 0).nonzero().tolist():
                token = int(layer.slots[row, head, at])
                by_token[0][row, head, token] = keep[row, head, at]
                by_token[1][row, head, token] = 0 if decay is None else decay[row, head, at]
            slow.decide(by_token[0].astype(bool), None if decay is None else by_token[1])
            if kind == "keep":
                cache.keep([keep])
            else:
                layer.apply(Decision(keep & (layer.slots >= 0), decay))
            evicted = True
        elif kind == "rows":
            index = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=3))
            slow.rows(index)
            data.draw(st.sampled_from([cache.reorder_cache, cache.batch_select_indices]))(torch.tensor(index))
        elif kind == "repeat" and rows < 3:
            slow.rows([row for row in range(rows) for _ in range(2)])
            cache.batch_repeat_interleave(2)
        elif kind == "crop":
            length = data.draw(st.integers(1, slow.seen))
            cache.crop(length if data.draw(st.booleans()) else length - slow.seen)
            slow.crop(length)
        elif kind == "clone":
            old, cache = cache, cache.clone()
            old.keep([torch.zeros_like(layer.slots, dtype=torch.bool)])
            old.reset()
        check_equal(cache, slow)
    assert evicted or cache.layers[0].decays is None


# ---- on real models --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return tiny("llama", layers=2)


def batch_of(model, *lengths: int, seed: int = 0) -> Batch:
    return Batch.of(random_rows(model, list(lengths), seed))


@pytest.mark.parametrize("spec", ["full", "h2o(budget=9, every=8)"])
@pytest.mark.parametrize("at", [5, 14])
def test_crop_then_other_tokens_equals_never_having_read_them(model, spec: str, at: int) -> None:
    manager = build(spec)
    one, other = batch_of(model, 20, 15, seed=1), batch_of(model, 20, 15, seed=2)
    # The same as `one` up to the crop, then tokens of `other`; the crop is not before the last decision.
    at = at if spec == "full" else 18
    mixed = Batch(torch.cat((one.ids[:, :at], other.ids[:, at:]), 1), one.real, one.positions)
    with attached(model):
        cropped, fresh = (SlotCache.for_model(model, manager) for _ in range(2))
        read(model, cropped, one)
        cropped.crop(at - 20)
        got = read(model, cropped, mixed, at=at)
        wanted = read(model, fresh, mixed)[:, at:]
    if spec == "full":
        same_logits("after a crop", got, wanted, one.real[:, at:])
    assert cropped.get_seq_length() == 20


def test_crop_follows_transformers(model) -> None:
    with attached(model):
        cache = SlotCache.for_model(model, Full())
        read(model, cache, batch_of(model, 10))
        cache.crop(0)
        assert cache.get_seq_length() == 10
        cache.crop(-3)
        assert cache.get_seq_length() == 7
        assert cache.layers[0].keys.shape[2] == 7
        cache.crop(-99)
        assert cache.get_seq_length() == 0
        read(model, cache, batch_of(model, 6, seed=4))
        assert cache.get_seq_length() == 6


def test_crop_that_would_be_wrong_is_refused(model) -> None:
    with attached(model):
        cache = SlotCache.for_model(model, build("snapkv(window=4)", budget=8))
        with cache.reading():
            read(model, cache, batch_of(model, 10))
            assert not cache.is_croppable
            with pytest.raises(CacheError, match="window_attention:4"):
                cache.crop(-1)


@pytest.mark.parametrize("spec", ["knorm(budget=6)", "h2o(budget=9, every=8)", "expected_attention(budget=9, every=7)"])
def test_rows_after_reordering_go_on_as_their_sources(model, spec: str) -> None:
    manager = build(spec)
    batch = batch_of(model, 21, 14, 18)
    index = torch.tensor([2, 0, 0, 1])
    more = random_rows(model, [9] * 4, 5)
    ones = torch.ones(4, 9, dtype=torch.bool)
    real = torch.cat((batch.real[index], ones), 1)
    grown = Batch(torch.cat((batch.ids[index], torch.stack(more)), 1), real, (real.long().cumsum(1) - 1).clamp(min=0))
    with attached(model):
        cache = SlotCache.for_model(model, manager)
        read(model, cache, batch)
        cache.batch_select_indices(index)
        got = read(model, cache, grown, at=21)
        for row in range(4):
            alone = SlotCache.for_model(model, manager)
            single = grown.row(row)
            wanted = read(model, alone, single, [single.ids.shape[1] - 9, 9])[:, -9:]
            same_logits(f"row {row}", got[row : row + 1], wanted)
            same_kept_tokens(f"row {row}", kept(cache, row), kept(alone, 0))


def test_clone_goes_on_by_itself(model) -> None:
    manager = build("h2o(budget=9, every=8)")
    batch, other = batch_of(model, 30, 25, seed=1), batch_of(model, 30, 25, seed=2)
    with attached(model):
        cache = SlotCache.for_model(model, manager)
        read(model, cache, batch, [13])
        first, second = cache.clone(), copy.deepcopy(cache)
        read(model, second, other, at=13)  # must not touch the others
        wanted = read(model, cache, batch, at=13)
        got = read(model, first, batch, at=13)
    assert torch.equal(got, wanted)
    assert first.bytes_peak == cache.bytes_peak
    assert first.bytes_mean == cache.bytes_mean


def tensors_of(cache: SlotCache) -> list[torch.Tensor]:
    found = []
    for layer in cache.layers:
        found += [v for v in vars(layer).values() if isinstance(v, torch.Tensor)]
        states = (layer.recorder.slotwise, layer.recorder.rowwise, layer.recorder.flat)
        found += [v for held in (layer.storage.even, layer.storage.flat, *states) for v in held.values()]
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("spec", ["full", "knorm(budget=6)", "h2o(budget=9, every=8)", "snapkv(window=4, budget=5)"])
def test_bytes_are_those_of_the_tensors_held(family: str, spec: str) -> None:
    model = tiny(family, layers=2)
    batch = batch_of(model, 25, 25)
    with attached(model):
        cache = SlotCache.for_model(model, build(spec))
        assert cache.nbytes() == 0
        sizes = []
        for end in (20, 21, 22, 23, 24, 25):
            read(model, cache, batch, [end - cache.get_seq_length()], at=cache.get_seq_length())
            starts = [layer.start for layer in cache.layers]
            kept = [t for t in tensors_of(cache) if not any(t is s for s in starts)]
            assert cache.nbytes() == sum(t.numel() * t.element_size() for t in kept)
            # No tensor keeps a larger one alive, so what was evicted is freed.
            assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in kept)
            sizes.append(cache.nbytes())
    if spec == "full":
        assert cache.bytes_peak == sizes[-1]
        grown = [0, *sizes]
        means = [(a + b) / 2 for a, b in itertools.pairwise(grown)]
        assert cache.bytes_mean == pytest.approx((20 * means[0] + sum(means[1:])) / 25)
    assert max(sizes) <= cache.bytes_peak
    assert cache.bytes_mean <= cache.bytes_peak


@pytest.mark.parametrize("spec", ["full", "knorm(budget=6, every=5)", "streaming_llm(budget=5, every=8)"])
def test_bytes_do_not_depend_on_the_pieces(model, spec: str) -> None:
    batch = batch_of(model, 25)
    measured = []
    with attached(model):
        for pieces in ([25], [1] * 25, [8, 3, 14]):
            cache = SlotCache.for_model(model, build(spec))
            read(model, cache, batch, pieces)
            measured.append((cache.bytes_peak, round(cache.bytes_mean, 3), cache.nbytes()))
    assert len(set(measured)) == 1


def test_evicted_tensors_are_freed(model) -> None:
    seen: list[weakref.ref] = []

    class Watching(KNorm):
        def decide(self, view: LayerView) -> Decision:
            seen.extend((weakref.ref(view.keys), weakref.ref(view.values)))
            return super().decide(view)

    with attached(model):
        cache = SlotCache.for_model(model, Watching(budget=4))
        read(model, cache, batch_of(model, 30))
        assert len(seen) == 4
        assert all(reference() is None for reference in seen)
        assert [int(n) for layer in cache.slots_held() for n in layer.flatten()] == [4] * 4


def test_row_of_only_padding_changes_nothing_and_can_start_later(model) -> None:
    manager = build("h2o(budget=7, every=6)")
    batch = batch_of(model, 14, 0)
    tail = batch_of(model, 10, 10, seed=3)
    real = torch.cat((batch.real, tail.real), 1)
    grown = Batch(torch.cat((batch.ids, tail.ids), 1), real, (real.long().cumsum(1) - 1).clamp(min=0))
    with attached(model):
        cache = SlotCache.for_model(model, manager)
        logits = read(model, cache, grown, [14, 3, 7])
        assert logits.isfinite().all()
        for row in (0, 1):
            alone = SlotCache.for_model(model, manager)
            single = grown.row(row)
            wanted = read(model, alone, single)
            same_logits(f"row {row}", logits[row : row + 1, -single.ids.shape[1] :], wanted)
            same_kept_tokens(f"row {row}", kept(cache, row), kept(alone, 0))


@pytest.mark.parametrize("spec", ["full", "knorm(budget=8)", "streaming_llm(budget=8, every=6)"])
def test_mask_that_hides_a_token_later_is_obeyed(model, spec: str) -> None:
    """As with the stock cache: the caller may hide what was visible when it was read."""
    batch = batch_of(model, 16)
    mask = torch.ones(1, 16, dtype=torch.long)
    mask[:, :9] = 0
    with attached(model):
        cache = SlotCache.for_model(model, build(spec))
        read(model, cache, batch, [15])
        hiding = cache.clone()
        hiding.keep([layer.slots >= 9 for layer in hiding.layers])
        wanted = read(model, hiding, batch, at=15)
        got = model(batch.ids[:, 15:], attention_mask=mask, position_ids=batch.positions[:, 15:], past_key_values=cache)
    same_logits("hidden later", got.logits, wanted)


def test_admission_counts_only_what_arrived_since_the_rows_last_turn(model) -> None:
    seen: list[tuple[int, int]] = []

    class Counting(KNorm):
        def decide(self, view: LayerView) -> Decision:
            seen.append((view.seen, view.fresh))
            return super().decide(view)

    with attached(model):
        cache = SlotCache.for_model(model, Counting(budget=6, every=8))
        read(model, cache, batch_of(model, 20, 17), [20])
    assert seen[: len(seen) // 2] == [(8, 8), (11, 8), (16, 8), (19, 8)]
