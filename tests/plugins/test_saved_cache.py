"""A context that was read, in a file: it goes on to the bit, elsewhere too; what is not right with it is said."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from evomem.errors import CacheError, EvomemError, PluginError
from evomem.evaluation.population import Recording
from evomem.managers import build
from evomem.memory import SlotCache, attached
from evomem.memory.kv.snapshot import COUNTS, MAYBE, NUMBERS, TENSORS
from evomem.plugins import load_cache, save_cache, saved_cache
from evomem.testing.comparing import greedy, random_rows, read
from evomem.testing.models import tiny
from evomem.testing.pretend import PretendDevices
from evomem.testing.reference import Batch

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
        "awaiting",
        "_sums",
        "decides_now",
        "owing",  # then nothing is saved
        "refused",  # nor then
    }  # of manager and model; of one pass
    assert whole <= {"layer_class_to_replicate", "offloading", "only_non_sliding", "prefetch_stream"}
    assert set(vars(cache.layers[0].recorder)) == {"wanted", "slotwise", "rowwise", "window", "begin", "flat"}


SCRIPT = """
import sys, torch
from evomem.plugins import load_cache
from evomem.testing.comparing import greedy
from evomem.testing.models import tiny
model = tiny("llama", layers=2)
cache = load_cache(sys.argv[1], model)
with cache.policy.attach(model):
    print(greedy(model, cache, torch.tensor([[int(i) for i in sys.argv[2].split()]]), 6).tolist())
