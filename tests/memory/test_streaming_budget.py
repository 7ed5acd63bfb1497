"""Layers that share a growing budget unequally hold it exactly, in a model: rows, pieces, copies, files, crops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from evomem.errors import CacheError
from evomem.evaluation import EvaluationProtocol, Evaluator
from evomem.managers import MemoryManager, build
from evomem.managers.vector import load_vector, vector_size
from evomem.memory import SlotCache
from evomem.memory.kv.snapshot import Snapshot, put, take
from evomem.models import LoadedModel
from evomem.plugins import load_cache, save_cache
from evomem.testing.conformance import run_check
from evomem.testing.models import tiny, tiny_tokenizer
from tests.evaluation.test_evaluation import TASK, make_sample

EVERY, BUDGET = 8, 0.4
STEEP = "depth_shares(log_shares=[3, -3])"
ENDS = "features=[keydiff],sinks=2,recent=3"
SPECS = (
    f"feature_scorer({ENDS},allocation={STEEP})",
    f"feature_scorer({ENDS},allocation=across_heads(layers={STEEP}, safeguard=0.5))",
    f"feature_scorer({ENDS},allocation=3)",
    f"kv_policy({ENDS},allocation=3)",
    f"adakv(feature_scorer({ENDS},allocation=3))",
    "snapkv(window=4,allocation=pyramid(beta=9))",
    "keydiff(allocation=across_heads)",
)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


def manager(spec: str, **options: Any) -> MemoryManager:
    made = build(spec, **{"budget": BUDGET, "every": EVERY, **options}).requires_grad_(False)
    for name, parameter in made.named_parameters():
        if name.endswith("log_shares"):
            parameter.copy_(torch.tensor([3.0, 0.0, -3.0]))
    return made


def tokens(count: int, rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(5, 120, (rows, count), generator=torch.Generator().manual_seed(seed))


def held(cache: SlotCache) -> list[Tensor]:
    return [layer.slots for layer in cache.layers]


def total(cache: SlotCache) -> list[int]:
    return sum(slots.sum(-1) for slots in cache.slots_held()).tolist()


def due(read: int) -> int:
    """Slots in all, after a decision at so many tokens."""
    return 3 * 2 * math.ceil(BUDGET * read - 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("spec", SPECS)
def test_the_budget_is_held_at_every_decision_however_it_is_read(spec: str, model: Any) -> None:
    """Read up to every decision, and past them all in passes of any length, in a padded batch: the same slots."""
    made, ids = manager(spec), tokens(48, 2)
    with made.attach(model) as cache:
        for place in range(6):
            model(ids[:, EVERY * place : EVERY * (place + 1)], past_key_values=cache)
            assert total(cache) == [due(EVERY * (place + 1))] * 2
        for pieces in ([48], [3, 30, 1, 14]):
            other = made.new_cache(model)
            for piece in ids.split(pieces, 1):
                model(piece, past_key_values=other)
            assert all(map(torch.equal, held(other), held(cache)))
        padded, real = made.new_cache(model), torch.ones(2, 51, dtype=torch.int64)
        real[0, :3] = 0
        shifted = torch.cat((tokens(3, 2, 7), ids), 1)
        for begin, end in ((0, 20), (20, 21), (21, 51)):
            model(shifted[:, begin:end], past_key_values=padded, attention_mask=real[:, :end])
        row = [[slots[slots >= 0] - 3 for slots in layer.slots[0]] for layer in padded.layers]
        alone = [[slots[slots >= 0] for slots in layer.slots[0]] for layer in cache.layers]
        assert all(
            torch.equal(a, b) for mine, own in zip(row, alone, strict=True) for a, b in zip(mine, own, strict=True)
        )


@torch.no_grad()
@pytest.mark.parametrize("spec", SPECS[:3])
def test_what_left_goes_with_rows_copies_and_files(spec: str, model: Any, tmp_path: Any) -> None:
    """Saved between two decisions and read again, copied, reordered: the same slots to the bit from there on."""
    made, real = manager(spec), torch.ones(2, 48, dtype=torch.int64)
    real[1, :5] = 0
    with made.attach(model) as cache:
        model(
            tokens(19, 2), past_key_values=cache, attention_mask=real[:, :19]
        )  # row 0 decided at 16 tokens, row 1 at 8
        assert (cache.layers[0].evicted[0] != cache.layers[0].evicted[1]).any()
        save_cache(cache, tmp_path / "context.safetensors")
        copies = [cache.clone(), load_cache(tmp_path / "context.safetensors", model)]
        swapped = cache.clone()
        swapped.reorder_cache(torch.tensor([1, 0]))
        assert torch.equal(swapped.layers[1].evicted, cache.layers[1].evicted.flip(0))
        rest = tokens(29, 2, 1)
        wanted = model(rest, past_key_values=cache, attention_mask=real).logits
        for copy in copies:
            assert torch.equal(model(rest, past_key_values=copy, attention_mask=real).logits, wanted)
            assert all(map(torch.equal, held(copy), held(cache)))
        model(rest.flip(0), past_key_values=swapped, attention_mask=real.flip(0))
        assert total(swapped) == total(cache)[::-1]


@torch.no_grad()
def test_a_file_from_before_decisions_counted_is_counted(model: Any) -> None:
    made = manager(SPECS[0])
    with made.attach(model) as cache:
        model(tokens(21), past_key_values=cache)
        snapshot = take(cache)
        older = {name: tensor for name, tensor in snapshot.tensors.items() if not name.endswith("evicted")}
        assert len(older) == len(snapshot.tensors) - 3
        other = made.new_cache(model)
        put(Snapshot(snapshot.facts, older), other, [torch.device("cpu")] * 3)
        assert all(map(torch.equal, (x.evicted for x in other.layers), (x.evicted for x in cache.layers)))
        wrong = snapshot.tensors | {"1.evicted": snapshot.tensors["1.evicted"] + 99}
        with pytest.raises(CacheError, match=r"1.evicted: is outside"):
            put(Snapshot(snapshot.facts, wrong), made.new_cache(model), [torch.device("cpu")] * 3)


@torch.no_grad()
def test_after_a_crop_the_budget_is_held_again(model: Any) -> None:
    """Cropping tokens that no decision saw changes nothing; of others, heads lose what they lose, and it is counted."""
    made = manager(SPECS[0])
    with made.attach(model) as cache:
        model(tokens(24), past_key_values=cache)
        never = cache.clone()
        model(tokens(5, seed=3), past_key_values=cache)
        cache.crop(-5)
        assert all(torch.equal(x.evicted, y.evicted) for x, y in zip(cache.layers, never.layers, strict=True))
        for one in (cache, never):
            model(tokens(8, seed=4), past_key_values=one)
            assert total(one) == [due(32)]
        assert all(map(torch.equal, held(cache), held(never)))
        cache.crop(-4)
        for layer in cache.layers:
            counts = [(28 - (other.slots >= 0).sum(-1).sum(-1) // 2).tolist() for other in cache.layers]
            assert layer.evicted.transpose(0, 1).tolist() == counts
        model(tokens(20, seed=5), past_key_values=cache)
        assert due(48) - 6 <= total(cache)[0] <= due(48)


@torch.no_grad()
def test_masks_that_a_program_gives_are_counted(model: Any) -> None:
    made = manager(SPECS[0])
    with made.attach(model) as cache:
        model(tokens(7), past_key_values=cache)
        cache.keep([layer.slots >= 4 - layer.index for layer in cache.layers])
        assert cache.layers[2].evicted.tolist() == [[4, 3, 2]]
        model(tokens(17, seed=1), past_key_values=cache)
        assert total(cache) == [due(24)]


@torch.no_grad()
def test_turns_of_a_chat_hold_the_share_of_all_that_was_read(model: Any) -> None:
    """Deciding once a reading, several readings on one cache."""
    made = manager(SPECS[0], every=None)
    with made.attach(model) as cache:
        read = 0
        for turn in range(4):
            model(tokens(11, seed=turn), past_key_values=cache)
            read += 11
            assert total(cache) == [due(read)]


def test_the_evaluator_equals_the_plain_way(model: Any) -> None:
    """Candidates with shares of their own through vmap, and one that counts nothing among them."""
    evaluator = Evaluator(
        LoadedModel("llama", model, tiny_tokenizer(), "llama"), EvaluationProtocol(kind="streaming", every=EVERY)
    )
    crowd = [manager(SPECS[2]) for _ in range(3)] + [manager("keydiff"), manager(SPECS[0])]
    for place, made in enumerate(crowd[1:3]):
        load_vector(made, torch.linspace(-2, 2, vector_size(made)).numpy() * (1 - 2 * place))
    sample = make_sample()
    together = evaluator.evaluate(crowd, sample, TASK)
    for made, one in zip(crowd, together, strict=True):
        plain = evaluator.evaluate_plainly(made, sample, TASK)
        assert one.slots == pytest.approx(plain.slots)
        assert one.loglik == pytest.approx(plain.loglik, abs=1e-5)


@pytest.mark.parametrize("check", ["row_alone", "chunks", "continuation", "beams", "evicted_is_hidden"])
def test_conformance(check: str, model: Any) -> None:
    run_check(check, manager(SPECS[1], every=16), model)
