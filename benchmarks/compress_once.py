"""Evaluation: the fast way of `Evaluator` against one candidate at a time, protocol ``compress_once``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.measuring import Line, Setting, candidates, in_turns, line, ratios, timed
from evomem.evaluation import Evaluator, PrefillStore
from evomem.managers import MemoryManager

NAME = "evaluator.compress_once"


def feature_scorer(setting: Setting) -> Iterator[Line]:
    """Speed-up and efficiency with linear scorers over 20 features."""
    sizes = setting.sizes
    speedups, cold, bound = _speedups(
        setting, NAME, candidates("feature_scorer", sizes.population, budget=sizes.budget)
    )
    yield line(f"{NAME}.speedup", speedups)
    yield line(f"{NAME}.speedup_first_generation", cold)
    yield line(f"{NAME}.bound", [bound])
    yield line(f"{NAME}.efficiency", [speedup / bound for speedup in speedups])


def bam(setting: Setting) -> Iterator[Line]:
    """Efficiency with NAMM's backward attention memory."""
    sizes = setting.sizes
    name = f"{NAME}.efficiency_bam"
    managers = candidates("namm_bam", sizes.population, scorer="bam", selection="capped", budget=sizes.budget)
    speedups, _, bound = _speedups(setting, name, managers)
    yield line(name, [speedup / bound for speedup in speedups])


def _speedups(setting: Setting, name: str, managers: Sequence[MemoryManager]) -> tuple[list[float], list[float], float]:
    """Return speed-ups with the context in the store, speed-ups with reading it, and the bound in tokens."""
    task, sample = setting.needle(setting.sizes.context)
    store = PrefillStore()
    evaluator = Evaluator(setting.loaded, store=store)
    plain = min(setting.sizes.plain, len(managers))

    def one_by_one() -> float:
        return timed(lambda: [evaluator.evaluate_plainly(manager, sample, task) for manager in managers[:plain]])

    def together() -> float:
        return timed(lambda: evaluator.evaluate(managers, sample, task))

    def together_first() -> float:
        store.close()  # empty: this side reads the context, and leaves it there for the next one
        return together()

    sides = {"plain": one_by_one, "first": together_first, "fast": together}
    seconds = in_turns(name, sides, setting.rounds(5))
    store.close()
    tokens = evaluator.tokens(sample)
    asked = tokens.prompt.shape[1] + tokens.answer.shape[1]
    scale = len(managers) / plain
    return (
        ratios(seconds["plain"], seconds["fast"], scale),
        ratios(seconds["plain"], seconds["first"], scale),
        (tokens.read.shape[1] + asked) / asked,
    )