"""


def test_another_process_answers_from_the_file(model, tmp_path: Path) -> None:
    context, *questions = random_rows(model, [40, 6, 6], 3)
    manager = build("h2o(budget=14, every=16)")
    with manager.attach(model) as cache:
        read(model, cache, Batch.of([context]))
        save_cache(cache, tmp_path / "context")
        for question in questions[:1]:
            ids = torch.cat((context, question))[None]
            command = [sys.executable, "-c", SCRIPT, str(tmp_path / "context"), " ".join(map(str, ids[0].tolist()))]
            said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
            assert json.loads(said.stdout) == greedy(model, cache.clone(), ids, 6).tolist()


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


# ---- files of others -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "context.safetensors"
    with build("feature_scorer(budget=14, every=16)").attach(model) as cache:
        read(model, cache, Batch.of(random_rows(model, [50, 50], 5)), [50])
        save_cache(cache, path)
    return path


@pytest.fixture(scope="module")
def ragged(model, tmp_path_factory) -> Path:
    """Of heads that hold differently many slots, and two tokens that came after."""
    path = tmp_path_factory.mktemp("saved") / "ragged.safetensors"
    with build("adakv(feature_scorer, budget=14, every=16)").attach(model) as cache:
        read(model, cache, Batch.of(random_rows(model, [50, 41], 5)), [48, 1, 1])
        assert all(layer.storage.layout is not None for layer in cache.layers)
        save_cache(cache, path)
    return path


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: tiny("llama", layers=2, seed=1), "other weights"),
        (lambda: tiny("llama", layers=3), "another configuration"),
        (lambda: tiny("llama", layers=2, rms_norm_eps=1e-3), "another configuration"),
        (lambda: tiny("mistral", layers=2), "another class"),
        (lambda: tiny("llama", layers=2).bfloat16(), "another type"),
    ],
)
def test_another_model_is_refused(good: Path, other: Callable[[], PreTrainedModel], message: str) -> None:
    with pytest.raises(CacheError, match=message):
        load_cache(good, other())


def forged(path: Path, target: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> Path:
    """A file with other content and the right digest."""
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["evomem"])
    tensors = load_file(path)
    change(facts, tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    facts["digest"] = saved_cache._digest(facts, {name: saved_cache._sum(tensor) for name, tensor in tensors.items()})
    save_file(tensors, target, {"evomem": json.dumps(facts)})
    return target


def _layer(name: str, value: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda facts, tensors: facts["cache"]["layers"][1].update({name: value})


def _tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda facts, tensors: tensors.update({name: change(tensors[name])})


FORGERIES: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], Any]] = {
    "schema_version: 2 is unknown": lambda f, t: f.update(schema_version=2),
    "has other fields than a saved cache": lambda f, t: f.update(more=1),
    "model: is not what": lambda f, t: f.update(model=[]),
    "manager: unknown manager 'evil'": lambda f, t: f["manager"].update(manager="evil"),
    "options: budget": lambda f, t: f["manager"]["options"].update(budget=-3),
    "weights: is missing": lambda f, t: t.pop("manager.weights"),
    "more: is not a tensor of manager": lambda f, t: t.update({"manager.more": torch.zeros(2)}),
    "layers: are not 2": lambda f, t: f["cache"]["layers"].pop(),
    "layer 1: has other fields": _layer("more", 1),
    "layer 1: seen: is no count": _layer("seen", -1),
    "layer 1: scale: is no finite number": _layer("scale", "1"),
    "layer 1: dense: is no truth value": _layer("dense", 1),
    "layer 1: decided: is after": _layer("decided", 51),
    "dense says so": _layer("dense", True),
    "1.keys: is no": _tensor("1.keys", lambda t: t[0]),
    "1.values: has shape": _tensor("1.values", lambda t: t[:1]),
    "1.values: has shape or type": _tensor("1.values", lambda t: t.long()),
    "0.slots: are not the ascending": _tensor("0.slots", lambda t: t.flip(-1)),
    "0.slots: are not the ascending indices": _tensor("0.slots", lambda t: t + 40),
    "0.start: is outside": _tensor("0.start", lambda t: t - 1),
    "0.slotwise.attention_sum: is missing": lambda f, t: t.pop("0.slotwise.attention_sum"),
    "0.slotwise.columns: has shape": _tensor("0.slotwise.columns", lambda t: t[..., :-1]),
    "0.rowwise.queries: is missing": lambda f, t: t.pop("0.rowwise.queries"),
    "0.rowwise.queries: are not the newest": _tensor("0.rowwise.queries", lambda t: t[:, :3]),
    "0.more: is nothing that": lambda f, t: t.update({"0.more": torch.zeros(2)}),
    "9.keys: is of none": lambda f, t: t.update({"9.keys": torch.zeros(2)}),
    "keys: is no tensor of a cache": lambda f, t: t.update({"keys": torch.zeros(2)}),
    "layer 1: has read other tokens or rows": lambda f, t: [
        t.update({n: x[:1] for n, x in t.items() if n.startswith("1.")})
    ],
}


FLAT_FORGERIES: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], Any]] = {
    "0.lengths: is missing": lambda f, t: t.pop("0.lengths"),
    "0.lengths: has shape": _tensor("0.lengths", lambda t: t[:1]),
    "0.lengths: are not those of tokens": _tensor("0.lengths", lambda t: t - 60),
    "1.flat.keys: is missing": lambda f, t: t.pop("1.flat.keys"),
    "1.flat.keys: has shape": _tensor("1.flat.keys", lambda t: t[1:]),
    "1.flat.values: has shape": _tensor("1.flat.values", lambda t: t.double()),
    "0.flat.slotwise.attention_sum: is missing": lambda f, t: t.pop("0.flat.slotwise.attention_sum"),
    "0.flat.start: is nothing that": lambda f, t: t.update({"0.flat.start": t["0.start"].clone()}),
    "0.flat.slots: are of no token": _tensor("0.flat.slots", lambda t: t + 50),
    "0.flat.slots: are not the ascending": _tensor("0.flat.slots", lambda t: t.flip(0)),
    "0.slots: are not the ascending indices after": _tensor("0.slots", lambda t: t - 40),
    "have empty ones, and aligned says no": _layer("aligned", True),
    "are not all tokens, and dense": _layer("dense", True),
}


ALL_FORGERIES = FORGERIES | FLAT_FORGERIES


@pytest.mark.parametrize("message", ALL_FORGERIES)
def test_contradictions_are_named(message: str, good: Path, ragged: Path, model, tmp_path: Path) -> None:
    path = forged(ragged if message in FLAT_FORGERIES else good, tmp_path / "forged", ALL_FORGERIES[message])
    with pytest.raises((CacheError, PluginError), match=rf"forged: .*{message}"):
        load_cache(path, model)


def test_damage_never_gets_through(good: Path, model, tmp_path: Path) -> None:
    content, path = good.read_bytes(), tmp_path / "damaged"
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(len(content), (60,), generator=generator).tolist()
    header = torch.randint(8 + int.from_bytes(content[:8], "little"), (60,), generator=generator).tolist()
    damaged = [content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :] for at in places + header]
    damaged += [content[:at] for at in (0, 7, 8, 100, len(content) // 2, len(content) - 1)]
    damaged += [content + b"\0", (2**63).to_bytes(8, "little") + content[8:], b"[" * 100_000, pickle.dumps([1])]
    for one in damaged:
        path.write_bytes(one)
        with pytest.raises(EvomemError, match="damaged"):
            load_cache(path, model)


def test_places(good: Path, model, batch: Batch, tmp_path: Path) -> None:
    for place, message in ((tmp_path / "none", "No such file"), (tmp_path, "directory|no regular file")):
        with pytest.raises(CacheError, match=message):
            load_cache(place, model)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CacheError, match="no regular file"):
        load_cache(tmp_path / "pipe", model)
    with pytest.raises(CacheError, match="at most 10 are read"):
        load_cache(good, model, limit=10)
    with pytest.raises(CacheError, match="cannot be read"):
        load_cache("nul\0", model)
    with build("full").attach(model) as cache:
        read(model, cache, batch)
        mine = tmp_path / "mine.txt"
        mine.write_text("precious")
        with pytest.raises(CacheError, match="is no saved cache; choose another"):
            save_cache(cache, mine)
        assert mine.read_text() == "precious"
        for _ in range(2):  # one that is there is replaced
            save_cache(cache, tmp_path / "again")
        with pytest.raises(CacheError, match="cannot be written"):
            save_cache(cache, mine / "below")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "mine.txt", "pipe"]


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
