"""Manager: any manager, with what stays rewritten so that attention over it is as attention over everything was."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from evomem.bounds import TOKENS
from evomem.errors import ConfigError
from evomem.managers.allocation import Allocation
from evomem.managers.around import ManagerAround, RewritingRule, describe_inner
from evomem.managers.base import register
from evomem.managers.decision import Judgement, Rule
from evomem.managers.options import ManagerOptions
from evomem.managers.selection import Ends
from evomem.memory.view import Decision, LayerView

LIGHTEST, HEAVIEST = 1e-4, 1e4
"""Least and most tokens that a slot may stand for."""


class RefitOptions(ManagerOptions):
    """Options of `Refit`; budget, schedule and allocation are given here and not to the inner manager."""

    inner: dict[str, Any] = Field(
        default="keydiff",
        validate_default=True,
        description='manager that says which slots stay, e.g. "keydiff" or "snapkv(window=64)"',
    )
    probes: int = Field(
        default=32, ge=1, le=TOKENS, description="queries of the text, at most, that attention is to be the same for"
    )
    ridge: float = Field(
        default=0.1, gt=0, le=1e4, description="how dear a change of values is, beside the probes' error"
    )
    biases: bool = Field(default=True, description="also how many tokens a slot stands for is refitted")
    values: bool = Field(default=True, description="values are refitted")
    steps: int = Field(default=64, ge=1, le=10_000, description="steps of the refit of how much a slot stands for")

    @field_validator("inner", mode="before")
    @classmethod
    def _describe(cls, inner: Any) -> dict[str, Any]:
        """Turn any spec into the full description."""
        return describe_inner(inner, "refit", ("budget", "every", "allocation"))


@dataclass(frozen=True)
class RefitRule(RewritingRule):
    """A `Rule` after which the slots that stay are refitted.

    Attributes
    ----------
    probes, ridge, biases, values, steps : see `RefitOptions`.
    """

    probes: int
    ridge: float
    biases: bool
    values: bool
    steps: int

    def written(self, decision: Decision, judgement: Judgement, view: LayerView) -> Decision:
        """Return a decision with the values of the slots that stay, and how many tokens each stands for."""
        if decision.decay is not None:
            raise ConfigError("manager 'refit': inner: it lets slots fade, and so do biases; leave out forget")
        rows, keep = len(decision.keep), decision.keep
        logits = view.recorded[f"probe_logits:{self.probes}"].float()
        batch, query_heads, slots, width = logits.shape
        heads = keep.shape[1]
        logits = logits.reshape(batch, heads, query_heads // heads, slots, width).transpose(-1, -2)
        attention, asked = whole_attention(logits.flatten(2, 3))
        values = view.values.float()
        weights = torch.ones_like(keep, dtype=torch.float32)
        kept = torch.where(keep[:, :, None], attention, 0.0)
        if self.biases:
            weights = matching_mass(kept, asked, self.steps)
            kept = kept * weights[:, :, None]
        new = values.expand(rows, *values.shape[1:])
        if self.values:
            shares = kept / kept.sum(-1, keepdim=True).clamp(min=1e-30)
            new = new + value_changes(shares, asked, attention @ values - shares @ values, self.ridge)
        old = 0.0 if view.decays is None else view.decays.float()
        decay = torch.where(keep, old + torch.log(weights), 0.0) if self.biases else None
        largest = min(torch.finfo(dtype).max for dtype in (view.values.dtype, new.dtype))
        new = torch.where(keep[..., None], new, values).clamp(-largest, largest).to(view.values.dtype)
        return replace(decision, decay=decay, keys=view.keys.expand(rows, *view.keys.shape[1:]), values=new)


def whole_attention(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return what probes pay all slots, and which there are.

    Parameters
    ----------
    logits : (batch, kv_heads, probes, slots), -inf for slots that a probe does not see; a probe that sees none is none.

    Returns
    -------
    attention (batch, kv_heads, probes, slots), 0 for what is no probe; asked (batch, kv_heads, probes) fp32 of 0 and 1.
    """
    asked = torch.isfinite(logits).any(-1)
    safe = torch.where(asked[..., None], logits, 0.0)
    return torch.where(asked[..., None], torch.softmax(safe, -1), 0.0), asked.float()


