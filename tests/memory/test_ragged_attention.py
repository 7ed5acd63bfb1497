"""Attention over heads of different lengths is attention, on a processor and through a varlen kernel."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomem.memory.kv import ragged_attention as kernels
from evomem.memory.kv.ragged import RaggedLayout
from evomem.memory.kv.storage import SlotStorage
from tests.support.layouts import layouts


def stored(layout: RaggedLayout, new: int, size: int, dtype: torch.dtype, generator: torch.Generator) -> SlotStorage:
    storage = SlotStorage()
    storage.layout = layout
    batch, heads = layout.lengths.shape
    for name in ("keys", "values"):
        storage.flat[name] = torch.randn(layout.total, size, generator=generator).to(dtype)
        storage.even[name] = torch.randn(batch, heads, new, size, generator=generator).to(dtype)
    storage.even["slots"] = torch.arange(new).expand(batch, heads, new)
    return storage


def by_sums(storage: SlotStorage, query: Tensor, scale: float) -> Tensor:
    """Attention by a loop over rows, heads and queries, in float64."""
    batch, heads, count, size = query.shape
    assert storage.layout is not None
    group = heads // storage.layout.lengths.shape[1]
    bounds, output = storage.layout.bounds.tolist(), torch.zeros(batch, heads, count, size, dtype=torch.float64)
    for row in range(batch):
        for head in range(heads):
            at = row * (heads // group) + head // group
            keys, values = (
                torch.cat((storage.flat[name][bounds[at] : bounds[at + 1]], storage.even[name][row, head // group]))
                for name in ("keys", "values")
            )
            for number in range(count):
                seen = len(keys) - (count - 1 - number)
                weights = torch.softmax(keys[:seen].double() @ query[row, head, number].double() * scale, 0)
                output[row, head, number] = weights @ values[:seen].double()
    return output


def slow_varlen(
    query: Tensor, keys: Tensor, values: Tensor, queries_of: Tensor, slots_of: Tensor, most_queries: int,
    most_slots: int, scale: float, causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What a varlen kernel is asked for and gives, as `evomem.memory.kv.ragged_attention.Varlen` says, by loops."""
    assert queries_of.dtype == slots_of.dtype == torch.int32
    assert keys.shape[1] == values.shape[1] == 1
    assert keys.shape[0] == values.shape[0] == slots_of[-1]
    assert query.shape[0] == queries_of[-1]
    assert most_queries == queries_of.diff().max()
    assert most_slots == slots_of.diff().max()
    output, logs = torch.zeros_like(query), torch.zeros(query.shape[1], query.shape[0])
    for q, q_end, k, k_end in zip(queries_of, queries_of[1:], slots_of, slots_of[1:], strict=False):
        mine, theirs = query[q:q_end].float(), keys[k:k_end, 0].float()
        if not len(theirs):
            logs[:, q:q_end] = math.inf  # as FlashAttention has it
            continue
        logits = torch.einsum("qgd,kd->gqk", mine, theirs) * scale
        if causal:
            hidden = ~torch.ones(len(mine), len(theirs), dtype=torch.bool).tril(len(theirs) - len(mine))
            logits = logits.masked_fill(hidden, -torch.inf)
        logs[:, q:q_end] = logits.logsumexp(-1)
        output[q:q_end] = (logits.softmax(-1) @ values[k:k_end, 0].float()).transpose(0, 1).to(query.dtype)
    return output, logs


@pytest.mark.parametrize("way", ["by_head", "by_varlen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(layout=layouts(), count=st.sampled_from([1, 1, 3]), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_both_parts_together_are_attention(way: str, dtype: torch.dtype, layout, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    storage = stored(layout, count + seed % 3, 8, dtype, generator)
    batch, heads = layout.lengths.shape
    query = torch.randn(batch, count, heads * 2, 8, generator=generator).to(dtype).transpose(1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "SHORT", -1)
        patch.setattr(kernels, "varlen", lambda: slow_varlen)
        patch.setattr(kernels, "_kernels", lambda *_: getattr(kernels, way))
        output = kernels.ragged_attention(storage, query, 0.4, None)
    assert output is not None
    assert output.dtype == dtype
    wanted = by_sums(storage, query, 0.4)
    torch.testing.assert_close(output.double(), wanted, rtol=0, atol={torch.float32: 1e-6}.get(dtype, 0.02))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=3).filter(any),
    rows=st.integers(2, 5),
    count=st.sampled_from([1, 3]),
)
@settings(max_examples=20, deadline=None)
def test_rows_of_equal_lengths_attend_at_once_as_one_by_one(dtype: torch.dtype, lengths, rows: int, count: int) -> None:
    generator, threads = torch.Generator().manual_seed(rows), torch.get_num_threads()
    layout = RaggedLayout(torch.tensor([lengths] * rows), torch.device("cpu"))
    other = RaggedLayout(layout.lengths + torch.arange(rows)[:, None], torch.device("cpu"))
    storage = stored(layout, count, 16, dtype, generator)
    query = torch.randn(rows, len(lengths) * 2, count, 16, generator=generator).to(dtype)
    by_kv_head = query.view(rows, len(lengths), 2 * count, 16)
    flat = storage.flat["keys"], storage.flat["values"], layout, 0.4
    assert layout.equal_rows
    assert not other.equal_rows
    for at_once, in_turn in zip(
        kernels._rows_at_once(by_kv_head, *flat), kernels._heads_in_turn(by_kv_head, *flat), strict=True
    ):
        torch.testing.assert_close(at_once, in_turn, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.01)
    assert torch.get_num_threads() == threads


def test_where_no_kernel_gives_denominators_heads_are_padded() -> None:
    layout, generator = RaggedLayout(torch.tensor([[5, 3]]), torch.device("cpu")), torch.Generator().manual_seed(0)
    storage, query = stored(layout, 2, 8, torch.float32, generator), torch.randn(1, 4, 1, 8, generator=generator)
    assert kernels.ragged_attention(storage, query, 1.0, None) is None  # short: padding them is faster
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "SHORT", -1)
        assert kernels.ragged_attention(storage, query, 1.0, None) is not None
        assert kernels.ragged_attention(storage, query, 1.0, 30.0) is None
        assert kernels.ragged_attention(storage, query.requires_grad_(), 1.0, None) is None
        assert kernels.ragged_attention(storage, query.detach().double(), 1.0, None) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert kernels.ragged_attention(storage, query.detach(), 1.0, None) is None
