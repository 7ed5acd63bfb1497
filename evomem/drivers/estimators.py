"""Driver: policy-gradient estimators, as pure functions of rewards and ∇θ log π.

A *group* is several rollouts of one policy on the same context at the same budget. The baseline of a reward is made of
the other rollouts of its group: contexts differ in difficulty by far more than rollouts of one context do.

Sources: Williams, "Simple statistical gradient-following algorithms" (1992); Kool, van Hoof, Welling (2019) for
leave-one-out; Schulman et al. (2017) and DeepSeekMath (arXiv 2402.03300) for clipped ratios and group advantages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from evomem.drivers.base import Array
from evomem.errors import ConfigError
from evomem.evaluation.measurement import Step
from evomem.statistics import leave_one_out

Baseline = Literal["leave_one_out", "none"]


@dataclass(frozen=True)
class Rollouts:
    """A group: what came of all candidates of a generation on one sample at one budget.

    Attributes
    ----------
    weight : of the group in the fitness; those of a generation add up to 1.
    rewards : (rollouts, decisions) fp64, reward to go of every decision; not finite where an evaluation failed.
    steps : the decisions of every rollout.
    """

    weight: float
    rewards: Array
    steps: Sequence[Sequence[Step]]

    def good(self) -> NDArray[np.bool_]:
        """Return which rollouts have a result: (rollouts,)."""
        finite = np.isfinite(self.rewards).all(axis=1)
        return finite & np.array([len(steps) == self.rewards.shape[1] for steps in self.steps])


def rewards_to_go(worth: Array, reading: Array, discount: float = 1.0) -> Array:
    """Return the reward to go of every decision: (rollouts, decisions).

    Parameters
    ----------
    worth : (rollouts,) the whole reward, what was read included.
    reading : (rollouts, decisions) what of it is for the tokens between each decision and the next: the decisions after
        them did not cause it.
    discount : γ in (0, 1]: what is read n decisions later counts γ^n. Below 1 the gradient leans to what a decision
        causes soon, and has far less noise where there are hundreds of decisions. The rest of ``worth`` counts in full.
    """
    total = np.zeros(len(worth))
    to_go = np.empty_like(reading)
    for decision in range(reading.shape[1] - 1, -1, -1):
        total = reading[:, decision] + discount * total
        to_go[:, decision] = total
    return np.asarray((worth - reading.sum(axis=1))[:, None] + to_go, dtype=np.float64)


def advantages(rewards: Array, baseline: Baseline = "leave_one_out", *, normalise: bool = False) -> Array:
    """Return advantages (rollouts, decisions) of the rewards to go of a group.

    ``leave_one_out`` subtracts the mean of the *other* rollouts, so that the gradient stays unbiased. ``normalise``
    divides by the group's standard deviation (GRPO); a group whose rewards are all equal has no advantages.
    """
    count = len(rewards)
    advantage = rewards.copy()
    if baseline == "leave_one_out":
        if count < 2:
            return np.zeros_like(rewards)
        advantage = leave_one_out(rewards)
    if normalise:
        deviation = rewards.std(axis=0)
        advantage = np.divide(advantage, deviation, out=np.zeros_like(advantage), where=deviation > 1e-12)
    return advantage


def group_gradient(group: Rollouts, advantage: Array) -> Array:
    """Return a group's estimate of the gradient of the mean reward: (parameters,), a mean over its good rollouts.

    advantage : (good rollouts, decisions). A step that holds a gradient of the fitness itself takes no advantage.

    Raises
    ------
    ConfigError : the rollouts hold no gradients.
    """
    good = [steps for steps, fine in zip(group.steps, group.good(), strict=True) if fine]
    if not good or not any(good):
        raise ConfigError("driver: the rollouts of a group hold no decision, hence no gradient")
    total = np.zeros(0)
    for steps, row in zip(good, advantage, strict=True):
        for step, value in zip(steps, row, strict=True):
            packed = step.gradient if step.ascent or value >= 0 or not step.lower else step.lower
            part = (1.0 if step.ascent else value) * Step.numbers(packed)
            total = total + part if total.size else part
    return np.asarray(total / len(good), dtype=np.float64)


def combined(gradients: Sequence[Array], weights: Sequence[float]) -> tuple[Array, float]:
    """Return the weighted mean of the groups' gradients (parameters,), and the variance of that mean.

    The variance is the trace of its covariance, estimated from the differences between groups; NaN with one group.
    """
    shares = np.asarray(weights) / np.sum(weights)
    stacked = np.stack(list(gradients))
    mean = shares @ stacked
    if len(stacked) < 2:
        return mean, float("nan")
    squares = ((stacked - mean) ** 2).sum(axis=1)
    return mean, float((shares**2 * squares).sum() * len(stacked) / (len(stacked) - 1))
