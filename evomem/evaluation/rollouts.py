"""Evaluation: several random rollouts of one stochastic policy, with the gradient of their likelihood.

A rollout is a pure function of (parameters, seed, sample). As policies have hundreds to thousands of parameters, the
gradient ∇θ log π of a decision is a small vector: it is worked out where the decision is made, and goes back with the
reward. What advantage it is multiplied with is the driver's business (`evomem.drivers.policy_gradient`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from evomem.evaluation.future import sample_key
from evomem.evaluation.measurement import LOGLIK, Evaluation, Measurement, Step
from evomem.evaluation.measures import Draws
from evomem.managers.options import Schedule
from evomem.managers.stochastic import Action, Noise, StochasticManager
from evomem.managers.vector import to_vector
from evomem.memory import Decision, LayerView, attached
from evomem.memory.view import TensorName
from evomem.modes import outside_inference_mode
from evomem.tasks.base import Sample, Task

if TYPE_CHECKING:
    from evomem.evaluation.evaluator import Evaluator

CLIP = 0.2
"""How far a choice's probability may move from the policy that drew before PPO lets go of it."""

_REMEMBERED = 512
"""Sets of rollouts whose rewards an evaluator remembers, for further passes over them."""


@outside_inference_mode()
@torch.no_grad()
def rollouts(
    evaluator: Evaluator,
    manager: StochasticManager,
    sample: Sample,
    task: Task,
    seeds: Sequence[int],
    measurement: Measurement = LOGLIK,
    *,
    behaviour: StochasticManager | None = None,
    reference: StochasticManager | None = None,
) -> list[Evaluation]:
    """Evaluate one stochastic policy on one sample several times, each time with decisions drawn by another seed.

    Parameters
    ----------
    measurement : ``exact`` is measured if it asks for it; the option ``listens`` of its ``rollout``, ``behaviour`` and
        ``reference`` are `RolloutPolicy`'s.

    Returns
    -------
    One `Evaluation` a seed, in order, with the decisions in `Evaluation.steps`.
    """
    tokens, observes = evaluator.tokens(sample), measurement.observes
    begin = time.perf_counter()
    policy = rollout_policy(evaluator, manager, [sample], Draws(list(seeds), behaviour, reference), measurement)
    drawing = policy.behaviour if policy.behaviour is not None else manager
    key = (
        task.name,
        sample.id,
        sample_key(tokens),
        tuple(seeds),
        repr(drawing.describe()),
        to_vector(drawing).tobytes(),
        "exact" in measurement,
    )
    batch = evaluator.known_rollouts.get(key) if evaluator.protocol.kind == "compress_once" else None
    if batch is not None:  # the same rollouts, seen by a newer policy: only how likely they are has changed
        for view in evaluator.reading(tokens.read, policy.observes | observes).views:
            policy.decide(view)
    else:
        with attached(evaluator.loaded.model):
            batch = evaluator.answer(policy, tokens, sample, task, measurement)
        evaluator.known_rollouts[key] = [replace(one, tokens=0) for one in batch]
        while len(evaluator.known_rollouts) > _REMEMBERED:
            evaluator.known_rollouts.popitem(last=False)
    seconds = (time.perf_counter() - begin) / len(batch)
    return [replace(one, seconds=seconds, steps=policy.steps(place)) for place, one in enumerate(batch)]


def rollout_policy(
    evaluator: Evaluator,
    manager: StochasticManager,
    samples: Sequence[Sample],
    draws: Draws,
    measurement: Measurement,
) -> RolloutPolicy:
    """Return the policy that draws for all seeds on every sample, one sample's rollouts after the other's."""
    older, other = (None if one is None else evaluator.scheduled(one) for one in (draws.behaviour, draws.reference))
    return RolloutPolicy(
        evaluator.scheduled(manager),
        [seed for _ in samples for seed in draws.seeds],
        [sample_number(sample.id) for sample in samples for _ in draws.seeds],
        older,
        other,
        bool(measurement.options("rollout").get("listens", False)),
    )


def sample_number(identity: str) -> int:
    """Return a number for a sample, for seeds: the same candidate draws differently on different samples."""
    return int.from_bytes(sha256(identity.encode()).digest()[:8], "little")


@dataclass
class _DecisionTotals:
    """Sums over the layers of what one decision of every rollout gave; axis 0 is the rollouts."""

    gradient: Tensor
    lower: Tensor
    log_prob: Tensor
    reference: Tensor
    choices: Tensor
    clipped: Tensor
    rewards: Tensor


