"""Saved caches of others: another model, contradictions, damage and odd places are named, and nothing gets through."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from evomem.errors import CacheError, EvomemError, PluginError
from evomem.managers import build
from evomem.plugins import load_cache, save_cache, saved_cache
from evomem.testing.comparing import random_rows, read
from evomem.testing.models import tiny
from evomem.testing.reference import Batch


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny("llama", layers=2)


@pytest.fixture(scope="module")
def batch(model) -> Batch:
    return Batch.of(random_rows(model, [61, 44], 0))


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
