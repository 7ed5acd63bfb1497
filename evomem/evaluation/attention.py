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
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evomem.cache import SlotCache, attached
from evomem.errors import ConfigError
from evomem.evaluation.population import PopulationPolicy
from evomem.evaluation.store import token_key
from evomem.evaluation.types import Evaluation
from evomem.managers.base import MemoryManager
from evomem.tasks.base import Sample

if TYPE_CHECKING:
    from evomem.evaluation.evaluator import Evaluator, Tokens

LIMIT = 4096
"""Samples whose future attention is remembered (about 0.2 MB each for 500 tokens and 90 heads)."""


@dataclass
class FutureAttention:
    """Future attention by the sample's tokens, computed once: per layer (1, kv_heads, slots of the context) fp32."""

    known: OrderedDict[str, tuple[Tensor, ...]] = field(default_factory=OrderedDict)

    def of(self, evaluator: Evaluator, tokens: Tokens, key: str, observes: frozenset[str]) -> tuple[Tensor, ...]:
        """Return the mean attention of the question's and answer's tokens to every slot of the context."""
        if key not in self.known:
            reading = evaluator.reading(tokens.read, observes)
            name = f"future/{key}"
            if all(name in view.memo for view in reading.views):  # it came with the reading, from another process
                self.known[key] = tuple(view.memo[name] for view in reading.views)
                return self.known[key]
            fed = torch.cat((tokens.prompt, tokens.answer[:, :-1]), 1)
            window = f"window_attention:{fed.shape[1]}"
            with attached(evaluator.loaded.model):
                watching = evaluator.watching(frozenset({window}))
                cache = SlotCache.from_views(reading.views, watching, model=evaluator.loaded.model)
                evaluator.forward(fed, cache, 1)
            views = (layer.view() for layer in cache.layers)
            self.known[key] = tuple(view.recorded[window][:, :, : reading.tokens].clone() for view in views)
            for view, attention in zip(reading.views, self.known[key], strict=True):
                view.memo[name] = attention
            while len(self.known) > LIMIT:
                self.known.popitem(last=False)
        return self.known[key]


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
    # By content and not by id: a task of another length calls its samples the same.
    key = "/".join(token_key(part) for part in (tokens.read, tokens.prompt, tokens.answer))
    first = key not in evaluator.future.known
    future = evaluator.future.of(evaluator, tokens, key, observes)
    shares, kept, held = [], [], torch.zeros(len(managers))
    for view, paid in zip(reading.views, future, strict=True):
        keep = policy.decide(view).keep
        share = (paid * keep).sum(-1) / paid.sum(-1).clamp(min=1e-9)
        shares.append(share)
        counts = keep.sum(-1)
        kept.append(counts.float().mean(-1))
        per_token = view.keys.shape[1] * (view.keys.shape[-1] + view.values.shape[-1]) * view.keys.element_size()
        held = held + counts.amax(-1).float().cpu() * (per_token + view.keys.shape[1] * view.slots.element_size())
    table = torch.stack(shares, 1).double().cpu()
    slots = torch.stack(kept, 1).mean(1).tolist()
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
