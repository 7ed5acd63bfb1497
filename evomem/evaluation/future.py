"""Evaluation: what question and answer do with every slot of a context, with the whole context in memory.

It is computed once a sample and kept; no candidate changes it. Objectives, the oracle and traces set decisions against
it.

Source of the quantities: KVP (arXiv 2602.10238) and ForesightKV (arXiv 2602.03203) use the attention of later tokens as
the target of a policy.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from evomem.evaluation.sample_tokens import Tokens
from evomem.evaluation.store import Reading, token_key
from evomem.memory import LayerView, SlotCache, attached
from evomem.modes import outside_inference_mode

if TYPE_CHECKING:
    from evomem.evaluation.evaluator import Evaluator

LIMIT = 4096
"""Samples whose future attention is remembered (about 0.6 MB each for 500 tokens and 90 heads)."""

_WATCHED = {"paid": "window_attention", "peak": "window_peak", "next_use": "window_next_use"}


class Future(NamedTuple):
    """What question and answer do with the context's slots: per layer (1, kv_heads, slots of the context) fp32.

    Attributes
    ----------
    paid : attention, mean over the query heads of the group and over the tokens.
    peak : attention, the largest of the group per token, summed over the tokens: f of KVP's trace reward.
    next_use : the first token, counted from 0, that uses the slot (see `evomem.memory.observations`); their number if
    none.
    """

    paid: tuple[Tensor, ...]
    peak: tuple[Tensor, ...]
    next_use: tuple[Tensor, ...]


class Known(Protocol):
    """A context that was read before, and what its question and answer did with it."""

    @property
    def views(self) -> tuple[LayerView, ...]:
        """One view a layer, nothing evicted."""
        ...

    @property
    def future(self) -> Future:
        """The future attention."""
        ...


class KnownSamples(Protocol):
    """A store of contexts that were read before (`evomem.evaluation.traces.store.Traces`)."""

    def get(self, key: str) -> Known | None:
        """Return the sample called ``key`` (`sample_key`), or None."""
        ...


@dataclass
class FutureAttention:
    """What a sample's question and answer do with its context, by the sample's tokens, computed once."""

    known: OrderedDict[str, Future] = field(default_factory=OrderedDict)

    def of(self, evaluator: Evaluator, tokens: Tokens, key: str, observes: frozenset[str]) -> Future:
        """Return what the question's and answer's tokens do with every slot of the whole context.

        tokens, key : of the sample, see `sample_key`. observes : of the reading that is used or made.
        """
        if key not in self.known:
            reading = evaluator.reading(tokens.read, observes)
            names = {part: f"future/{key}/{part}" for part in Future._fields}
            if not all(name in view.memo for view in reading.views for name in names.values()):
                self._look(evaluator, tokens, reading, names)
            # It may have come with the reading, from another process.
            parts = {part: tuple(view.memo[name] for view in reading.views) for part, name in names.items()}
            self.known[key] = Future(**parts)
            while len(self.known) > LIMIT:
                self.known.popitem(last=False)
        return self.known[key]

    @outside_inference_mode()
    @torch.no_grad()
    def _look(self, evaluator: Evaluator, tokens: Tokens, reading: Reading, names: dict[str, str]) -> None:
        """Let the model read question and answer after the whole context; the attention goes into the views' memos."""
        fed = torch.cat((tokens.prompt, tokens.answer[:, :-1]), 1)
        watched = {part: f"{kind}:{fed.shape[1]}" for part, kind in _WATCHED.items()}
        with attached(evaluator.loaded.model):
            recording = evaluator.recording_policy(frozenset(watched.values()))
            cache = SlotCache.from_views(reading.views, recording, model=evaluator.loaded.model)
            evaluator.forward(fed, cache, 1)
        for view, layer in zip(reading.views, cache.layers, strict=True):
            recorded = layer.view().recorded
            for part, name in names.items():
                view.memo[name] = recorded[watched[part]][:, :, : reading.tokens].clone()


def sample_key(tokens: Tokens) -> str:
    """Return a key made of the sample's tokens; ids do not serve, because a task has the same ones at every length."""
    return "/".join(token_key(part) for part in (tokens.read, tokens.prompt, tokens.answer))


def slot_bytes(view: LayerView, fades: Tensor) -> Tensor:
    """Return the bytes of a slot that one KV head keeps, float64 in the shape of ``fades`` (bool).

    A slot that may fade holds its log-decay too.
    """
    size = (view.keys.shape[-1] + view.values.shape[-1]) * view.keys.element_size() + view.slots.element_size()
    return size + fades.double() * torch.float32.itemsize
