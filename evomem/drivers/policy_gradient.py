"""Driver: policy gradient: several rollouts of one policy on the same contexts, and a step along their gradient.

Where the objective has an exact gradient (``expected_cost``: the closed form, no sampling) a generation is one
candidate, the policy itself. Otherwise it is ``population`` rollouts, which differ in their sampling seed only, and the
gradient is estimated by REINFORCE with a leave-one-out baseline, or by clipped passes over the same rollouts (GRPO with
PPO's clip). Formulas: `evomem.drivers.estimators`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from evomem.bounds import LARGE
from evomem.drivers.base import Array, Driver, Fitness, Population, Stage, drivers
from evomem.drivers.common import DriverOptions, sampling_seeds
from evomem.drivers.estimators import Baseline, advantages, combined, group_gradient
from evomem.errors import ConfigError, FitnessError
from evomem.evaluation.measurement import Step


class PolicyGradientOptions(DriverOptions):
    """Options of `PolicyGradient`; ``popsize`` is the rollouts of a context (8), ``sigma`` is not used.

    Attributes
    ----------
    estimator : ``reinforce``, or ``grpo``: advantages divided by their deviation, several passes with clipped ratios.
    baseline : what is subtracted from a reward: the mean of the context's other rollouts, or nothing.
    normalise : divide advantages by their deviation within the context; by default what the estimator does.
    passes : steps along each set of rollouts; 1 for ``reinforce``, 2 for ``grpo``.
    learning_rate, exact_learning_rate : AdamW's, in units of the vector, for sampled and for exact gradients.
    decay : the last share of a stage in which the learning rate falls to zero.
    weight_decay, beta1, beta2 : AdamW's.
    clip_norm : longest gradient; a longer one is shortened.
    rollout_heads : let sampled gradients move weights that act on one KV head only, too. By default they stay where the
        exact gradient has brought them: one reward for all heads says little about any one of them, and thousands of
        weights that each follow noise undo what the few common ones gain.
    ema : weight of the past in the average of the parameters that stands for the search's result; 0: the newest ones.
    entropy : reward for random decisions, per random choice, in units of the fitness a nat.
    """

    estimator: Literal["reinforce", "grpo"] = "reinforce"
    baseline: Baseline = "leave_one_out"
    normalise: bool | None = None
    passes: int | None = Field(default=None, ge=1, le=100)
    learning_rate: float = Field(default=0.02, gt=0, le=LARGE, allow_inf_nan=False)
    exact_learning_rate: float = Field(default=0.05, gt=0, le=LARGE, allow_inf_nan=False)
    decay: float = Field(default=0.4, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0, le=LARGE, allow_inf_nan=False)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.99, ge=0, lt=1)
    clip_norm: float = Field(default=1.0, gt=0, le=LARGE)
    rollout_heads: bool = False
    ema: float = Field(default=0.8, ge=0, lt=1)
    entropy: float = Field(default=0.0, ge=0, le=LARGE, allow_inf_nan=False)


_STATE = ("_average", "_begin", "_end", "_pass", "_draw", "_exact", "_behaviour", "_reference")


@drivers.register("policy_gradient")
class PolicyGradient(Driver):
    """Gradient ascent on one policy: exact, by REINFORCE with leave-one-out, or by GRPO with clipped ratios (torch).

    Parameters
    ----------
    dim, start, seed : length of a vector, first parameters (dim,), seed of everything random.
    blocks : for every KV head, the indices of its part of the vector (`SearchSpace.blocks`).
    options : `PolicyGradientOptions`.
    """

    Options = PolicyGradientOptions
    uses = frozenset({"rollouts"})
    takes = frozenset({"blocks"})
    options: PolicyGradientOptions

    def __init__(
        self, dim: int, start: Array, seed: int, *, blocks: Sequence[NDArray[np.int64]] = (), **options: Any
    ) -> None:
        super().__init__(dim, start, seed, **options)
        o = self.options
        own = np.concatenate([np.zeros(0, dtype=np.int64), *blocks])
        self._learned = np.arange(dim) if o.rollout_heads else np.setdiff1d(np.arange(dim), own)
        self.passes = o.passes or (2 if o.estimator == "grpo" else 1)
        if o.estimator == "reinforce" and self.passes > 1:
            raise ConfigError(
                "driver 'policy_gradient': reinforce takes one step along its rollouts, because after it they are "
                "another policy's; for more passes take estimator: grpo, which clips the ratios"
            )
        self._theta = torch.from_numpy(self.start.copy()).requires_grad_(True)
        self._optimiser = torch.optim.AdamW(
            [self._theta], lr=o.learning_rate, betas=(o.beta1, o.beta2), weight_decay=o.weight_decay
        )
        self._average = self._vector()
        self._begin = self._end = self._pass = self._draw = 0
        self._exact = False
        self._behaviour: Array | None = None
        self._reference: Array | None = None

    def _vector(self) -> Array:
        return np.array(self._theta.detach().numpy(), dtype=np.float64)

    def _population_size(self) -> int:
        return self.options.popsize or 8  # rollouts of a context

    def _enter(self, stage: Stage) -> None:
        begin, end, exact = stage.begin, stage.end, stage.exact
        if (begin, end, exact) == (self._begin, self._end, self._exact):
            return
        self._begin, self._end, self._exact = begin, end, exact
        self._pass, self._draw, self._behaviour = 0, begin, None
        if begin:  # steps of another objective say nothing of this one's
            self._optimiser.state.clear()
        self._reference = None if exact else self._vector()

    def _ask(self) -> Array:
        """Return equal vectors, a candidate where the gradient is exact."""
        if self._pass == 0:
            self._behaviour = None
        return np.tile(self._vector(), (1 if self._exact else self.popsize, 1))

    def _population(self, vectors: Array) -> Population:
        """Return candidates that differ in their seeds; all passes over the same rollouts have the same ones."""
        return Population(
            self.generation,
            vectors,
            sampling_seeds(self.seed, self._draw, len(vectors)),
            draw=self._draw,
            behaviour=self._behaviour,
            reference=self._reference,
            learns=None if self._exact or len(self._learned) == self.dim else self._learned,
        ).copy()

    def _without_holes(self, fitness: Fitness, count: int) -> Fitness:
        """Return the fitness as it is: the groups hold it apart, and say which rollouts have none."""
        return fitness

    def _tell(self, vectors: Array, fitness: Fitness) -> None:
        """Step along the gradient of the groups; raise `FitnessError` if none has a result."""
        gradients, weights, values = [], [], []
        for group in fitness.rollouts:
            good = group.good()
            if not good.any():
                continue
            rewards = group.rewards[good]
            steps = [steps for steps, fine in zip(group.steps, good, strict=True) if fine]
            values += [step for one in steps for step in one]
            advantage = self._advantages(rewards, steps)
            gradients.append(self._full_gradient(group_gradient(group, advantage)))
            weights.append(group.weight)
        if not gradients:
            raise FitnessError("driver 'policy_gradient': no rollout of the generation has a finite reward")
        gradient, variance = combined(gradients, weights)
        norm = float(np.linalg.norm(gradient))
        rate = self._rate()
        self._step(gradient * min(1.0, self.options.clip_norm / norm) if norm else gradient, rate)
        self.diagnostics = _diagnostics(norm, variance, rate, values, reference=self._reference is not None)
        if not self._exact:
            self._behaviour = np.array(vectors[0]) if self._pass == 0 else self._behaviour
            self._pass = (self._pass + 1) % self.passes
        self._draw += self._pass == 0

    def _full_gradient(self, part: Array) -> Array:
        """Return the gradient (dim,), which is 0 outside of the learned coordinates.

        part : the gradient in all coordinates, or in the learned ones.
        """
        if self._exact:
            return part
        gradient = np.zeros(self.dim)
        gradient[self._learned] = part if len(part) == len(self._learned) else part[self._learned]
        return gradient

    def _advantages(self, rewards: Array, steps: Sequence[Sequence[Step]]) -> Array:
        o = self.options
        if o.entropy and not self._exact:
            # Reward to go with -log π: the soft policy gradient, whose baseline is the context's too.
            surprise = np.array([[-step.log_prob / max(1, step.choices) for step in one] for one in steps])
            rewards = rewards + o.entropy * np.cumsum(surprise[:, ::-1], axis=1)[:, ::-1]
        normalise = o.estimator == "grpo" if o.normalise is None else o.normalise
        return advantages(rewards, o.baseline, normalise=normalise)

    def _rate(self) -> float:
        o = self.options
        remaining = self._end - self.generation
        share = remaining / max(1.0, o.decay * (self._end - self._begin)) if self._end > self._begin else 1.0
        return (o.exact_learning_rate if self._exact else o.learning_rate) * min(1.0, max(share, 0.0))

    def _step(self, gradient: Array, rate: float) -> None:
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._theta.grad = torch.from_numpy(-gradient)
        self._optimiser.step()
        self._average = self.options.ema * self._average + (1 - self.options.ema) * self._vector()

    def _mean(self) -> Array:
        """Return the averaged parameters (dim,)."""
        return self._average

    @property
    def sigma(self) -> float:
        """NaN: a policy's randomness is its own, not the driver's."""
        return math.nan

    def _state(self) -> dict[str, Any]:
        return {
            "theta": self._vector(),
            "optimiser": copy.deepcopy(self._optimiser.state_dict()),
            **{name: copy.copy(getattr(self, name)) for name in _STATE},
        }

    def _load(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self._theta.copy_(torch.from_numpy(state["theta"]))
        self._optimiser.load_state_dict(copy.deepcopy(state["optimiser"]))
        for name in _STATE:
            setattr(self, name, copy.copy(state[name]))

    @classmethod
    def _current(cls, state: dict[str, Any]) -> dict[str, Any]:
        return {"generation": state["_generation"], **state} if "_generation" in state else state


def _diagnostics(
    norm: float, variance: float, rate: float, steps: Sequence[Step], *, reference: bool
) -> dict[str, float]:
    """Return what a step says of its gradient and its policy, by name.

    ``gradient_noise`` is the standard error of the gradient, ``signal_to_noise`` what of the norm is not noise against
    it; ``kl`` and ``entropy`` are nats per random choice, estimated from the rollouts.
    """
    diagnostics = {"gradient_norm": norm, "learning_rate": rate}
    if math.isfinite(variance):
        signal = max(0.0, norm**2 - variance)
        diagnostics["gradient_noise"] = math.sqrt(variance)
        diagnostics["signal_to_noise"] = math.sqrt(signal / variance) if variance > 0 else math.inf
    choices = sum(step.choices for step in steps)
    if choices:
        likely = sum(step.log_prob for step in steps)
        diagnostics["entropy"] = -likely / choices
        diagnostics["clipped"] = sum(step.clipped for step in steps) / len(steps)
        if reference:
            diagnostics["kl"] = (likely - sum(step.reference for step in steps)) / choices
    return diagnostics
