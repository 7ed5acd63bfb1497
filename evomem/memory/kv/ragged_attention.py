"""Memory: attention over heads that hold differently many slots, without padding them to the longest.

What `SlotStorage` holds is attended to in its two parts, the flat older slots and the even newer ones, each with the
logarithm of its softmax's denominator, by which the two outputs are weighed (as in FlashAttention, arXiv 2205.14135).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from evomem.memory.kv.attention import autocasts
from evomem.memory.kv.ragged import RaggedLayout
from evomem.memory.kv.storage import SlotStorage

SHORT = 1 << 17
"""Bytes of keys and values of the longest head (128 KiB) up to which a processor pads faster than it calls per head."""

Part = tuple[Tensor, Tensor]
"""Of attention over some of the slots: output (batch, kv_heads, queries, group, head_dim), and the logarithm of the
denominator (batch, kv_heads, queries, group) fp32."""


def ragged_attention(storage: SlotStorage, query: Tensor, scale: float, softcap: float | None) -> Tensor | None:
    """Attend to all flat slots, and causally to the even ones, of which the last are the queries' own.

    Parameters
    ----------
    storage : of heads of different lengths (``layout`` is not None), with no empty slot and nothing that fades.
    query : (batch, query_heads, queries, head_dim); query head h belongs to KV head h // group.

    Returns
    -------
    (batch, query_heads, queries, head_dim); or None where padding the heads for the moment is faster, or where no
    kernel gives the denominators: then the caller pads.
    """
    keys, values, layout = storage.even["keys"], storage.even["values"], storage.layout
    serves = _kernels(query, keys, values)
    differentiates = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, keys, values))
    if layout is None or softcap is not None or differentiates or autocasts(query) or serves is None:
        return None
    batch, heads, count, size = query.shape
    kv_heads = keys.shape[1]
    grouped = query.view(batch, kv_heads, heads // kv_heads, count, size)
    parts = serves(grouped, storage.flat["keys"], storage.flat["values"], layout, keys, values, scale)
    if parts is None:
        return None
    return merged(*parts).transpose(2, 3).reshape(batch, heads, count, values.shape[-1])


def merged(first: Part, second: Part) -> Tensor:
    """Return the attention over the slots of both parts; at least one of them has a slot for every query."""
    (one, log_one), (other, log_other) = first, second
    share = torch.sigmoid(log_one - log_other)[..., None]  # exp(a) / (exp(a) + exp(b))
    # A part without any slot has no output: whatever stands there counts nothing.
    one = torch.where(share > 0, one.float(), 0.0)
    return (share * one + (1 - share) * other.float()).to(other.dtype)


Kernels = Callable[[Tensor, Tensor, Tensor, RaggedLayout, Tensor, Tensor, float], tuple[Part, Part] | None]
"""From queries (batch, kv_heads, group, queries, head_dim), flat keys and values, their layout, even keys and values,
and the scale: the flat part and the even part; or None where padding is faster."""


def _kernels(query: Tensor, keys: Tensor, values: Tensor) -> Kernels | None:
    """Return what attends on the tensors' device, in their type; None: nothing does."""
    if not query.dtype == keys.dtype == values.dtype or keys.shape[-1] != values.shape[-1]:
        return None
    if query.device.type == "cpu":
        return by_head if query.dtype in (torch.float32, torch.bfloat16, torch.float16) else None
    halves = query.dtype in (torch.bfloat16, torch.float16)
    if query.device.type == "cuda" and halves and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0:
        return by_varlen
    return None


# ---- on the processor: a call for every KV head ----------------------------------------------------------------------


def by_head(
    query: Tensor, flat_keys: Tensor, flat_values: Tensor, layout: RaggedLayout, keys: Tensor, values: Tensor,
    scale: float,
) -> tuple[Part, Part] | None:  # fmt: skip
    """Attend KV head by KV head; None for `SHORT` heads, which are padded faster. See `Kernels`."""
    if 2 * layout.longest * keys.shape[-1] * keys.element_size() <= SHORT:
        return None
    batch, kv_heads, group, count, size = query.shape
    attend_older = _rows_at_once if layout.equal_rows and batch > 1 else _heads_in_turn
    rows = query.reshape(batch, kv_heads, group * count, size)
    outputs, logs = attend_older(rows, flat_keys, flat_values, layout, scale)
    mask = None
    if count > 1:  # every query sees what came before it, and itself; the group's heads lie one after the other
        causal = torch.ones(count, keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - count)
        mask = torch.where(causal, 0.0, -torch.inf).to(query.dtype).repeat(group, 1)[None, None]
    output, log = _flash(rows, keys, values, scale, mask)
    shape = batch, kv_heads, group, count
    older = outputs.view(*shape, size).transpose(2, 3), logs.view(shape).transpose(2, 3)
    newer = output.view(*shape, size).transpose(2, 3), log.view(shape).transpose(2, 3)
    return older, newer


