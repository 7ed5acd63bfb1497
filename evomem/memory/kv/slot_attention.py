"""Memory: attention of new queries over one layer's slots, and what a manager observes of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from evomem.memory.kv.attention import attention_probabilities, autocasts, grouped_attention, mixed
from evomem.memory.kv.masks import Visibility, hides, slot_mask
from evomem.memory.kv.ragged_attention import ragged_attention
from evomem.memory.kv.storage import SlotStorage
from evomem.memory.observations import Recorder
from evomem.memory.observations.spectrum import HOP

BLOCK_ELEMENTS = 1 << 22
"""Upper bound on the elements of one block of attention probabilities or masks (16 MiB in fp32)."""


@dataclass(frozen=True)
class Queries:
    """New queries of one layer, whose own tokens have slots already.

    Attributes
    ----------
    query : (batch, query_heads, queries, head_dim).
    first : token index of the first query.
    real : (batch, queries) bool, False for padding; None when nothing is padded.
    starts : first real token of every row.
    visibility : what they may look at.
    scale, softcap : of the attention's logits.
    """

    query: Tensor
    first: int
    real: Tensor | None
    starts: tuple[int, ...]
    visibility: Visibility
    scale: float
    softcap: float | None

    @property
    def end(self) -> int:
        """Tokens read when the last query has attended."""
        return self.first + self.query.shape[2]


def attend(storage: SlotStorage, queries: Queries, recorder: Recorder) -> Tensor:
    """Attend, and observe if that is wanted: (batch, query_heads, queries, head_dim).

    What is observed never changes what is computed. In fp32 the observed probabilities make the output as well,
    which differs from the fused kernel's by rounding only and saves a product. In every other type the output is
    that of a manager that does not observe, to the bit, and the probabilities are worked out beside it in fp32.
    """
    if not recorder.wanted.every_query:
        return _unobserved(storage, queries)
    if queries.query.dtype == torch.float32 and not autocasts(queries.query):
        outputs = [mixed(*block) for block in _observed(storage, queries, recorder)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    output = _unobserved(storage, queries)
    with torch.no_grad():
        for _ in _observed(storage, queries, recorder):
            pass
    return output


def _unobserved(storage: SlotStorage, queries: Queries) -> Tensor:
    query, visibility, scale, softcap = queries.query, queries.visibility, queries.scale, queries.softcap
    count, slots = query.shape[2], storage.shape[2]
    old = slots - count
    far = visibility.window is not None and queries.end > visibility.window
    plain = visibility.explicit is None and not storage.padded and "decays" not in storage.even and not far
    plain = plain and not _hides(storage, queries)
    if (
        plain
        and storage.layout is not None
        and (output := ragged_attention(storage, query, scale, softcap)) is not None
    ):
        return output
    keys, values = storage.whole("keys"), storage.whole("values")
    if plain and storage.layout is not None and count * keys[..., 0].numel() <= BLOCK_ELEMENTS:
        new = slots - storage.layout.longest
        triangle = torch.ones(count, new, dtype=torch.bool, device=query.device).tril(new - count)
        older = storage.layout.filled[:, :, None].expand(-1, -1, count, -1)
        mask = torch.cat((older, triangle.expand(*older.shape[:2], -1, -1)), 3)
        return grouped_attention(query, keys, values, scale, mask=mask, softcap=softcap)
    plain = plain and storage.layout is None
    if plain and (count == 1 or old == 0):
        return grouped_attention(query, keys, values, scale, causal=count > 1, softcap=softcap)
    if plain and count * slots <= BLOCK_ELEMENTS:
        triangle = torch.ones(count, slots, dtype=torch.bool, device=query.device).tril(old)[None, None]
        return grouped_attention(query, keys, values, scale, mask=triangle, softcap=softcap)
    outputs = [
        grouped_attention(
            query[:, :, part], keys[:, :, :reach], values[:, :, :reach], scale, mask=mask, softcap=softcap
        )
        for part, reach, mask in _blocks(storage, queries, storage.shape[1])
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _hides(storage: SlotStorage, queries: Queries) -> bool:
    """Whether the padding mask of this call hides a token that has a slot."""
    visibility = queries.visibility
    if visibility.padding is None or visibility.hides_padding_only(queries.starts):
        return False
    return hides(storage.whole("slots"), visibility.padding)


def _observed(storage: SlotStorage, queries: Queries, shared: Recorder) -> Iterator[tuple[Tensor, Tensor]]:
    """Let the recorder see the attention of all queries, block by block.

    Yields the block's probabilities (batch, kv_heads, group, queries, slots) and the slots' values.
    """
    query, real = queries.query, queries.real
    keys, values, recorder = storage.whole("keys"), storage.whole("values"), shared.whole(storage.layout)
    for part, reach, mask in _blocks(storage, queries, query.shape[1]):
        attention = attention_probabilities(query[:, :, part], keys[:, :, :reach], queries.scale, mask, queries.softcap)
        if queries.visibility.explicit is not None:
            attention = attention.nan_to_num(nan=0.0)  # of a query that may look at nothing
        seen = attention.detach().mean(2)
        if real is not None:
            seen = seen * real[:, None, part, None]
        recorder.attended(seen, queries.first + part.start, queries.starts)
        yield attention, values[:, :, :reach]
    shared.take_over(recorder, storage.layout)


def _blocks(storage: SlotStorage, queries: Queries, heads: int) -> Iterator[tuple[slice, int, Tensor]]:
    """Cut the queries into blocks whose masks, or probabilities of ``heads`` heads, stay small.

    Yields the block's queries, how many of the slots, in their padded form, they may look at, and the mask of these.
    """
    query, visibility, real, first = queries.query, queries.visibility, queries.real, queries.first
    count, slots, explicit = query.shape[2], storage.whole("slots"), visibility.explicit
    decays, width = storage.whole("decays") if "decays" in storage.even else None, slots.shape[2]
    block = max(HOP, min(count, BLOCK_ELEMENTS // (query.shape[0] * heads * width) // HOP * HOP))
    for at in range(0, count, block):
        part = slice(at, min(at + block, count))
        # Later slots belong to later queries, unless a mask lets tokens look ahead.
        reach = width - count + part.stop if explicit is None else width
        mask = slot_mask(
            slots[:, :, :reach],
            torch.arange(first + part.start, first + part.stop, device=query.device),
            uniform=storage.aligned and storage.dense,
            decays=None if decays is None else decays[:, :, :reach],
            window=visibility.window,
            padding=visibility.padding,
            real=None if real is None else real[:, part],
            explicit=None if explicit is None else explicit[:, :, part],
        )
        yield part, reach, mask