@dataclass
class RolloutPolicy:
    """A cache policy that draws every row's decisions by itself, all by one policy, and learns how likely they were.

    A view of one row is what all rollouts share; a view of as many rows as rollouts gives each its own.

    Parameters
    ----------
    manager : the policy that gradients are of.
    seeds : one a rollout.
    samples : one a rollout, `sample_number` of what it reads.
    behaviour : the policy that draws, if another one than ``manager``; then ratios are clipped.
    reference : the policy that `Step.reference` is by.
    wants_logits : note the likelihood of what is read between the decisions.
    """

    manager: StochasticManager
    seeds: Sequence[int]
    samples: Sequence[int]
    behaviour: StochasticManager | None = None
    reference: StochasticManager | None = None
    wants_logits: bool = False
    whole_model: ClassVar[bool] = False
    decisions: list[_DecisionTotals] = field(default_factory=list)
    _decided: dict[int, int] = field(default_factory=dict)
    _fades: set[int] = field(default_factory=set)

    @property
    def size(self) -> int:
        """Number of rollouts."""
        return len(self.seeds)

    @property
    def layers_differ(self) -> bool:
        """Whether the policy gives layers different parts of its budget by their depth."""
        return self.manager.layers_differ

    @property
    def observes(self) -> frozenset[str]:
        """What the policies look at."""
        others = [one.observes for one in (self.behaviour, self.reference) if one is not None]
        return self.manager.observes.union(*others)

    @property
    def schedule(self) -> Schedule:
        """When they decide."""
        return self.manager.schedule

    def fades(self, layer: int) -> Tensor:
        """Return which rollouts have let slots of a layer fade so far: (rollouts,) bool."""
        return torch.full((self.size,), layer in self._fades)

    @torch.no_grad()
    def decide(self, view: LayerView) -> Decision:
        """Return the decisions of all rollouts: masks (rollouts, kv_heads, slots)."""
        number = self._decided.get(view.layer, 0)
        self._decided[view.layer] = number + 1
        noise = Noise.of([(seed, sample, number) for seed, sample in zip(self.seeds, self.samples, strict=True)], view)
        drawing = self.behaviour if self.behaviour is not None else self.manager
        action = drawing.draw(view, noise)
        self._learn(number, view, action)
        decision = self.manager.carry_out(view, action)
        if decision.decay is not None:
            self._fades.add(view.layer)
        shape = (self.size, *view.slots.shape[1:])
        evicted = None if decision.evicted is None else decision.evicted.expand(self.size, -1)
        return Decision(decision.keep.expand(shape), decision.decay, evicted)

    def decide_all(self, views: Sequence[LayerView]) -> list[Decision]:
        """Return the decisions of all rollouts about all layers: one after the other, as every layer is drawn for."""
        return [self.decide(view) for view in views]

    def independent_copy(self) -> RolloutPolicy:
        """Return an independent copy: it draws the same from here on."""
        return replace(
            self,
            decisions=[replace(totals) for totals in self.decisions],
            _decided=dict(self._decided),
            _fades=set(self._fades),
        )

    def observe_rewards(self, rewards: Tensor, tokens: Tensor) -> None:
        """Take in what was gained since the last decision: rewards and tokens (rollouts,), their sum and number.

        Before the first decision nothing is counted.
        """
        if self.wants_logits and self.decisions:
            both = torch.stack((rewards.double().cpu(), tokens.double().cpu()))
            self.decisions[-1].rewards = self.decisions[-1].rewards + both

    def observe_logits(self, logits: Tensor, following: Tensor) -> None:
        """Take in the logits (rollouts, tokens, vocabulary) of what was read since the last decision.

        following : (rollouts, tokens) int64, the tokens that came. Before the first decision nothing is counted.
        """
        if self.wants_logits and self.decisions:
            chosen = logits.gather(-1, following[..., None])[..., 0].float() - torch.logsumexp(logits.float(), -1)
            self.observe_rewards(chosen.double().sum(1), torch.full((self.size,), float(following.shape[1])))

    def steps(self, rollout: int) -> tuple[Step, ...]:
        """Return the decisions of one rollout."""
        steps = []
        for totals in self.decisions:
            total, count = totals.rewards[:, rollout].tolist()
            own = self.behaviour is None
            steps.append(
                Step(
                    gradient=Step.pack(totals.gradient[rollout].numpy()),
                    lower=b"" if own else Step.pack(totals.lower[rollout].numpy()),
                    reward=total / count if count else 0.0,
                    log_prob=float(totals.log_prob[rollout]),
                    reference=float(totals.reference[rollout]),
                    choices=int(totals.choices[rollout]),
                    clipped=min(1.0, float(totals.clipped[rollout]) / max(1, int(totals.choices[rollout]))),
                )
            )
        return tuple(steps)

    def _learn(self, number: int, view: LayerView, action: Action) -> None:
        rows = DrawnRows(view, action, self.size)
        if self.behaviour is None:
            ones = torch.ones(self.size, view.slots.shape[1], device=view.slots.device, dtype=torch.float32)
            gradient, log_prob = rows.gradient(self.manager, ones)
            lower, clipped = gradient, torch.zeros(self.size)
        else:
            # PPO's surrogate min(r A, clip(r) A) of every choice: its gradient is r A ∇log π, or nothing past the clip.
            log_probs = rows.log_probs(self.manager)
            ratio = torch.exp((log_probs - rows.log_probs(self.behaviour)).clamp(-20, 20))
            high, low = ratio <= 1 + CLIP, ratio >= 1 - CLIP
            gradient, _ = rows.gradient(self.manager, ratio * high)
            lower, _ = rows.gradient(self.manager, ratio * low)
            log_prob, clipped = log_probs.sum(-1), (~(high & low)).sum((1, 2))
        reference = torch.zeros(self.size)
        if self.reference is not None:
            reference = rows.log_probs(self.reference).sum((1, 2))
        choices = self.manager.choices(view, action).expand(self.size, -1).sum(1)
        if number == len(self.decisions):
            size = gradient.shape[1]
            nothing = torch.zeros(self.size, dtype=torch.float64)
            empty = torch.zeros(self.size, size, dtype=torch.float64)
            self.decisions.append(
                _DecisionTotals(empty, empty, nothing, nothing, nothing, nothing, torch.stack((nothing, nothing)))
            )
        totals = self.decisions[number]
        totals.gradient = totals.gradient + gradient.double().cpu()
        totals.lower = totals.lower + lower.double().cpu()
        totals.log_prob = totals.log_prob + log_prob.sum(1).double().cpu()
        totals.reference = totals.reference + reference.double().cpu()
        totals.choices = totals.choices + choices.double().cpu()
        totals.clipped = totals.clipped + clipped.double().cpu()


