"""Memory: the mean query of every query head of a model before rotation, measured once a model on random tokens.

Queries before rotation lie close to one centre, whatever is read (TriAttention, arXiv 2604.04921). Texts are random
tokens, the same for every model with as many embeddings; nothing of a tokenizer is needed, and it takes seconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from evomem.errors import ModelError
from evomem.memory.kv.attach import attached
from evomem.memory.kv.attention import full_precision
from evomem.memory.kv.keep_all import KeepAll
from evomem.memory.kv.positions import position_limit
from evomem.memory.kv.rotary import Rotary, frequencies, pair_lengths, unrotate
from evomem.memory.kv.switch import uncounted
from evomem.memory.kv.versions import passed
from evomem.memory.observations.base import Axes, Moment, Observation, Wanted, Window
from evomem.modes import evaluating, outside_inference_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from evomem.memory.kv.cache import SlotCache
    from evomem.memory.observations.recorder import Recorder

DRAWS, TOKENS, SINKS, SEED = 4, 256, 4, 0
"""Texts, tokens of each (fewer where a model has fewer positions), first queries that are not counted, their seed."""
FEWEST = 16
"""Tokens of a text below which nothing is measured."""
SAMPLED = 64
"""Numbers of every parameter by which a model is told from one with other weights."""


@dataclass(frozen=True)
class QueryCentre:
    """What the queries of one layer are like before rotation.

    Attributes
    ----------
    mean : (query_heads, head_dim) fp32, the mean query q̄.
    length : (query_heads, head_dim) fp32, the mean length |q|_f of the pair of numbers that a dimension is rotated
        with; 0 where it is not rotated.
    """

    mean: Tensor
    length: Tensor


def query_centres(cache_of: Callable[[Any], SlotCache], model: PreTrainedModel) -> tuple[QueryCentre, ...]:
    """Return what queries are like in every layer of a model; measured at the first call, then remembered.

    A model whose weights were changed in place is measured anew.

    Parameters
    ----------
    cache_of : makes an empty cache for the model, given a policy.

    Raises
    ------
    ModelError : the model has too few tokens or positions for a text, or its queries are not finite.
    """
    digest = _weights_digest(model)
    known = _remembered.get(model)
    if known is None or known[0] != digest:
        known = _remembered[model] = digest, _measured(cache_of, model)
    return known[1]


_remembered: WeakKeyDictionary[PreTrainedModel, tuple[str, tuple[QueryCentre, ...]]] = WeakKeyDictionary()


def texts(model: PreTrainedModel) -> Tensor:
    """Return the random texts for a model: (draws, tokens) int64.

    The lowest quarter of the ids and the last few are left out: special tokens lie there. A text begins with the
    model's first token, if it has one.

    Raises
    ------
    ModelError : there are too few tokens or positions.
    """
    config: Any = model.config.get_text_config(decoder=True)
    size, first = int(config.vocab_size), getattr(config, "bos_token_id", None)
    low, high = size // 4, size - 8
    limit = position_limit(model)
    count = TOKENS if limit is None else min(TOKENS, limit.tokens)
    if high <= low or count < FEWEST:
        raise ModelError(
            f"{type(model).__name__} has {size} tokens and {'any' if limit is None else limit.tokens} positions, too "
            f"few for a text of {FEWEST} random tokens, on which its mean queries are measured; take a manager that "
            "observes something else than tri_attention"
        )
    ids = torch.randint(low, high, (DRAWS, count), generator=torch.Generator().manual_seed(SEED))
    if isinstance(first, int) and 0 <= first < size:
        ids[:, 0] = first
    return ids


@outside_inference_mode()
@torch.no_grad()
def _measured(cache_of: Callable[[Any], SlotCache], model: PreTrainedModel) -> tuple[QueryCentre, ...]:
    ids = texts(model).to(model.device)
    with evaluating(model), uncounted(), attached(model):
        cache = cache_of(KeepAll())
        cache.wanted = Wanted((_Centring(),))
        cache.reset()
        cache.decides_after_forward = False
        with full_precision(ids):
            model(input_ids=ids, use_cache=True, logits_to_keep=1, **passed(cache, model))
            seen = [layer.view().recorded for layer in cache.layers]
    centres = tuple(QueryCentre(part["mean"].mean(0).cpu(), part["length"].mean(0).cpu()) for part in seen)
    if not all(bool(torch.isfinite(part).all()) for one in centres for part in (one.mean, one.length)):
        raise ModelError(
            f"{type(model).__name__}: its queries on random tokens are not finite; load it in another type (bfloat16 "
            "has the range that float16 lacks)"
        )
    return centres


class _Centring(Observation):
    """Mean and mean pair lengths of the queries before rotation; of no registry, for it is what is measured here."""

    name = "query_centre"
    looks_back: ClassVar[bool] = True

    def axes(self) -> dict[str, Axes]:
        """Two tensors without slots."""
        of_head: Axes = ("batch", "query_heads", "head_dim")
        return {"mean": of_head, "length": of_head}

    def queried(
        self, recorder: Recorder, query: Tensor, positions: Tensor | None, real: Tensor | None, rotary: Rotary | None,
        start: Tensor | None,
    ) -> None:  # fmt: skip
        """Keep the mean over a text that is read in one pass, its first queries left out."""
        if positions is None:
            positions = torch.arange(query.shape[2], device=query.device)[None]
        plain = unrotate(query, rotary, positions.expand(len(query), -1)).float()[:, :, SINKS:]
        width = 0 if rotary is None else 2 * len(frequencies(rotary)[0])
        recorder.rowwise["mean"] = plain.mean(2)
        recorder.rowwise["length"] = pair_lengths(plain, width).mean(2)

    def recorded(self, recorder: Recorder, moment: Moment, window: Callable[[int], Window]) -> dict[str, Tensor]:
        """Return the two means."""
        return {name: recorder.rowwise[name] for name in ("mean", "length")}


def _weights_digest(model: PreTrainedModel) -> str:
    """Return a digest of some numbers of every parameter in memory, and of the model's type."""
    state = hashlib.sha256(str(model.dtype).encode())
    by_device: dict[torch.device, list[Tensor]] = {}
    for parameter in model.parameters():
        if not parameter.is_meta and parameter.numel():
            numbers = parameter.detach().reshape(-1)
            by_device.setdefault(parameter.device, []).append(numbers[:: max(1, len(numbers) // SAMPLED)][:SAMPLED])
    for parts in by_device.values():
        state.update(torch.cat([part.double() for part in parts]).cpu().numpy().tobytes())
    return state.hexdigest()
