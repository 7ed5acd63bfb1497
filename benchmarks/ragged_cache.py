"""Cache: what heads of very different lengths cost at a quarter of a long context: bytes, and time of decoding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import DynamicCache

from benchmarks.attention import feed, fork, step
from benchmarks.measuring import Line, Setting, in_turns, line, ratios, timed
from evomem.managers import MemoryManager, build
from evomem.memory import SlotCache, attached

DECODE = "decode.speedup_at_ragged_quarter_cache"
BYTES = "memory.bytes_over_slots"
SPREAD = 0.8
"""Standard deviation of the heads' log-shares. The longest head of a layer then holds about twice the layer's mean."""


@torch.no_grad()
def run(setting: Setting) -> Iterator[Line]:
    """As `quarter_cache`, but that every KV head has a budget of its own; and bytes held over those of its slots."""
    sizes, model = setting.sizes, setting.loaded.model
    following = setting.tokens(sizes.quarter_batch, sizes.quarter_steps)
    full = DynamicCache(config=model.config)
    with _manager(setting).attach(model) as quarter:
        with quarter.reading():
            context = setting.tokens(1, sizes.quarter_context)
            step(model, context, quarter)
        step(model, context, full)
        quarter.batch_repeat_interleave(sizes.quarter_batch)
    full.batch_repeat_interleave(sizes.quarter_batch)

    def stock() -> float:
        cache = fork(full)
        return timed(lambda: feed(model, following, cache))

    def managed() -> float:
        cache = quarter.clone()
        with attached(model):
            seconds = timed(lambda: feed(model, following, cache))
        held.append(_bytes_over_slots(cache))
        return seconds

    held: list[float] = []
    stock(), managed()
    seconds = in_turns(DECODE, {"stock": stock, "ragged": managed}, setting.rounds(5))
    yield line(DECODE, ratios(seconds["stock"], seconds["ragged"]))
    yield line(BYTES, held)


def _manager(setting: Setting) -> MemoryManager:
    """Return K-norm with a log-share for every layer and head, drawn from a normal distribution."""
    config = setting.loaded.model.config.get_text_config(decoder=True)
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    manager = build("knorm", budget=0.25, allocation=f"per_head_shares(layers={layers},heads={heads})")
    shares = next(one for name, one in manager.named_parameters() if name.endswith("log_shares"))
    shares.copy_(SPREAD * torch.randn(shares.shape, generator=torch.Generator().manual_seed(0)))
    return manager


def _bytes_over_slots(cache: SlotCache) -> float:
    """Return all bytes that a cache holds over those of the keys and values of the tokens that have a slot."""
    used = 0
    for layer, counts in zip(cache.layers, cache.slots_held(), strict=True):
        parts = (layer.storage.even["keys"], layer.storage.even["values"])
        used += int(counts.sum()) * sum(part.shape[-1] * part.element_size() for part in parts)
    return cache.nbytes() / used