def matching_mass(kept: Tensor, asked: Tensor, steps: int) -> Tensor:
    """Return w >= 0 for which Σ_i w_i kept_ji is near 1 for every probe j: (batch, kv_heads, slots).

    Non-negative least squares by multiplicative steps (Lee and Seung 2001), from 1: no step makes the error larger, and
    a slot that no probe sees keeps 1.

    Parameters
    ----------
    kept : (batch, kv_heads, probes, slots), the attention that is paid to slots that stay, out of all.
    asked : (batch, kv_heads, probes), 1 for a probe.
    """
    target = (kept * asked[..., None]).sum(-2)
    products = kept.transpose(-1, -2)
    w = torch.ones_like(target)
    for _ in range(steps):
        reached = (products @ (kept @ w[..., None]))[..., 0]
        w = (w * (target + 1e-12) / (reached + 1e-12)).clamp(LIGHTEST, HEAVIEST)
    return w


def value_changes(shares: Tensor, asked: Tensor, error: Tensor, ridge: float) -> Tensor:
    """Return the changes of values, (batch, kv_heads, slots, head_dim), that make ``error`` small, by least squares.

    With A = shares: the D for which |A D - error|² + λ |D|² is least, which is Aᵀ (A Aᵀ + λ)⁻¹ error; λ is ``ridge``
    times the mean of A Aᵀ's diagonal. A slot that no probe sees does not change.

    Parameters
    ----------
    shares : (batch, kv_heads, probes, slots), what probes pay the slots that stay.
    asked : (batch, kv_heads, probes), 1 for a probe.
    error : (batch, kv_heads, probes, head_dim), attention over everything less that over what stays.
    """
    square = shares @ shares.transpose(-1, -2)
    size = square.diagonal(dim1=-2, dim2=-1).sum(-1) / asked.sum(-1).clamp(min=1)
    eye = torch.eye(square.shape[-1], device=square.device)
    dual = torch.linalg.solve(square + (ridge * size[..., None, None] + 1e-6) * eye, error)
    changes: Tensor = shares.transpose(-1, -2) @ dual
    return changes


@register("refit")
class Refit(ManagerAround):
    """Keeps what another manager keeps, and refits it to what attention over everything gave (Attention Matching).

    After a selection, the values of the slots that stay, and one bias a slot, are such that for probe queries attention
    over what stays has nearly the mass, and nearly the output, of attention over all slots (arXiv 2602.16284; restated:
    its probes are a repeated prompt's queries, ours queries of the text, asked again behind it).

    Keys stay as they are. A bias is the logarithm of how many tokens a slot stands for; it costs 4 bytes a slot.
    """

    Options = RefitOptions
    options: RefitOptions

    def make_ends(self) -> Ends:
        """Return what the inner manager protects; it is built here, with budget and allocation."""
        given = self.options.allocation
        inner = self.build_inner(
            self.options.inner, budget=self.options.budget, **({"allocation": given} if given else {})
        )
        if inner.forgets:
            raise ConfigError("manager 'refit': inner: it lets slots fade, and so do biases; leave out forget")
        return inner.ends

    def make_allocation(self) -> Allocation:
        """Return the inner manager's allocation."""
        self.require_no_statistics()
        return self.inner.allocation

    @property
    def observes(self) -> frozenset[str]:
        """What the inner manager observes, and what the probes pay."""
        return self.inner.observes | {f"probe_logits:{self.options.probes}"}

    @property
    def rule(self) -> Rule:
        """The rule that also refits."""
        o = self.options
        return RefitRule(
            o.budget, self.ends, self.allocation, probes=o.probes, ridge=o.ridge, biases=o.biases, values=o.values,
            steps=o.steps,
        )  # fmt: skip

    def prepare(self, view: LayerView) -> None:
        """Let the inner manager compute what does not depend on parameters."""
        self.inner.prepare(view)

    def score_within(self, view: LayerView, n: Tensor) -> Tensor:
        """Return the inner manager's scores where protected ends are measured by ``n`` slots a head."""
        return self.inner.score_within(view, n)
