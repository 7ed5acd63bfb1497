"""Evaluation: objective ``attention``, the share of the attention to come that falls on what a manager keeps.

With the whole context in memory, the frozen model attends to some of its slots while it reads the question and the
(given) answer (`evomem.evaluation.future`). A decision that keeps those slots loses little. The share that is kept, per
layer and KV head, needs no model call per candidate, and a head's share depends on the decision about that head only,
so a search can improve all heads side by side. It stands in for the likelihood; winners are reported by the likelihood.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from evomem.devices import stacked
from evomem.errors import ConfigError
from evomem.evaluation.future import sample_key, slot_bytes
from evomem.evaluation.measurement import Evaluation, Measurement
from evomem.evaluation.measures import Draws, Measure, register_measure
from evomem.evaluation.objectives.base import PerHeadMean, register_objective
from evomem.evaluation.population import PopulationPolicy
from evomem.managers.base import MemoryManager
from evomem.memory.kv.due import decisions
from evomem.modes import outside_inference_mode
from evomem.tasks.base import Sample, Task

if TYPE_CHECKING:
    from evomem.evaluation.evaluator import Evaluator


@register_objective("attention")
class Attention(PerHeadMean):
    """Share of the attention that question and answer pay to the context that falls on kept slots, mean over heads."""

    measurement = Measurement.of("attention")
    per_head_value = "head_attention"
    unit = "share of the attention to come"
    protocols = frozenset({"compress_once"})


@register_measure("attention")
class RetainedAttention(Measure):
    """Gives ``head_attention``, without a model call per candidate."""

    def evaluations(
        self,
        evaluator: Evaluator,
        managers: Sequence[MemoryManager],
        sample: Sample,
        task: Task,
        measurement: Measurement,
        draws: Draws,
    ) -> list[Evaluation]:
        """Return the evaluations; see `Measure.evaluations`."""
        return retained_attention(evaluator, managers, sample, measurement.observes)


@outside_inference_mode()
@torch.no_grad()
def retained_attention(
    evaluator: Evaluator, managers: Sequence[MemoryManager], sample: Sample, observes: frozenset[str] = frozenset()
) -> list[Evaluation]:
    """Return evaluations with the value ``head_attention``; the protected ends' attention counts like any other.

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
    answering = tokens.prompt.shape[1] + tokens.answer.shape[1] - 1
    key = sample_key(tokens)
    first = key not in evaluator.future.known
    future = evaluator.future.of(evaluator, tokens, key, observes)
    shares, kept, sizes = [], [], torch.zeros(len(managers), dtype=torch.float64)
    for view, paid, decision in zip(reading.views, future.paid, decisions(policy, reading.views), strict=True):
        keep = decision.keep
        total = paid.sum(-1)
        # A head that looks at nothing of the context (a window that ends after it) loses nothing by any decision.
        share = torch.where(total > 0, (paid * keep).sum(-1) / total.clamp(min=1e-9), 1.0)
        shares.append(share)
        counts = keep.sum(-1)
        kept.append(counts.float().mean(-1))
        sizes = sizes + counts.sum(-1).double().cpu() * slot_bytes(view, policy.fades(view.layer))
    table = stacked(shares, 1).double().cpu()
    slots = stacked(kept, 1).mean(1).tolist()
    seconds = (time.perf_counter() - begin) / len(managers)
    return [
        Evaluation(
            sample=sample.id,
            # Rounded, because the journal keeps one number a head and candidate.
            values={"head_attention": tuple(tuple(round(value, 5) for value in row) for row in table[i].tolist())},
            slots=slots[i],
            bytes_peak=float(sizes[i]),
            bytes_mean=float(sizes[i]),
            tokens=(read + (answering if first else 0)) if i == 0 else 0,
            seconds=seconds,
        )
        for i in range(len(managers))
    ]