class _LogProbs(nn.Module):
    """log π of an action's choices as a module's ``forward``, which is what ``functional_call`` calls."""

    def __init__(self, manager: StochasticManager) -> None:
        super().__init__()
        self.manager = manager

    def forward(self, view: LayerView, action: Action) -> Tensor:
        return self.manager.log_probs(view, action)


class DrawnRows:
    """The rows of a decision, one by one under `vmap`: views (shared or own) and actions."""

    def __init__(self, view: LayerView, action: Action, rows: int) -> None:
        self.view, self.rows = view, rows
        self.shared = view.slots.shape[0] == 1
        self.actions = {n: part.expand(rows, *part.shape[1:]) for n, part in action.tensors().items()}
        # What policies computed of the view while they drew is by row too, and need not be computed again.
        self.tensors = view.tensors(memo=True)

    def log_probs(self, manager: StochasticManager) -> Tensor:
        """Return log π of every choice (rollouts, kv_heads, choices)."""
        return manager.log_probs(self.view, Action(**self.actions))

    def gradient(self, manager: StochasticManager, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return ∇θ Σ_hc weights_hc log π_hc (rollouts, parameters), in the order of registration, and log π.

        weights : (rollouts, kv_heads, choices), or (rollouts, kv_heads): one for all choices of a head. log π is
        (rollouts, kv_heads).
        """
        weights = weights if weights.dim() == 3 else weights[..., None]
        module = _LogProbs(manager.on(self.view.slots.device))
        parameters = {name: value.detach() for name, value in module.named_parameters()}

        def weighted(
            parameters: dict[str, Tensor],
            tensors: dict[TensorName, Tensor] | None,
            action: dict[str, Tensor],
            weight: Tensor,
        ) -> tuple[Tensor, Tensor]:
            seen = self.view if tensors is None else self._row(tensors)
            drawn = Action(**{name: part[None] for name, part in action.items()})
            log_probs: Tensor = functional_call(module, parameters, (seen, drawn))[0]
            return (log_probs * weight).sum(), log_probs.sum(-1)

        over = None if self.shared else 0
        gradients, log_prob = vmap(grad(weighted, has_aux=True), in_dims=(None, over, 0, 0), randomness="error")(
            parameters, None if self.shared else self.tensors, self.actions, weights
        )
        return torch.cat([gradients[name].reshape(self.rows, -1) for name in parameters], 1), log_prob

    def _row(self, tensors: dict[TensorName, Tensor]) -> LayerView:
        return self.view.with_tensors({name: tensor[None] for name, tensor in tensors.items()})
