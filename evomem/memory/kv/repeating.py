"""Memory: a context that is read a second time, after itself, to see which of its slots that takes (KVzip)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from evomem.errors import CacheError
from evomem.memory.kv.attention import full_precision
from evomem.memory.kv.keep_all import KeepAll
from evomem.memory.kv.positions import position_limit
from evomem.memory.kv.switch import uncounted
from evomem.memory.kv.versions import passed
from evomem.memory.observations.base import Wanted, Window
from evomem.memory.observations.recorder import Recorder
from evomem.memory.observations.repeated_attention import REPEATED, keep_repeated
from evomem.memory.observations.windows import WindowObservation
from evomem.modes import outside_inference_mode

if TYPE_CHECKING:
    from evomem.memory.kv.cache import SlotCache

PIECE = 256
"""Tokens of the second reading that are read in one pass; their attention to all slots is held at a time."""


class _Largest(WindowObservation):
    """Largest attention of the newest queries and of the group's query heads; of no registry, for it is used here."""

    name: ClassVar[str] = "window_largest"

    def of(self, window: Window) -> Tensor:
        """Return (batch, kv_heads, slots)."""
        return window.largest.amax(2)


@outside_inference_mode()
@torch.no_grad()
def repeat(cache: SlotCache, ids: Tensor) -> None:
    """Let the model read ``ids`` after the context and record what they attend to; the cache is as before otherwise.

    The largest attention of every slot, over the repeated tokens and the query heads of its group, is what the
    observation ``repeated_attention`` shows at the decision (KVzip, arXiv 2505.23416, which reads contexts of more than
    2,048 tokens again in parts, each of which attends to its own part only; here all attend to all).

    Parameters
    ----------
    ids : (batch, tokens) int64, the context once more, with a request to repeat it in front, if there is one.

    Raises
    ------
    CacheError : nothing observes it, nothing or a padded row was read, slots have left, the rows are not the cache's,
        or the model has no positions for so many tokens.
    """
    read, model = cache.get_seq_length(), cache.model
    if REPEATED not in {one.spec for one in cache.wanted.observations} or model is None:
        raise CacheError(f"cache.repeat: the manager does not observe {REPEATED}, so nothing would come of it")
    layers, rows = cache.layers, len(ids)
    if not read or ids.dim() != 2 or not ids.shape[1] or any(len(layer.starts) != rows for layer in layers):
        raise CacheError(
            f"cache.repeat: ids have shape {tuple(ids.shape)} and the cache has read {read} tokens in "
            f"{len(layers[0].starts) if read else 0} rows; read the context first, then give its ids: (rows, tokens)"
        )
    if any(start for layer in layers for start in layer.starts):
        raise CacheError("cache.repeat: rows are padded, so each has another context to repeat; read them one by one")
    if any(layer.recorder.wanted != cache.wanted or layer.storage.shape[2] != read for layer in layers):
        raise CacheError(
            "cache.repeat: the manager has decided about this context already; reset() the cache, read inside "
            "`with cache.reading():`, and repeat in that block"
        )
    limit = position_limit(model)
    if limit is not None and limit.learned and read + ids.shape[1] > limit.tokens:
        raise CacheError(
            f"cache.repeat: a context of {read} tokens and {ids.shape[1]} that repeat it need "
            f"{read + ids.shape[1]} positions, and the model has {limit.tokens}; take shorter contexts, or another "
            "manager"
        )
    again = cache.clone()
    again.policy, again.wanted = KeepAll(), Wanted((_Largest(PIECE),))
    again.decides_after_forward = False
    largest: list[Tensor | None] = [None] * len(layers)
    for layer in again.layers:
        layer.recorder = Recorder(again.wanted, begin=read)
    with uncounted():
        for begin in range(0, ids.shape[1], PIECE):
            piece = ids[:, begin : begin + PIECE]
            again.wanted = Wanted((_Largest(piece.shape[1]),))
            for layer in again.layers:
                layer.recorder = Recorder(again.wanted, begin=again.get_seq_length())
            model(input_ids=piece, use_cache=True, logits_to_keep=1, **passed(again, model))
            for at, layer in enumerate(again.layers):
                with full_precision(ids):
                    paid = layer.view().recorded[f"window_largest:{piece.shape[1]}"][:, :, :read]
                before = largest[at]
                largest[at] = paid.clone() if before is None else torch.maximum(before, paid)
    for layer, most in zip(layers, largest, strict=True):
        if most is not None:
            keep_repeated(layer.recorder, most.float())
