"""What a plug-in is saved with it is loaded with, to the bit: types, tied tensors, default types and devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import PreTrainedModel

from evomem import plugins
from evomem.errors import PluginError
from evomem.managers import KeyDiff, MemoryManager, build, managers
from evomem.managers.vector import load_vector, to_vector, vector_size
from evomem.testing.comparing import random_rows, read
from evomem.testing.models import tiny
from evomem.testing.reference import Batch

KINDS = (
    "keydiff(budget=12)",
    "feature_scorer(budget=12, hidden=3, allocation=2, layers=2, heads=2)",
    "kv_policy(budget=12, hidden=4, actions=[evict, store, forget], allocation=2, scale=model)",
    "namm(budget=12, every=16)",
    "namm(budget=12, every=16, scorer=mlp, hidden=[6])",
    "namm(budget=12, every=16, scorer=linear)",
    "adakv(feature_scorer, budget=12)",
)
TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


def searched(spec: str) -> MemoryManager:
    manager = build(spec)
    load_vector(manager, 0.3 * np.random.default_rng(0).normal(size=vector_size(manager)))
    return manager


def same_bits(one: MemoryManager, other: MemoryManager) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return list(mine) == list(theirs) and all(
        a.dtype == theirs[name].dtype
        and torch.equal(a.contiguous().view(-1).view(torch.uint8), theirs[name].contiguous().view(-1).view(torch.uint8))
        for name, a in mine.items()
    )


@cache
def small() -> PreTrainedModel:
    return tiny("llama", layers=2)


def held(manager: MemoryManager) -> list[torch.Tensor]:
    model = small()
    with manager.attach(model) as memory:
        read(model, memory, Batch.of(random_rows(model, [40], 0)))
    return [layer.slots for layer in memory.layers]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("spec", KINDS)
def test_every_type_of_every_kind_comes_back_to_the_bit_and_decides(spec: str, dtype: torch.dtype, tmp_path) -> None:
    manager = searched(spec).to(dtype)
    plugins.save(manager, tmp_path / "plug")
    again = plugins.load(tmp_path / "plug")
    assert same_bits(manager, again)
    assert same_bits(manager.with_options(budget=9), manager)
    if dtype in (torch.float64, torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(held(again), held(manager), strict=True))
        exact = searched(spec)  # decisions are worked out in fp32 from the numbers that the type holds
        load_vector(exact, to_vector(manager))
        for name, buffer in exact.named_buffers():
            buffer.copy_(dict(manager.named_buffers())[name])
        assert all(torch.equal(a, b) for a, b in zip(held(exact), held(manager), strict=True))


@contextmanager
def default_type(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("spec", KINDS)
def test_a_default_type_or_device_changes_no_manager_and_no_decision(spec: str, tmp_path) -> None:
    manager = searched(spec)
    plugins.save(manager, tmp_path / "plug")
    wanted = held(manager)
    for dtype in (torch.bfloat16, torch.float64):
        with default_type(dtype):
            assert same_bits(searched(spec), manager)
            again = plugins.load(tmp_path / "plug")
            assert same_bits(again, manager)
            plugins.save(again, tmp_path / f"under {dtype}")
        assert same_bits(plugins.load(tmp_path / f"under {dtype}"), manager)
    with torch.device("meta"), torch.inference_mode():  # a device on which nothing can be done
        again = plugins.load(tmp_path / "plug")
    assert same_bits(again, manager)
    assert not any(tensor.is_inference() for tensor in again.state_dict().values())
    with default_type(torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(held(again), wanted, strict=True))
    with torch.device("meta"), again.attach(small()) as memory, torch.no_grad():
        small()(random_rows_on_cpu(small()), past_key_values=memory)
    assert all(torch.equal(layer.slots, slots) for layer, slots in zip(memory.layers, wanted, strict=True))


def random_rows_on_cpu(model) -> torch.Tensor:
    with torch.device("cpu"):
        return Batch.of(random_rows(model, [40], 0)).ids


# ---- odd tensors -----------------------------------------------------------------------------------------------------


class Odd(KeyDiff):
    """Tied parameters, parts of a larger tensor, an expanded one, integers, bools, a scalar, one that is not saved."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.one = nn.Parameter(torch.zeros(3, 2))
        self.tied = self.one
        whole = torch.zeros(8)
        self.first, self.second = nn.Parameter(whole[:5]), nn.Parameter(whole[3:])
        self.turned = nn.Parameter(torch.zeros(2, 3).t())
        self.register_buffer("wide", torch.zeros(1).expand(4))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("absent", None)
        self.register_buffer("unsaved", torch.zeros(2), persistent=False)


@pytest.fixture
def odd() -> Iterator[Odd]:
    managers.register("odd")(Odd)
    Odd.name = "odd"
    try:
        found = Odd()
        with torch.no_grad():
            found.one.copy_(torch.arange(6.0).view(3, 2))
            found.turned.copy_(torch.arange(6.0).view(3, 2))
            found.wide = torch.tensor([2.5]).expand(4)
            found.count += 7
        yield found
    finally:
        del managers._classes["odd"]


def test_tied_shared_and_strided_tensors(odd: Odd, tmp_path: Path) -> None:
    plugins.save(odd, tmp_path / "plug")
    again = plugins.load(tmp_path / "plug")
    assert same_bits(odd, again)
    assert again.tied is again.one
    plugins.save(odd.bfloat16(), tmp_path / "plug")
    again = plugins.load(tmp_path / "plug")
    assert same_bits(odd, again)
    assert again.tied is again.one
    assert again.one.dtype == torch.bfloat16
    file = tmp_path / "plug" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["tied"] = tensors["tied"] + 1
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(PluginError, match=r"model\.safetensors: (one|tied): is tied to another tensor"):
        plugins.load(tmp_path / "plug")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("one", torch.zeros(3, 2, device="meta"), "one: is on the meta device"),
        ("one", torch.zeros(4, 2), r"could not be loaded again.*has shape \(4, 2\)"),
        ("one", torch.full((3, 2), torch.nan), "one: 6 of 6 values are NaN"),
        ("one", torch.full((3, 2), torch.inf).to(torch.float8_e5m2), "one: 6 of 6 values are NaN or infinite"),
        ("count", torch.zeros((), dtype=torch.int32), "count: has type torch.int32"),
        ("wide", torch.zeros(4, dtype=torch.complex128), "cannot be written as safetensors"),
        ("wide", torch.eye(4).to_sparse(), "wide: is sparse"),
        ("mask", None, "mask: is missing"),
        ("more", torch.zeros(2), "more: is not a tensor of manager 'odd'"),
    ],
)
def test_what_cannot_come_back_is_refused_by_save(odd: Odd, name, value, message, tmp_path: Path) -> None:
    if isinstance(getattr(odd, name, None), nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    if name == "more":
        odd.register_buffer(name, value)
    else:
        setattr(odd, name, value)
    with pytest.raises(PluginError, match=message):
        plugins.save(odd, tmp_path / "plug")
    assert not list(tmp_path.iterdir())
