"""Evaluation: the plain way to the same numbers, one candidate at a time from an empty cache.

It shares nothing with the fast way but the tokens, the model's calls and the metric, so that tests can hold one against
the other.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from evomem.devices import stacked
from evomem.evaluation.likelihood import mean_loglik
from evomem.evaluation.measurement import LOGLIK, Evaluation, Measurement
from evomem.evaluation.population import Recording
from evomem.managers.base import MemoryManager
from evomem.memory import SlotCache, attached
from evomem.memory.observations.repeated_attention import REPEATED
from evomem.tasks.base import Sample, Task

if TYPE_CHECKING:
    from evomem.evaluation.evaluator import Evaluator


@torch.no_grad()
def evaluate_plainly(
    evaluator: Evaluator, manager: MemoryManager, sample: Sample, task: Task, measurement: Measurement = LOGLIK
) -> Evaluation:
    """One candidate from an empty cache, through nothing but ``manager.attach``: what `evaluate` must equal.

    measurement : of ``loglik`` and ``exact``; nothing else has a plain way here.
    """
    exact = "exact" in measurement
    begin = time.perf_counter()
    tokens, manager = evaluator.tokens(sample), evaluator.scheduled(manager).for_model(evaluator.loaded.model)
    streaming = evaluator.protocol.kind == "streaming"
    texts: list[str] | None = None
    generated = 0
    with manager.attach(evaluator.loaded.model) as cache:
        with cache.reading():
            evaluator.forward_in_pieces(tokens.read, cache, 1)
            if REPEATED in manager.observes:
                cache.repeat(again := evaluator.repetition(tokens.read))
                generated += again.shape[1]
        before = cache.nbytes() - recorded_bytes(cache)
        slots = float(stacked([s.float().mean() for s in cache.slots_held()]).mean())
        if exact and task.has_exact and sample.max_new_tokens:
            texts, written = evaluator.generate(cache.clone(), manager, tokens, sample.max_new_tokens)
            generated += written
        fed = torch.cat((tokens.prompt, tokens.answer[:, :-1]), 1)
        loglik = mean_loglik(evaluator.forward_in_pieces(fed, cache, tokens.answer.shape[1]), tokens.answer)[0]
    after = cache.nbytes() - recorded_bytes(cache)
    return Evaluation(
        sample=sample.id,
        values={"loglik": loglik} | ({} if texts is None else {"exact": task.score(sample, texts[0])}),
        slots=slots,
        bytes_peak=float(cache.bytes_peak if streaming else max(before, after)),
        bytes_mean=float(cache.bytes_mean if streaming else (before + after) / 2),
        tokens=tokens.read.shape[1] + generated + fed.shape[1],
        seconds=time.perf_counter() - begin,
    )


@torch.no_grad()
def loglik_without_context(evaluator: Evaluator, sample: Sample) -> float:
    """Mean log-likelihood of the answer when nothing but the question is read: what a task must beat."""
    prompt, answer = evaluator.without_context(sample)
    if not prompt.shape[1]:
        prompt = evaluator.tokens(sample).prompt
    with attached(evaluator.loaded.model):
        cache = SlotCache.for_model(evaluator.loaded.model, Recording())
        logits = evaluator.forward(torch.cat((prompt, answer[:, :-1]), 1), cache, answer.shape[1])
    return mean_loglik(logits, answer)[0]


def recorded_bytes(cache: SlotCache) -> int:
    """Bytes of the observations in a cache: after the only decision of ``compress_once`` nothing needs them."""
    tensors = [tensor for layer in cache.layers for tensor in layer.recorder.tensors()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
