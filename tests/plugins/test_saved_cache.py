"""A context that was read, in a file: it goes on to the bit, elsewhere too; what is not right with it is said."""

from __future__ import annotations

import copy
import io
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from transformers import PreTrainedModel

from evomem.errors import CacheError
from evomem.evaluation.population import Recording
from evomem.managers import build
from evomem.memory import SlotCache, attached
from evomem.memory.kv.snapshot import COUNTS, MAYBE, NUMBERS, TENSORS
from evomem.plugins import load_cache, save_cache, saved_cache
from evomem.testing.comparing import greedy, random_rows, read
from evomem.testing.models import tiny
from evomem.testing.pretend import PretendDevices
from evomem.testing.reference import Batch
from tests.support.processes import elsewhere

SPECS = (
    "full", "knorm(budget=12)", "h2o(budget=14, every=16)", "observed_attention(budget=20)", "namm(every=16)",
    "snapkv(window=8, budget=20)", "snapkv(window=8, budget=20, every=16)", "feature_scorer(budget=14, every=16)",
    "kv_policy(budget=20, every=16, actions=[evict, store, forget])", "expected_attention(budget=14, every=16)",
    "expected_attention(budget=14)", "adakv(h2o, budget=20)", "tova(budget=10, every=20)",
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny("llama", layers=2)


@pytest.fixture(scope="module")
def batch(model) -> Batch:
    return Batch.of(random_rows(model, [61, 44], 0))


def measures(cache: SlotCache) -> tuple[Any, ...]:
    return cache.nbytes(), cache.bytes_peak, cache.bytes_mean, [layer.slots.tolist() for layer in cache.layers]


@pytest.mark.parametrize("spec", SPECS)
def test_a_loaded_cache_goes_on_to_the_bit(spec: str, model, batch: Batch, tmp_path: Path) -> None:
    """Between any two passes, also in the middle of what a manager observes before it decides."""
    path, manager = tmp_path / "context.safetensors", build(spec)
    cuts = [0, 21, 30, 53, 54, 61]
    with manager.attach(model) as cache:
        for begin, end in pairwise(cuts):
            loaded = None
            if begin in (21, 53):
                save_cache(cache, path)
                loaded, before = load_cache(path, model), cache.clone()
                assert loaded.policy.describe() == manager.describe()
                assert measures(loaded) == measures(cache)
            part = Batch(batch.ids[:, :end], batch.real[:, :end], batch.positions[:, :end])
            logits = read(model, cache, part, at=begin)
            if loaded is not None:
                assert torch.equal(read(model, loaded, part, at=begin), logits)
                assert measures(loaded) == measures(cache)
        answers = [greedy(model, one, batch.ids, 4, batch.real) for one in (load_cache(path, model), before)]
        assert torch.equal(*answers)


@pytest.mark.parametrize("length", [25, 3, -99])
@pytest.mark.parametrize("spec", ["h2o(budget=9)", "keydiff(budget=0.2, allocation=pyramid(beta=8))"])
def test_a_cropped_cache_is_saved_and_goes_on_as_it_would_have(spec: str, length: int, model, tmp_path: Path) -> None:
    """Back to before the last reading began, into a row's padding, and to nothing."""
    batch = Batch.of(random_rows(model, [50, 16], 3))
    with build(spec).attach(model) as cache:
        read(model, cache, batch, [30, 1, 9])
        cache.crop(length)
        at = max(length, 0)
        assert cache.layers[0].starts == ((0, at) if at else ())
        save_cache(cache, tmp_path / "c")
        loaded = load_cache(tmp_path / "c", model)
        assert torch.equal(read(model, loaded, batch, [5, 1, 6], at=at), read(model, cache, batch, [5, 1, 6], at=at))
        assert all(torch.equal(one.slots, other.slots) for one, other in zip(loaded.layers, cache.layers, strict=True))


def test_rows_that_go_take_their_part_of_a_frame_with_them(model, tmp_path: Path) -> None:
    """More queries of the row that is gone waited for its next frame than of the one that stays."""
    batch = Batch.of(random_rows(model, [45, 38], 3))
    with build("namm(every=8)").attach(model) as cache:
        read(model, cache, batch, [39])
        cache.batch_select_indices(torch.tensor([1]))
        save_cache(cache, tmp_path / "c")
        loaded = load_cache(tmp_path / "c", model)
        rest = Batch(batch.ids[1:], batch.real[1:], batch.positions[1:])
        assert torch.equal(read(model, loaded, rest, [1, 5], at=39), read(model, cache, rest, [1, 5], at=39))
        assert measures(loaded) == measures(cache)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_windows_and_softcaps_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny("mistral", layers=2, sliding_window=9).to(dtype)
    batch = Batch.of(random_rows(model, [40, 31], 0))
    for spec in ("h2o(budget=14, every=16)", "snapkv(window=8, budget=20, every=32)"):
        with build(spec).attach(model) as cache:
            read(model, cache, batch, [25, 10])
            save_cache(cache, tmp_path / "c")
            loaded = load_cache(tmp_path / "c", model)
            assert torch.equal(read(model, loaded, batch, at=35), read(model, cache, batch, at=35))
            assert measures(loaded) == measures(cache)


def test_a_cache_that_was_read_under_autocast_goes_on_under_it(model, batch: Batch, tmp_path: Path) -> None:
    with build("h2o(budget=14, every=16)").attach(model) as cache, torch.autocast("cpu", torch.bfloat16):
        read(model, cache, batch, [40])
        save_cache(cache, tmp_path / "c")
        loaded = load_cache(tmp_path / "c", model)
        assert torch.equal(read(model, loaded, batch, at=40), read(model, cache, batch, at=40))


def test_empty_caches_and_unfinished_readings(model, batch: Batch, tmp_path: Path) -> None:
    path, manager = tmp_path / "sub" / "context.safetensors", build("snapkv(window=8, budget=12)")
    with manager.attach(model) as cache:
        save_cache(cache, path)
        wanted = read(model, cache, batch)
        assert torch.equal(read(model, load_cache(path, model), batch), wanted)
        cache = manager.new_cache(model)
        with cache.reading():
            read(model, cache, batch, [20])
            save_cache(cache, path)
            read(model, cache, batch, at=20)
        other = load_cache(path, model)
        read(model, other, batch, at=20)
        assert int(other.slots_held()[0].max()) == 61  # the decision comes when the reading ends
        other.decide()
        assert [layer.slots.tolist() for layer in other.layers] == [layer.slots.tolist() for layer in cache.layers]


def test_every_part_of_the_state_is_saved_or_follows_from_what_is(model, batch: Batch) -> None:
    """A new attribute belongs into `evomem.memory.kv.snapshot`, or into this list of those that need not be saved."""
    with build("h2o(budget=14)").attach(model) as cache:
        read(model, cache, batch)
    layer = set(vars(cache.layers[0])) - {*COUNTS, *MAYBE, *NUMBERS, *TENSORS, "recorder", "storage"}
    assert set(vars(cache.layers[0].storage)) == {"even", "flat", "layout", "dense", "padded"}
    assert layer <= {
        "index",
        "_cache",
        "starts",
        "ahead",
        "pending",
        "is_initialized",
        "dtype",
        "device",
        "max_batch_size",
    }
    whole = set(vars(cache)) - {"layers", "decides_after_forward", "undecided", "bytes_peak", "policy", "_model"}
    whole -= {
        "wanted",
        "depth",
        "_limit",
        "_attentions",
        "rotaries",
        "centres",
        "awaiting",
        "_sums",
        "decides_now",
        "owing",  # then nothing is saved
        "refused",  # nor then
    }  # of manager and model; of one pass
    assert whole <= {"layer_class_to_replicate", "offloading", "only_non_sliding", "prefetch_stream"}
    assert set(vars(cache.layers[0].recorder)) == {"wanted", "slotwise", "rowwise", "window", "begin", "flat"}


def answered(folder: str, ids: torch.Tensor) -> list[list[int]]:
    """What a process says that has only the file."""
    model = tiny("llama", layers=2)
    cache = load_cache(folder, model)
    with cache.policy.attach(model):
        return greedy(model, cache, ids, 6).tolist()


def test_another_process_answers_from_the_file(model, tmp_path: Path) -> None:
    context, *questions = random_rows(model, [40, 6, 6], 3)
    manager = build("h2o(budget=14, every=16)")
    with manager.attach(model) as cache:
        read(model, cache, Batch.of([context]))
        save_cache(cache, tmp_path / "context")
        for question in questions[:1]:
            ids = torch.cat((context, question))[None]
            said = elsewhere(answered, str(tmp_path / "context"), ids)
            assert said == greedy(model, cache.clone(), ids, 6).tolist()


# ---- several questions, copies, pickles ------------------------------------------------------------------------------


def test_several_questions_about_one_context(model) -> None:
    """One after the other on clones, or as rows of one clone; the cache itself stays as it was."""
    context, *questions = random_rows(model, [40, 6, 6, 6], 3)
    manager = build("snapkv(window=8, budget=14)")
    with manager.attach(model) as cache:
        with cache.reading():
            read(model, cache, Batch.of([context]))
        before = measures(cache)
        wanted = []
        for question in questions:
            alone = manager.new_cache(model)
            with alone.reading():
                read(model, alone, Batch.of([context]))
            wanted.append(greedy(model, alone, torch.cat((context, question))[None], 5))
            for clone in (cache.clone(), copy.copy(cache), copy.deepcopy(cache)):
                assert torch.equal(greedy(model, clone, torch.cat((context, question))[None], 5), wanted[-1])
        rows = cache.clone()
        rows.batch_repeat_interleave(3)
        ids = torch.stack([torch.cat((context, question)) for question in questions])
        assert torch.equal(greedy(model, rows, ids, 5), torch.cat(wanted))
        assert measures(cache) == before
        with pytest.raises(CacheError, match=r"cache holds \(1, .*batch_repeat_interleave"):
            greedy(model, cache.clone(), ids, 5)


def test_pickling_names_what_to_do_instead(model, batch: Batch) -> None:
    with build("h2o(budget=14)").attach(model) as cache:
        read(model, cache, batch)
    for pickled in (pickle.dumps, lambda it: torch.save(it, io.BytesIO()), lambda it: pickle.dumps([it])):
        with pytest.raises(CacheError, match=r"save_cache\(cache, path\).*load_cache.*clone"):
            pickled(cache)
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(CacheError, match=r"cache\.clone\(\)"):
            copied(cache.layers[0])


def test_what_no_file_can_hold_is_refused(model, batch: Batch, tmp_path: Path, monkeypatch) -> None:
    with attached(model):
        watching = SlotCache.for_model(model, Recording())
        read(model, watching, batch)
    with pytest.raises(CacheError, match="decided about by Recording"):
        save_cache(watching, tmp_path / "c")
    with build("h2o(budget=14)").attach(model) as cache:
        read(model, cache, batch, [20])
        monkeypatch.setattr(model.model.layers[1], "forward", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            read(model, cache, batch, at=20)
    with pytest.raises(CacheError, match="cut short"):
        save_cache(cache, tmp_path / "c")
    other = tiny("llama", layers=2)
    with build("h2o(budget=14)").attach(other) as orphan:
        read(other, orphan, batch)
    del other
    with pytest.raises(CacheError, match="is gone"):
        save_cache(orphan, tmp_path / "c")
    save_cache(orphan, tmp_path / "c", model=tiny("llama", layers=2))
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_slots_come_back_onto_the_devices_of_their_layers(model, batch: Batch, tmp_path: Path) -> None:
    """The file says nothing about devices: it is the same to the byte, wherever the layers lay."""
    places = {
        "model.embed_tokens": "pretend:0", "model.rotary_emb": "pretend:0", "model.layers.0": "pretend:0",
        "model.layers.1": "pretend:1", "model.norm": "pretend:1", "lm_head": "pretend:1",
    }  # fmt: skip
    manager = build("h2o(budget=14, every=16)")
    with manager.attach(model) as cache:
        read(model, cache, Batch.of([batch.ids[0, :40]]))
        save_cache(cache, tmp_path / "here")
        wanted = read(model, cache, Batch.of([batch.ids[0]]), at=40)
    with PretendDevices(2), torch.no_grad():
        spread = dispatch_model(tiny("llama", layers=2), places)
        with manager.attach(spread, self_check=False) as cache:
            spread(batch.ids[:1, :40].to("pretend:0"), past_key_values=cache)
            save_cache(cache, tmp_path / "there")
        assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()
        loaded = load_cache(tmp_path / "here", spread)
        assert [str(layer.keys.device) for layer in loaded.layers] == ["pretend:0", "pretend:1"]
        with loaded.policy.attach(spread, self_check=False):
            logits = spread(batch.ids[:1, 40:].to("pretend:0"), past_key_values=loaded).logits
        assert torch.equal(logits.cpu(), wanted)


@pytest.mark.parametrize("shape", [(1,), (1, 1, 1), (2, 3), (0,), ()])
def test_tensors_of_any_stride_are_saved(shape: tuple[int, ...], tmp_path: Path) -> None:
    """A tensor of one number counts as contiguous whatever its stride is; saving one failed with torch's own error."""
    numbers = torch.arange(200).double()
    odd = torch.as_strided(numbers, shape, tuple(24 + axis for axis in range(len(shape))), 5)
    alone = torch.empty_strided((1,), (24,), dtype=torch.float64).fill_(5.0)
    plain = saved_cache._plain({"odd": odd, "again": odd, "alone": alone})
    for name, wanted in (("odd", odd), ("again", odd), ("alone", alone)):
        assert bytes(saved_cache._bytes(plain[name])) == wanted.numpy().tobytes()
        assert saved_cache._sum(plain[name])[1] == list(wanted.shape)


def test_a_cache_whose_heads_differ_is_saved_after_few_tokens(model, tmp_path: Path) -> None:
    """Heads of a few slots make tensors of one number, at the ends of larger ones."""
    ids = torch.randint(3, 60, (1, 24), generator=torch.Generator().manual_seed(0))
    for cut in range(5, 9):
        manager = build("expected_attention(budget=0.5, every=5, allocation=headkv)")
        with torch.no_grad(), manager.attach(model) as cache:
            model(input_ids=ids[:, :cut], past_key_values=cache)
            save_cache(cache, tmp_path / "cache")
            loaded = load_cache(tmp_path / "cache", model)
            ahead = [model(input_ids=ids[:, cut:], past_key_values=one).logits for one in (cache, loaded)]
        assert torch.equal(*ahead)
