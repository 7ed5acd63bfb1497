"""Compiled models are managed like others: right numbers under every form of `torch.compile`, or a clear refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from evomem.errors import CacheError
from evomem.managers import build
from evomem.testing.comparing import greedy, random_rows, read, same_logits
from evomem.testing.models import tiny
from evomem.testing.reference import Batch

EVICTING = build("h2o(budget=6, every=5)")


@pytest.fixture
def model() -> Iterator[Any]:
    """A model that nobody else compiles."""
    torch.compiler.reset()
    yield tiny("llama", layers=1)
    torch.compiler.reset()


@pytest.fixture(scope="module")
def batch() -> Batch:
    return Batch.of(random_rows(tiny("llama", layers=1), [11, 8], 0))


def managed(model: Any, call: Any, batch: Batch, pieces: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Logits and slots of ``call``, which is the model or a compiled one, inside a block."""
    with EVICTING.attach(model) as cache:
        logits = read(call, cache, batch, pieces)
    return logits, [layer.slots for layer in cache.layers]


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


# Compiling the attention alone shows the same faults in a fifth of the time.


def compiled_forward(model: Any) -> Any:
    attention = model.model.layers[0].self_attn
    attention.forward = torch.compile(attention.forward, backend="eager")
    return model


def compiled_in_place(model: Any) -> Any:
    model.model.layers[0].self_attn.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    ("way", "pieces"), [(compiled, [11]), (compiled_forward, [9, 1, 1]), (compiled_in_place, [9, 1, 1])]
)
def test_compiled_model_is_managed_and_then_stock_again(
    model: Any, batch: Batch, way: Callable[[Any], Any], pieces: list[int]
) -> None:
    """Compiled and run before a block, in it, and after it: what was compiled elsewhere must not be taken again."""
    if way is compiled:
        batch = batch.row(0)
    stock = read(model, None, batch)
    wanted, slots = managed(model, model, batch, pieces)
    call = way(model)
    same_logits("before", read(call, None, batch), stock, batch.real)
    for _ in range(2):
        logits, held = managed(model, call, batch, pieces)
        same_logits("inside", logits, wanted, batch.real)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(held, slots, strict=True))
    same_logits("after", read(call, None, batch), stock, batch.real)


def test_compiled_inside_the_block_and_generating(model: Any, batch: Batch) -> None:
    with EVICTING.attach(model) as cache:
        wanted = greedy(model, cache, batch.ids, 3, batch.real)
        compiled_forward(model)
        got = greedy(model, EVICTING.new_cache(model), batch.ids, 3, batch.real)
    assert torch.equal(got, wanted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_must_hold_the_cache_in_a_graph_is_refused(model: Any, batch: Batch) -> None:
    ids = batch.ids[:1]

    class Holding(torch.nn.Module):
        def __init__(self, cache: Any) -> None:
            super().__init__()
            self.model, self.cache = model, cache

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.model(ids, past_key_values=self.cache).logits
            return logits

    with EVICTING.attach(model) as cache, torch.no_grad():
        with pytest.raises(RuntimeError, match="compile without fullgraph=True"):
            torch.compile(model, backend="eager", fullgraph=True)(ids, past_key_values=cache)
        with pytest.raises(CacheError, match="export or trace a model outside"):
            torch.export.export(Holding(cache), (ids,), strict=False)
        with pytest.raises(CacheError, match="export or trace a model outside"):
            torch.jit.trace(Holding(cache), (ids,))
        assert cache.get_seq_length() == 0
