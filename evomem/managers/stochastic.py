"""Manager: decisions that can be drawn at random, with their likelihood, for policy gradients."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from evomem.errors import ConfigError
from evomem.managers.base import MemoryManager
from evomem.managers.decision import Judgement
from evomem.managers.hashing import mixed_seed
from evomem.memory import Decision, LayerView

COMMON = 64
"""How many random numbers the layers of a decision have in common; as many log-shares can be drawn."""


@dataclass(frozen=True)
class Action:
    """What was drawn at one decision about one layer; a part that the manager does not draw is None.

    Attributes
    ----------
    ranking : (batch, kv_heads, slots) int64, the slots in the order in which they are kept (`plackett_luce`).
    stored : (batch, kv_heads, slots) bool, which of the new tokens enter memory.
    rates : (batch, kv_heads, slots) fp32, logarithm of how fast each slot fades.
    shares : (batch, points of depth) fp32, logarithm of the layers' shares of the budget, the same for all layers.
    """

    ranking: Tensor | None = None
    stored: Tensor | None = None
    rates: Tensor | None = None
    shares: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the parts that were drawn, by name."""
        parts = {"ranking": self.ranking, "stored": self.stored, "rates": self.rates, "shares": self.shares}
        return {name: part for name, part in parts.items() if part is not None}


@dataclass(frozen=True)
class Noise:
    """Random numbers for one decision about one layer, by token and not by slot.

    A row's draws therefore depend neither on padding nor on what other rows hold.

    Attributes
    ----------
    uniform : (batch, kinds, kv_heads, tokens) fp64 in [0, 1); `LayerView.slots` index the last axis. A row's left
        padding has zeros, which nothing looks at.
    common : (batch, `COMMON`) fp32 standard normal numbers that a decision's layers have in common.
    """

    uniform: Tensor
    common: Tensor

    @classmethod
    def of(cls, seeds: Sequence[tuple[int, ...]], view: LayerView) -> Noise:
        """Return the noise of every row from its own seed (any integers) and the layer; equal seeds draw alike.

        Drawn on the processor, whatever the view's device, so that a rollout is the same everywhere.
        """
        kv_heads, device, starts = view.slots.shape[1], view.slots.device, view.start.tolist()
        rows, common = [], []
        for row, seed in enumerate(seeds):
            start = starts[row if len(starts) > 1 else 0]
            first = torch.Generator("cpu").manual_seed(mixed_seed((*seed, -1)))
            common.append(torch.randn(COMMON, generator=first, dtype=torch.float32, device="cpu"))
            generator = torch.Generator("cpu").manual_seed(mixed_seed((*seed, view.layer)))
            # As many numbers as the row has tokens of its own, whatever it is padded to.
            shape = (3, kv_heads, view.seen - start)
            numbers = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
            rows.append(F.pad(numbers, (start, 0)))
        return cls(torch.stack(rows).to(device), torch.stack(common).to(device))

    def numbers_of(self, kind: int, slots: Tensor) -> Tensor:
        """Return the numbers of the slots' tokens: (batch, kv_heads, slots) fp64; those of empty slots mean nothing.

        kind : index on the axis ``kinds`` of `uniform`; every use of the noise has its own.
        """
        wide = slots.clamp(min=0).expand(self.uniform.shape[0], -1, -1)
        return self.uniform[:, kind].gather(-1, wide)

    def gumbel(self, slots: Tensor) -> Tensor:
        """Return standard Gumbel noise (batch, kv_heads, slots) fp32, for a ranking."""
        return -torch.log(-torch.log(self.numbers_of(0, slots).clamp(min=1e-300))).float()

    def logistic(self, slots: Tensor) -> Tensor:
        """Return standard logistic noise (batch, kv_heads, slots) fp32: g > -noise is Bernoulli with log-odds g."""
        return torch.logit(self.numbers_of(1, slots), eps=1e-12).float()

    def normal(self, slots: Tensor) -> Tensor:
        """Return standard normal noise (batch, kv_heads, slots) fp32."""
        drawn: Tensor = torch.special.ndtri(self.numbers_of(2, slots).clamp(1e-12, 1 - 1e-12))
        return drawn.float()


class StochasticManager(MemoryManager):
    """A manager that can also draw its decision: deterministic when deployed, random while it is trained.

    A rollout is a pure function of parameters and noise; its likelihood is differentiable in the parameters.
    """

    on_view_device: ClassVar[frozenset[str]] = MemoryManager.on_view_device | {
        "draw", "carry_out", "judgement_of", "log_decays", "log_prob", "log_probs", "choices",
    }  # fmt: skip

    def require_draws(self) -> None:
        """Raise `ConfigError` if decisions cannot be drawn with this allocation; asked before a search begins.

        By default one that decides about all layers at once cannot: layers are drawn one by one. A manager that ranks
        also needs `Rule.require_rankings`.
        """
        if self.whole_model:
            raise ConfigError(
                f"allocation {self.allocation.name!r} needs the views of all layers at once, and decisions are drawn "
                "layer by layer; take uniform, pyramid or depth_shares, or search by evolution, which draws nothing"
            )

    @abstractmethod
    def draw(self, view: LayerView, noise: Noise) -> Action:
        """Return a random action; for a view of one row, one action per row of the noise."""

    def carry_out(self, view: LayerView, action: Action) -> Decision:
        """Return the decision that an action stands for, composed as a deployed one is (`Rule.decide`)."""
        return self.rule.decide(self.judgement_of(view, action), view)

    def judgement_of(self, view: LayerView, action: Action) -> Judgement:
        """Return the action as a judgement: drawn values instead of the manager's own.

        A slot's score is its rank from the end; without a ranking the newest come first. Shares that are not drawn
        are the manager's.
        """
        if action.ranking is None:
            scores = -view.age.float()
        else:
            descending = torch.arange(action.ranking.shape[-1], 0, -1, device=view.slots.device, dtype=torch.float32)
            scores = descending.new_zeros(action.ranking.shape)
            scores = scores.scatter(-1, action.ranking, descending.expand(action.ranking.shape))
        decay = None if action.rates is None else self.log_decays(view, action.rates)
        return Judgement(scores, action.stored, decay, self.shares() if action.shares is None else action.shares)

    def log_decays(self, view: LayerView, rates: Tensor) -> Tensor:
        """Return what drawn log-rates add to slots' logits, <= 0: (batch, kv_heads, slots); by default -exp(rate)."""
        return -torch.exp(rates)

    @abstractmethod
    def log_prob(self, view: LayerView, action: Action) -> Tensor:
        """Return log π(action | view) of every head: (batch, kv_heads), differentiable in the parameters."""

    def log_probs(self, view: LayerView, action: Action) -> Tensor:
        """Return log π of the choices that every head's action consists of, each given those before it.

        (batch, kv_heads, choices), 0 where there is no choice; their sum is `log_prob`. PPO clips each by itself. By
        default a head's action counts as one choice.
        """
        return self.log_prob(view, action)[..., None]

    @abstractmethod
    def choices(self, view: LayerView, action: Action) -> Tensor:
        """Return how many random choices every head's action consists of: (batch, kv_heads)."""
