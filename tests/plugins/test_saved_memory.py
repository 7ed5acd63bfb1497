"""A memory by itself in a file: it goes on in the middle of a stream to the bit, or is refused by a sentence."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import evomem
from evomem.errors import CacheError
from evomem.managers import build
from evomem.models.architectures.memory_matrix import MemoryMatrix, MemoryMatrixConfig
from evomem.plugins import load_cache, save_cache


def feed(cache, begin, count):
    draw = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 2, 60, 4, generator=draw)
    names = torch.randint(0, 20, (2, 2, 60), generator=draw)
    part = slice(begin, begin + count)
    cache.layers[0].feed(keys[:, :, part], values[:, :, part], names[:, :, part], absent=True)


@pytest.fixture
def saved(tmp_path):
    model = evomem.load_model("pair-memory").model
    features = ["recency", "frequency", "relevance:4", "surprise"]
    manager = build("feature_scorer", features=features, sinks=0, recent=1, budget=5)
    with torch.no_grad():
        manager.weights.normal_(generator=torch.Generator().manual_seed(0))
    cache = model.decided_cache(manager)
    feed(cache, 0, 30)
    cache.decide()
    feed(cache, 30, 7)
    save_cache(cache, tmp_path / "memory.safetensors", model=model)
    return tmp_path / "memory.safetensors", cache, model


def test_a_saved_memory_goes_on_to_the_bit(saved):
    path, cache, model = saved
    again = load_cache(path, model)
    for one in (cache, again):
        for begin in range(37, 60, 5):
            feed(one, begin, 5)
            one.decide()
    mine, theirs = (one.layers[0].view().tensors() for one in (cache, again))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    assert cache.layers[0].bytes_mean == again.layers[0].bytes_mean


def test_a_saved_memory_is_of_its_model(saved):
    path, _, _ = saved
    with pytest.raises(CacheError, match=r"pair-memory|model|config"):
        load_cache(path, evomem.load_model("pair-memory-soft").model)


def test_a_damaged_file_is_refused(saved, tmp_path):
    path, _, model = saved
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["0.even.slots"] = tensors["0.even.slots"] + 1
    save_file(tensors, tmp_path / "other.safetensors", metadata)
    with pytest.raises(CacheError, match="digest"):
        load_cache(tmp_path / "other.safetensors", model)
    facts = json.loads(metadata["evomem"])
    assert set(facts["cache"]) == {"memories"}


def test_a_memory_is_saved_for_the_model_that_has_read_it_only(saved, tmp_path):
    _, cache, _ = saved
    torch.manual_seed(0)
    other = MemoryMatrix(MemoryMatrixConfig(vocab_size=10, hidden_size=8, num_attention_heads=2, intermediate_size=8))
    for model, message in ((other, "MatrixRowsCache"), (torch.nn.Linear(1, 1), "is none")):
        with pytest.raises(CacheError, match=message):
            save_cache(cache, tmp_path / "wrong.safetensors", model=model)
    assert not (tmp_path / "wrong.safetensors").exists()
