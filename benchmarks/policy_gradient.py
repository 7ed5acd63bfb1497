"""Driver: policy gradients: how noisy the estimates are, whether they meet the closed form, and what rollouts cost."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from benchmarks.measuring import Line, Setting, in_turns, line, progress, ratios, timed
from evomem.evaluation import Evaluator
from evomem.evaluation.costs import ranking_costs
from evomem.evaluation.future import sample_key
from evomem.evaluation.measurement import Step
from evomem.evaluation.rollouts import rollouts as draw_rollouts
from evomem.evaluation.rollouts import sample_number
from evomem.managers import build, plackett_luce
from evomem.managers.stochastic import Noise, StochasticManager
from evomem.managers.vector import load_vector, vector_size
from evomem.memory import LayerView
from evomem.statistics import leave_one_out

VARIANCE, ERROR, SPEEDUP = "pg.variance_ratio", "pg.closed_form_error", "pg.rollouts_speedup"
GROUP = 8
AT_ONCE = 1000
"""Rankings that are drawn at once."""


def policy(**options: object) -> StochasticManager:
    """Return a policy with its default features and network, away from where it is silent, always the same."""
    manager = build("kv_policy", **options)
    assert isinstance(manager, StochasticManager)
    load_vector(manager, 0.1 * np.random.default_rng(0).standard_normal(vector_size(manager)))
    return manager


class Known:
    """A needle sample that the model has read, and a policy to rank its slots."""

    def __init__(self, setting: Setting) -> None:
        self.evaluator, self.manager = Evaluator(setting.loaded), policy()
        _, self.sample = setting.needle(setting.sizes.gradient_context)
        tokens = self.evaluator.tokens(self.sample)
        self.views = self.evaluator.reading(tokens.read, self.manager.observes).views
        key = sample_key(tokens)
        self.future = self.evaluator.future.of(self.evaluator, tokens, key, self.manager.observes).peak
        self.heads = sum(view.slots.shape[1] for view in self.views)

    def exact(self) -> Tensor:
        """Return the gradient of minus the expected cost: (parameters,)."""
        (found,) = ranking_costs(self.evaluator, [self.manager], self.sample, "expected", gradient=True)
        return torch.from_numpy(Step.numbers((found.steps or ())[0].gradient))

    def drawn(self, view: LayerView, seeds: range) -> tuple[Tensor, Tensor]:
        """Return one ranking a seed, and what it is worth: (seeds, kv_heads, slots) and (seeds, kv_heads)."""
        noise = Noise.of([(seed, sample_number(self.sample.id), 0) for seed in seeds], view)
        ranking = self.manager.draw(view, noise).ranking
        assert ranking is not None
        return ranking, -plackett_luce.trace_cost(self.future[view.layer].expand(len(seeds), -1, -1), ranking)

    def estimate(self, seeds: range) -> Tensor:
        """Return the mean of the groups' estimates with their own baselines: (parameters,).

        Σ A ∇ log π is the gradient of Σ A log π, so that one backward pass does for all seeds.
        """
        parameters = list(self.manager.parameters())
        total = torch.zeros(vector_size(self.manager), dtype=torch.float64)
        for view in self.views:
            with torch.no_grad():
                ranking, reward = self.drawn(view, seeds)
                grouped = reward.view(-1, GROUP, reward.shape[-1]).transpose(0, 1)
                advantage = leave_one_out(grouped).transpose(0, 1).reshape(reward.shape)
            scores = self.manager.score(view).expand(ranking.shape)
            worth = (advantage * plackett_luce.log_probs(scores, ranking).sum(-1)).sum() / (self.heads * len(seeds))
            parts = torch.autograd.grad(worth, parameters, allow_unused=True)
            flat = [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, parts, strict=True)]
            total += torch.cat(flat).double()
        return total

    def group(self, seeds: range) -> tuple[Tensor, Tensor]:
        """Return a group's estimate with its leave-one-out baseline, and with none: (parameters,) each."""
        found = ranking_costs(
            self.evaluator, [self.manager] * GROUP, self.sample, "drawn", seeds=list(seeds), gradient=True
        )
        mine = sum(torch.from_numpy(Step.numbers((one.steps or ())[0].gradient)) for one in found) / GROUP
        parameters = list(self.manager.parameters())
        without = torch.zeros_like(mine)
        for view in self.views:
            with torch.no_grad():
                ranking, reward = self.drawn(view, seeds)
            likely = plackett_luce.log_probs(self.manager.score(view).expand(ranking.shape), ranking).sum(-1)
            parts = torch.autograd.grad((reward * likely).sum() / (self.heads * GROUP), parameters, allow_unused=True)
            flat = [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, parts, strict=True)]
            without += torch.cat(flat).double()
        return mine, without


def estimators(setting: Setting) -> Iterator[Line]:
    """How far the mean estimate is from the exact gradient, and the variance with a group's baseline over without."""
    sizes = setting.sizes
    known = Known(setting)
    exact = known.exact()
    total, done = torch.zeros_like(exact), 0
    while done < sizes.gradient_samples:
        count = min(AT_ONCE, sizes.gradient_samples - done)
        total, done = total + count * known.estimate(range(done, done + count)), done + count
        error = float((total / done - exact).norm() / exact.norm())
        progress(ERROR, done, sizes.gradient_samples, f"relative error {error:.4f}")
    pairs = [known.group(range(GROUP * n, GROUP * (n + 1))) for n in range(sizes.gradient_groups)]
    spread = [float(torch.stack(side).var(0).sum()) for side in zip(*pairs, strict=True)]
    yield line(VARIANCE, [spread[0] / spread[1]])
    yield line(ERROR, [error])


def rollouts(setting: Setting) -> Iterator[Line]:
    """Seconds of 8 rollouts one at a time over those as rows of one batch, both from an empty cache."""
    task, sample = setting.needle(setting.sizes.rollout_context)
    manager, seeds = policy(budget=setting.sizes.budget), list(range(GROUP))

    def together() -> float:
        evaluator = Evaluator(setting.loaded)
        return timed(lambda: draw_rollouts(evaluator, manager, sample, task, seeds))

    def one_by_one() -> float:
        return sum(timed(lambda s=seed: draw_rollouts(Evaluator(setting.loaded), manager, sample, task, [s]))  # type: ignore[misc]
                   for seed in seeds)  # fmt: skip

    together()
    seconds = in_turns(SPEEDUP, {"one by one": one_by_one, "together": together}, setting.rounds(3))
    yield line(SPEEDUP, ratios(seconds["one by one"], seconds["together"]))
