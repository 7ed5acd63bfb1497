"""Evaluation: the fast way of `Evaluator` against one candidate at a time, protocol ``streaming``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.measuring import Line, Setting, candidates, in_turns, line, ratios, timed
from evomem.errors import EvomemError
from evomem.evaluation import EvaluationProtocol, Evaluator
from evomem.managers.features import LINEAR_20, required
from evomem.tasks import Sample, Tokenizer

NAME = "evaluator.streaming.speedup"
FEATURES = tuple(name for name in LINEAR_20 if "attention_spectrum" not in required((name,)))
"""The spectrum, whose recording the population does not share, is `benchmarks.namm_shares`' subject."""


def run(setting: Setting) -> Iterator[Line]:
    """Speed-up with linear scorers, for a context of a whole number of decisions."""
    sizes = setting.sizes
    managers = candidates("feature_scorer", sizes.population, features=FEATURES, budget=sizes.streaming_budget)
    task, longer = setting.needle(sizes.streaming_context + 256)
    sample = cut(longer, setting.loaded.tokenizer, sizes.streaming_context)
    protocol = EvaluationProtocol(kind="streaming", every=sizes.streaming_every)
    evaluator = Evaluator(setting.loaded, protocol)
    plain = min(sizes.plain, len(managers))

    def one_by_one() -> float:
        return timed(lambda: [evaluator.evaluate_plainly(manager, sample, task) for manager in managers[:plain]])

    def together() -> float:
        return timed(lambda: evaluator.evaluate(managers, sample, task))

    seconds = in_turns(NAME, {"plain": one_by_one, "fast": together}, setting.rounds(3))
    yield line(NAME, ratios(seconds["plain"], seconds["fast"], len(managers) / plain))


def cut(sample: Sample, tokenizer: Tokenizer, length: int) -> Sample:
    """Return the sample with the first ``length`` tokens of its context.

    Raises
    ------
    EvomemError : the context has no beginning of that length.
    """
    # Counted on the text, because tokens that are decoded and encoded again need not be the same.
    low, high = 0, len(sample.context)
    while low < high:
        middle = (low + high) // 2
        if len(tokenizer.encode(sample.context[:middle], add_special_tokens=False)) < length:
            low = middle + 1
        else:
            high = middle
    for end in range(low, min(low + 64, len(sample.context)) + 1):
        context = sample.context[:end]
        if len(tokenizer.encode(context, add_special_tokens=False)) == length:
            return replace(sample, context=context)
    raise EvomemError(f"benchmark {NAME}: sample {sample.id} has no beginning of exactly {length} tokens")
