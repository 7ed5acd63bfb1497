"""Cache: decoding over a quarter of a long context against the full stock cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import DynamicCache

from benchmarks.attention import feed, fork, step
from benchmarks.measuring import Line, Setting, in_turns, line, ratios, timed
from evomem.managers import build
from evomem.memory import attached

NAME = "decode.speedup_at_quarter_cache"


@torch.no_grad()
def run(setting: Setting) -> Iterator[Line]:
    """Seconds of a decoding step with the stock cache over those after K-norm evicted three quarters of every head."""
    sizes, model = setting.sizes, setting.loaded.model
    following = setting.tokens(sizes.quarter_batch, sizes.quarter_steps)
    full = DynamicCache(config=model.config)
    # One row is read and repeated: rows of equal content take as long as rows of different content.
    with build("knorm", budget=0.25).attach(model) as quarter:
        with quarter.reading():
            step(model, setting.tokens(1, sizes.quarter_context), quarter)
            for number, layer in enumerate(quarter.layers):
                full.update(layer.keys, layer.values, number)
        quarter.batch_repeat_interleave(sizes.quarter_batch)
    full.batch_repeat_interleave(sizes.quarter_batch)

    def stock() -> float:
        cache = fork(full)
        return timed(lambda: feed(model, following, cache))

    def managed() -> float:
        cache = quarter.clone()
        with attached(model):
            return timed(lambda: feed(model, following, cache))

    stock(), managed()
    seconds = in_turns(NAME, {"stock": stock, "quarter": managed}, setting.rounds(5))
    yield line(NAME, ratios(seconds["stock"], seconds["quarter"]))
