"""Evaluation: how much of the attention that question and answer will pay falls on what a manager kept.

With the whole context in memory, the frozen model attends to some of its slots while it reads the question and the
(given) answer. A decision that keeps those slots loses little. The share that is kept, per layer and KV head, needs no
model call per candidate, and a head's share depends on the decision about that head only, so a search can improve all
heads side by side. It stands in for the likelihood; winners are still chosen and reported by the likelihood.

Source of the quantity: KVP (arXiv 2602.10238) and ForesightKV (arXiv 2602.03203) use the attention of later tokens as
the target of a policy.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from evomem.devices import stacked
from evomem.errors import ConfigError
from evomem.evaluation.measurement import Evaluation
from evomem.evaluation.population import PopulationPolicy
from evomem.evaluation.store import Reading, token_key
from evomem.managers.base import MemoryManager
from evomem.memory import LayerView, SlotCache, attached
from evomem.modes import outside_inference_mode
from evomem.tasks.base import Sample

if TYPE_CHECKING:
    from evomem.evaluation.evaluator import Evaluator, Tokens

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
        """Let the model read question and answer after the whole context, and leave what it looked at in the memos."""
        fed = torch.cat((tokens.prompt, tokens.answer[:, :-1]), 1)
        watched = {part: f"{kind}:{fed.shape[1]}" for part, kind in _WATCHED.items()}
        with attached(evaluator.loaded.model):
            watching = evaluator.watching(frozenset(watched.values()))
            cache = SlotCache.from_views(reading.views, watching, model=evaluator.loaded.model)
            evaluator.forward(fed, cache, 1)
        for view, layer in zip(reading.views, cache.layers, strict=True):
            recorded = layer.view().recorded
            for part, name in names.items():
                view.memo[name] = recorded[watched[part]][:, :, : reading.tokens].clone()


def sample_key(tokens: Tokens) -> str:
    """Return what a sample is called by its content; a task of another length gives its samples the same ids."""
    return "/".join(token_key(part) for part in (tokens.read, tokens.prompt, tokens.answer))


def slot_bytes(view: LayerView, fades: Tensor) -> Tensor:
    """Return what a slot of all KV heads takes in memory once it is kept: bytes, of the shape of ``fades`` (bool).

    A slot that may fade holds its log-decay too.
    """
    size = (view.keys.shape[-1] + view.values.shape[-1]) * view.keys.element_size() + view.slots.element_size()
    return view.keys.shape[1] * (size + fades.float() * torch.float32.itemsize)


@outside_inference_mode()
@torch.no_grad()
def retained_attention(
    evaluator: Evaluator, managers: Sequence[MemoryManager], sample: Sample, observes: frozenset[str] = frozenset()
) -> list[Evaluation]:
    """Return evaluations with `Evaluation.heads`; the protected ends' attention counts like any other.

    Raises `ConfigError` under the streaming protocol, where what is read depends on earlier decisions.
    """
    if evaluator.protocol.kind != "compress_once":
        raise ConfigError("objective 'attention' needs the protocol compress_once: one decision about a whole context")
    if not managers:
        return []
    begin = time.perf_counter()
    tokens = evaluator.tokens(sample)
    policy = PopulationPolicy([evaluator.scheduled(manager) for manager in managers])
    misses = evaluator.store.misses
    observes = policy.observes | observes
    reading = evaluator.reading(tokens.read, observes)
    read = reading.tokens if evaluator.store.misses > misses else 0
    asked = tokens.prompt.shape[1] + tokens.answer.shape[1] - 1
    key = sample_key(tokens)
    first = key not in evaluator.future.known
    future = evaluator.future.of(evaluator, tokens, key, observes)
    shares, kept, held = [], [], torch.zeros(len(managers), dtype=torch.float32)
    for view, paid in zip(reading.views, future.paid, strict=True):
        keep = policy.decide(view).keep
        total = paid.sum(-1)
        # A head that looks at nothing of the context (a window that ends after it) loses nothing by any decision.
        share = torch.where(total > 0, (paid * keep).sum(-1) / total.clamp(min=1e-9), 1.0)
        shares.append(share)
        counts = keep.sum(-1)
        kept.append(counts.float().mean(-1))
        held = held + counts.amax(-1).float().cpu() * slot_bytes(view, policy.fades(view.layer))
    table = stacked(shares, 1).double().cpu()
    slots = stacked(kept, 1).mean(1).tolist()
    seconds = (time.perf_counter() - begin) / len(managers)
    return [
        Evaluation(
            sample=sample.id,
            loglik=float("nan"),
            exact=None,
            slots=slots[i],
            bytes_peak=float(held[i]),
            bytes_mean=float(held[i]),
            tokens=(read + (asked if first else 0)) if i == 0 else 0,
            seconds=seconds,
            # Rounded, because the journal keeps one number a head and candidate.
            heads=tuple(tuple(round(value, 5) for value in row) for row in table[i].tolist()),
        )
        for i in range(len(managers))
    ]