def _rows_at_once(query: Tensor, keys: Tensor, values: Tensor, layout: RaggedLayout, scale: float) -> Part:
    """Attend to a KV head of all rows in one call: rows of equal lengths lie at equal distances in the flat tensors.

    From queries (batch, kv_heads, queries, head_dim), flat keys and values: the output, as the queries, and the
    logarithm of its denominator (batch, kv_heads, queries).
    """
    batch, kv_heads, _, size = query.shape
    outputs, logs = query.new_zeros(query.shape), torch.full(query.shape[:3], -torch.inf)
    bounds = layout.bounds[: kv_heads + 1].tolist()
    by_row = keys.view(batch, 1, bounds[-1], size), values.view(batch, 1, bounds[-1], size)
    for head, (begin, end) in enumerate(pairwise(bounds)):
        if begin < end:
            some_keys, some_values = (tensor[:, :, begin:end] for tensor in by_row)
            output, log = _flash(query[:, head : head + 1], some_keys, some_values, scale)
            outputs[:, head], logs[:, head] = output[:, 0], log[:, 0]
    return outputs, logs


def _heads_in_turn(query: Tensor, keys: Tensor, values: Tensor, layout: RaggedLayout, scale: float) -> Part:
    """Attend to every head of every row in a call of its own, on one thread. As `_rows_at_once`.

    The kernel shares out rows and heads over threads. For a single head nothing is left but its products, which are so
    small that threads wait for each other longer than they work.
    """
    flat_queries = query.flatten(0, 1)
    outputs, logs = query.new_zeros(flat_queries.shape), torch.full(flat_queries.shape[:2], -torch.inf)
    wide_keys, wide_values = keys[None, None], values[None, None]
    with _one_thread():
        for head, (begin, end) in enumerate(pairwise(layout.bounds.tolist())):
            if begin < end:
                some_keys, some_values = wide_keys[:, :, begin:end], wide_values[:, :, begin:end]
                output, log = _flash(flat_queries[None, head : head + 1], some_keys, some_values, scale)
                outputs[head], logs[head] = output[0, 0], log[0, 0]
    return outputs.view(query.shape), logs.view(query.shape[:3])


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _flash(query: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None = None) -> Part:
    """Fused attention (batch, heads, queries, head_dim) and its denominators (batch, heads, queries) on a processor."""
    kernel: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, log = kernel(query, keys, values, attn_mask=mask, scale=scale)
    return output, log


# ---- on CUDA: one varlen call ----------------------------------------------------------------------------------------


def by_varlen(
    query: Tensor, flat_keys: Tensor, flat_values: Tensor, layout: RaggedLayout, keys: Tensor, values: Tensor,
    scale: float,
) -> tuple[Part, Part] | None:  # fmt: skip
    """Attend to all heads in one varlen call for the flat slots, and one for the even ones. See `Kernels`.

    To the kernel every row and KV head is a sequence of its own, with one KV head and a group of query heads.
    """
    call = varlen()
    if call is None:
        return None
    batch, kv_heads, group, count, size = query.shape
    heads, slots = batch * kv_heads, keys.shape[2]
    rows = query.permute(0, 1, 3, 2, 4).reshape(heads * count, group, size)
    queries_of = torch.arange(heads + 1, device=query.device, dtype=torch.int32)
    shape = batch, kv_heads, count, group
    older, log_older = call(
        rows, flat_keys[:, None], flat_values[:, None], queries_of * count, layout.device_bounds, count, layout.longest,
        scale, False,
    )  # fmt: skip
    newer, log_newer = call(
        rows, keys.reshape(heads * slots, 1, size), values.reshape(heads * slots, 1, size), queries_of * count,
        queries_of * slots, count, slots, scale, True,
    )  # fmt: skip
    # The denominator that the kernel gives where there is nothing to attend to is infinite, not 0.
    log_older = log_older.t().reshape(shape).masked_fill(layout.counts[:, :, None, None] == 0, -torch.inf)
    return (older.view(*shape, size), log_older), (newer.view(*shape, size), log_newer.t().reshape(shape))


Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float, bool], Part]
"""From queries (queries, group, head_dim), keys and values (slots, 1, head_dim), where every sequence's queries and
slots begin (int32, and the end), the most queries and slots of a sequence, the scale, and whether the last query sees
all and each one before it one slot less: output as the queries, and denominators (group, queries) fp32."""


def varlen() -> Varlen | None:
    """Return FlashAttention over sequences of different lengths, which torch has from 2.10 on; or None."""
    try:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn
    except ImportError:
        return None

    def call(
        query: Tensor, keys: Tensor, values: Tensor, queries_of: Tensor, slots_of: Tensor, most_queries: int,
        most_slots: int, scale: float, causal: bool,
    ) -> Part:  # fmt: skip
        output, log = varlen_attn(
            query, keys, values, queries_of, slots_of, most_queries, most_slots,
            return_aux=AuxRequest(lse=True), scale=scale, window_size=(-1, 0 if causal else -1), enable_gqa=True,
        )  # fmt: skip
        return output, log

    return call
