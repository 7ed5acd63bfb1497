"""Cache: what the managed attention costs against stock SDPA while nothing is evicted."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from benchmarks.measuring import Line, Setting, in_turns, line, ratios, timed
from evomem.managers import build
from evomem.memory import attached
from evomem.memory.kv.versions import passed

PREFILL = "attention.prefill_overhead"
DECODE = "attention.decode_overhead"


@torch.no_grad()
def prefill(setting: Setting) -> Iterator[Line]:
    """Seconds of reading a context with the manager `full`, over those of the untouched model."""
    model, manager = setting.loaded.model, build("full")
    tokens = setting.tokens(1, setting.sizes.prefill)

    def stock() -> float:
        cache = DynamicCache(config=model.config)
        return timed(lambda: step(model, tokens, cache))

    def managed() -> float:
        with manager.attach(model) as cache:
            return timed(lambda: step(model, tokens, cache))

    seconds = in_turns(PREFILL, {"stock": stock, "managed": managed}, setting.rounds(5))
    yield line(PREFILL, ratios(seconds["managed"], seconds["stock"]))


@torch.no_grad()
def decode(setting: Setting) -> Iterator[Line]:
    """The same of decoding after a context, token by token; the worst batch size counts."""
    overheads = {}
    for batch in setting.sizes.decode_batches:
        overheads[batch] = _decode_overhead(setting, batch)
        yield line(f"{DECODE}_batch_{batch}", overheads[batch])
    worst = max(overheads.values(), key=lambda values: line("", values).value)
    yield line(DECODE, worst)


def _decode_overhead(setting: Setting, batch: int) -> list[float]:
    model, manager = setting.loaded.model, build("full")
    context = setting.tokens(1, setting.sizes.decode_context).expand(batch, -1)
    following = setting.tokens(batch, setting.sizes.decode_steps)
    read = DynamicCache(config=model.config)
    step(model, context, read)
    with manager.attach(model) as managed_read:
        step(model, context, managed_read)

    def stock() -> float:
        cache = fork(read)
        return timed(lambda: feed(model, following, cache))

    def managed() -> float:
        cache = managed_read.clone()
        with attached(model):
            return timed(lambda: feed(model, following, cache))

    stock(), managed()  # the first steps at a new batch size choose kernels and memory
    seconds = in_turns(f"{DECODE}_batch_{batch}", {"stock": stock, "managed": managed}, setting.rounds(5))
    return ratios(seconds["managed"], seconds["stock"])


def step(model: PreTrainedModel, tokens: Tensor, cache: Any) -> Tensor:
    """Feed tokens (batch, count) and return the last one's logits (batch, 1, vocabulary)."""
    logits: Tensor = model(input_ids=tokens, use_cache=True, logits_to_keep=1, **passed(cache, model)).logits
    return logits


def feed(model: PreTrainedModel, tokens: Tensor, cache: Any) -> None:
    """Feed tokens (batch, count) one by one."""
    for at in range(tokens.shape[1]):
        step(model, tokens[:, at : at + 1], cache)


def fork(cache: DynamicCache) -> DynamicCache:
    """Return an independent continuation; tensors are shared: a dynamic cache never changes them in place."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other
