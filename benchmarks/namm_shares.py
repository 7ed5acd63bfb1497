"""Manager: how much of a streaming prefill NAMM's decisions and its observations take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.attention import step
from benchmarks.measuring import Line, Setting, in_turns, line, ratios, timed
from evomem.managers import NAMM, MemoryManager, Schedule
from evomem.memory import CachePolicy, Decision, LayerView, SlotCache, attached

DECIDE, OBSERVE = "namm.decide_share", "namm.observe_share"


@dataclass(frozen=True)
class Newest:
    """A cache policy that keeps the newest ``budget`` slots: as many as a capped NAMM, at hardly any cost."""

    budget: int
    schedule: Schedule
    observes: frozenset[str] = frozenset()

    def decide(self, view: LayerView) -> Decision:
        """Keep the last slots of every head."""
        keep = torch.zeros_like(view.valid)
        keep[..., -self.budget :] = True
        return Decision(keep & view.valid)


def full_namm(every: int, budget: int) -> NAMM:
    """Return a NAMM with random weights whose threshold passes everything: it keeps ``budget`` slots exactly."""
    manager = NAMM(scorer="bam", selection="capped", every=every, budget=budget)
    random = np.random.default_rng(0)
    manager.from_vector(0.065 * random.standard_normal(len(manager.to_vector())))
    with torch.no_grad():
        manager.get_parameter("scorer.score_bias").fill_(1e3)
    return manager


class Stopwatch:
    """A cache policy that decides as a manager does, and adds up the seconds that its decisions take."""

    def __init__(self, manager: MemoryManager) -> None:
        self.manager = manager
        self.schedule, self.observes = manager.schedule, manager.observes
        self.seconds = 0.0

    def decide(self, view: LayerView) -> Decision:
        """Let the manager decide, under the clock."""
        settle(view.keys)
        begin = time.perf_counter()
        decision = self.manager.decide(view)
        settle(decision.keep)
        self.seconds += time.perf_counter() - begin
        return decision


def settle(tensor: torch.Tensor) -> None:
    """Wait until an accelerator has done what it was told, so that the clock does not stop before the work does."""
    if tensor.device.type != "cpu":
        torch.accelerator.synchronize(tensor.device)


@torch.no_grad()
def run(setting: Setting) -> Iterator[Line]:
    """Shares of a whole prefill: what decisions take, by the clock; what observing takes, by leaving it out.

    Decisions are calls of their own, so a clock around them is exact; the difference of two prefills, one of which
    decides at no cost, would be lost in the noise of a machine whose prefills vary by a tenth.
    """
    sizes, model = setting.sizes, setting.loaded.model
    tokens = setting.tokens(1, sizes.namm_context)
    manager = full_namm(sizes.namm_every, sizes.namm_budget)
    observing = Newest(sizes.namm_budget, manager.schedule, manager.observes)
    bare = Newest(sizes.namm_budget, manager.schedule)
    deciding: list[float] = []

    def reading(policy: CachePolicy) -> float:
        with attached(model):
            cache = SlotCache.for_model(model, policy)
            return timed(lambda: step(model, tokens, cache))

    def managed() -> float:
        watch = Stopwatch(manager)
        whole = reading(watch)
        deciding.append(watch.seconds)
        return whole

    seconds = in_turns(
        "namm.shares",
        {"namm": managed, "observing": lambda: reading(observing), "bare": lambda: reading(bare)},
        setting.rounds(5),
    )
    yield line(DECIDE, ratios(deciding, seconds["namm"]))
    rounds = zip(seconds["namm"], seconds["observing"], seconds["bare"], strict=True)
    yield line(OBSERVE, [(b - c) / a for a, b, c in rounds])
