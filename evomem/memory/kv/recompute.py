"""Memory: the observations of a context that another engine has read, from its queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from evomem.memory.kv.attention import attention_probabilities
from evomem.memory.kv.masks import slot_mask
from evomem.memory.kv.rotary import Rotary
from evomem.memory.observations import Recorder, Wanted
from evomem.memory.observations.spectrum import HOP

BLOCK_ELEMENTS = 1 << 22
"""Upper bound on the elements of one block of attention probabilities (16 MiB in fp32)."""


@torch.no_grad()
def recomputed(
    observes: frozenset[str],
    query: Tensor,
    keys: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    positions: Tensor | None = None,
    rotary: Rotary | None = None,
) -> dict[str, Tensor]:
    """Return what a `SlotCache` would have recorded in one layer while a whole context was read.

    Nothing is evicted, nothing padded. The attention is computed again, in blocks of queries; give the result to
    `evomem.memory.layer_view` as ``recorded``.

    Parameters
    ----------
    observes : names of `evomem.memory.observations`.
    query : (batch, query_heads, tokens, head_dim), rotated.
    keys : (batch, kv_heads, tokens, head_dim), rotated.
    scale, softcap : of the model's attention logits.
    positions : (batch, tokens) as rotated; by default 0, 1, 2, ...
    rotary : the layer's rotary embedding (`evomem.memory.kv.rotary.find_rotaries`), for what looks at queries before
        rotation.

    Raises
    ------
    ConfigError : an observation that does not exist.
    """
    batch, kv_heads, tokens, _ = keys.shape
    index = torch.arange(tokens, device=keys.device)
    recorder = Recorder(Wanted.parse(observes))
    recorder.append(batch, kv_heads, tokens, keys)
    if recorder.wanted.every_query:
        block = max(HOP, BLOCK_ELEMENTS // (batch * query.shape[1] * tokens) // HOP * HOP)
        for at in range(0, tokens, block):
            end = min(at + block, tokens)
            mask = slot_mask(index[None, None, :end], index[at:end], uniform=True)
            attention = attention_probabilities(query[:, :, at:end], keys[:, :, :end], scale, mask, softcap)
            recorder.attended(attention.mean(2), at, (0,) * batch)
    recorder.queried(query, positions, None, rotary)
    return recorder.recorded(
        keys, index.expand(batch, kv_heads, tokens), index.new_zeros(batch), tokens,
        scale=scale, decays=None, window=None, softcap=softcap, rotary=rotary,
    )  # fmt: skip
