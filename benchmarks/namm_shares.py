"""Manager: how much of a streaming prefill NAMM's decisions and its observations take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.attention import step
from benchmarks.measuring import Line, Setting, in_turns, line, timed
from evomem.cache import CachePolicy, Decision, LayerView, SlotCache, attached
from evomem.managers import NAMM, Schedule

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


@torch.no_grad()
def run(setting: Setting) -> Iterator[Line]:
    """Shares of the whole, from three variants: NAMM (A), its decisions left out (B), its observations too (C)."""
    sizes, model = setting.sizes, setting.loaded.model
    tokens = setting.tokens(1, sizes.namm_context)
    manager = full_namm(sizes.namm_every, sizes.namm_budget)
    observing = Newest(sizes.namm_budget, manager.schedule, manager.observes)
    bare = Newest(sizes.namm_budget, manager.schedule)

    def reading(policy: CachePolicy) -> float:
        with attached(model):
            cache = SlotCache.for_model(model, policy)
            return timed(lambda: step(model, tokens, cache))

    seconds = in_turns(
        "namm.shares",
        {"namm": lambda: reading(manager), "observing": lambda: reading(observing), "bare": lambda: reading(bare)},
        setting.rounds(3),
    )
    rounds = list(zip(seconds["namm"], seconds["observing"], seconds["bare"], strict=True))
    yield line(DECIDE, [(a - b) / a for a, b, _ in rounds])
    yield line(OBSERVE, [(b - c) / a for a, b, c in rounds])
