"""Evaluation: what a slot more is worth to every head under a ranking: the curves that LU-KV's budgets are solved from.

LU-KV: Tang et al., "Predicting future utility: global combinatorial optimization for task-agnostic KV cache eviction",
arXiv 2602.08585. The allocation that uses the curves is `evomem.managers.allocation.lukv.LUKV`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evomem.errors import ConfigError
from evomem.evaluation.costs import context_of
from evomem.managers.allocation import EmergentAllocation
from evomem.managers.allocation.curve_record import CurveRecord, ScorerDigest
from evomem.managers.allocation.lukv import LUKV
from evomem.managers.allocation.per_head_shares import PerHeadShares
from evomem.managers.allocation.probes import fingerprint
from evomem.managers.base import MemoryManager, check_budget
from evomem.managers.features import FeatureOptions
from evomem.managers.reallocation import with_allocation
from evomem.managers.selection import best
from evomem.memory import LayerView
from evomem.modes import outside_inference_mode
from evomem.tasks.base import Sample

if TYPE_CHECKING:
    from evomem.evaluation.evaluator import Evaluator

POINTS = 64
"""Pieces of a curve when nothing else is said."""


@dataclass(frozen=True)
class UtilityCurves:
    """What slots are worth to the heads of a model under one ranking, mean over contexts.

    Attributes
    ----------
    knots : (points + 1,) float64, ascending from 0 to 1: shares of the slots beyond the floor, see `floor`.
    utility : (layers, heads, points + 1) float64, attention of question and answer (`Future.peak`) that falls on the
        first of the ranking, beyond what the floor holds; 0 at the first knot.
    floor : slots that every head gets first: its protected ends and one slot more.
    slots : mean number of slots of a context.
    contexts : how many were measured.
    record : under which scorer and on which model; `with_curves` keeps it with the curves. None: unknown.
    """

    knots: Tensor
    utility: Tensor
    floor: int
    slots: float
    contexts: int
    record: CurveRecord | None = None

    def marginal(self) -> Tensor:
        """Return the slopes of the curves' concave hulls, in attention per share: (layers, heads, points) float64."""
        # Layer by layer: all pairs of knots of all heads would fill memory.
        return torch.stack([hull_slopes(self.knots, layer) for layer in self.utility])


def knots_of(points: int) -> Tensor:
    """Return shares that are dense where budgets are small: (p / points)^2, (points + 1,) float64."""
    return torch.linspace(0, 1, points + 1, dtype=torch.float64).square()


def hull_slopes(knots: Tensor, utility: Tensor) -> Tensor:
    """Return the slopes of the least concave majorants of piecewise linear curves, not increasing.

    slope_p = min_{i <= p} max_{j > p} (U_j - U_i) / (x_j - x_i).

    Parameters
    ----------
    knots : (points + 1,) ascending.
    utility : (..., points + 1), the curves at the knots.

    Returns
    -------
    (..., points) float64.
    """
    x, u = knots.double(), utility.double()
    points = x.shape[0] - 1
    run = x[None, 1:] - x[:-1, None]  # (from, to)
    rise = u[..., None, 1:] - u[..., :-1, None]
    later = torch.ones(points, points, dtype=torch.bool, device=x.device).triu()
    slope = torch.where(later, rise / torch.where(later, run, 1.0), -torch.inf)
    best = slope.flip(-1).cummax(-1).values.flip(-1)  # (from, p): the largest slope from `from` to beyond p
    best = torch.where(later, best, torch.inf)
    slopes = best.amin(-2)
    return slopes.cummin(-1).values  # rounding must not let a slope rise


@outside_inference_mode()
@torch.no_grad()
def utility_curves(
    evaluator: Evaluator,
    manager: MemoryManager,
    samples: Sequence[Sample],
    *,
    points: int = POINTS,
    knots: Tensor | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> UtilityCurves:
    """Measure the curves of a manager's ranking on the contexts of a task.

    Contexts that ``evaluator.traces`` holds are not read again; that is for managers that score by features.

    Parameters
    ----------
    evaluator : of the model; its protocol is compress_once.
    manager : ranks. Its budget and allocation have no part in it, what it protects comes first.
    samples : contexts with question and answer, not those that a result is reported on.
    points : pieces of a curve, denser where budgets are small (`knots_of`).
    knots : (points + 1,) shares in place of these.
    progress : is called with samples done and samples in all.

    Raises
    ------
    ConfigError : another protocol, no samples, a manager that does not rank, or that cannot score from traces; a model
        whose layers have different numbers of KV heads.
    """
    if evaluator.protocol.kind != "compress_once":
        raise ConfigError("utility curves need the protocol compress_once: one decision about a whole context")
    if not samples:
        raise ConfigError("utility curves: there are no samples; give at least one")
    if isinstance(manager.allocation, EmergentAllocation):
        raise ConfigError(
            f"manager {manager.name!r} does not rank its slots to a budget, so a slot more is worth nothing to it; use "
            "one that does, e.g. keydiff"
        )
    manager = evaluator.scheduled(manager)
    grid = knots_of(points) if knots is None else knots.double().cpu()
    curves, slots = [], 0
    for number, sample in enumerate(samples):
        progress(number, len(samples))
        context = context_of(evaluator, sample, manager.observes)
        _require_scores(manager, context.views)
        counts = sorted({view.slots.shape[1] for view in context.views})
        if len(counts) > 1:
            raise ConfigError(
                f"utility curves: layers of {' and '.join(map(str, counts))} KV heads; they are for models whose "
                "layers have the same number"
            )
        pairs = zip(context.views, context.future.peak, strict=True)
        curves.append(torch.stack([_curve(manager, view, peak, grid) for view, peak in pairs]))
        slots += int(context.views[0].seen)
    progress(len(samples), len(samples))
    record = CurveRecord(_scorer_digest(manager), fingerprint(evaluator.loaded.model))
    mean = torch.stack(curves).mean(0)
    return UtilityCurves(grid, mean, manager.ends.floor, slots / len(samples), len(samples), record)


def _scorer_digest(manager: MemoryManager) -> ScorerDigest | None:
    """Return the digest of a manager's scorer; None if it takes no other allocation: nobody uses its curves."""
    try:
        return ScorerDigest.of(with_allocation(manager, "uniform"))
    except ConfigError:
        return None


def _curve(manager: MemoryManager, view: LayerView, peak: Tensor, knots: Tensor) -> Tensor:
    """Return one layer's curves at the knots: (heads, points + 1) float64 on the processor."""
    judgement = manager.judge(view)
    candidates = manager.rule.candidates(view, judgement.stored)
    worth = torch.where(candidates, peak.to(candidates.device), 0.0).double()
    slots = worth.shape[-1]
    floor = min(manager.ends.floor, slots)
    at = floor + knots * (slots - floor)
    low = at.floor().long().clamp(max=max(slots - 1, 0))
    share = at - low
    points = torch.cat([low, low + 1, torch.tensor([floor])])
    counts = torch.tensor(sorted(set(points.tolist())))
    if manager.ends.by_share or type(manager).score_within is not MemoryManager.score_within:
        # No ranking has the slots of every count as its beginning.
        columns = []
        for n in counts.to(candidates.device)[:, None, None, None]:
            marked = manager.ends.mark(manager.score_within(view, n).float(), view, candidates, n)
            columns.append((worth * best(marked, n)).sum(-1)[0].cpu())
        reached = torch.stack(columns, 1)
    else:
        everything = torch.full_like(view.start[:, None, None], view.seen)
        marked = manager.ends.mark(judgement.scores, view, candidates, everything)
        order = torch.sort(marked, dim=-1, descending=True, stable=True).indices
        sums = worth.gather(-1, order)[0].cpu().cumsum(-1)
        reached = torch.cat([torch.zeros_like(sums[:, :1]), sums], 1)[:, counts]
    reached = reached[:, torch.searchsorted(counts, points)]
    return reached[:, : len(knots)] * (1 - share) + reached[:, len(knots) : -1] * share - reached[:, -1:]


def _require_scores(manager: MemoryManager, views: Sequence[LayerView]) -> None:
    """Refuse a trace to a manager that looks at keys and values, which a trace has not got."""
    if views[0].source and not isinstance(manager.options, FeatureOptions):
        raise ConfigError(
            f"manager {manager.name!r}: cannot score from the traces {views[0].source}, which hold features and no "
            "keys; measure it without traces, or take a manager that scores by features (feature_scorer, kv_policy)"
        )


# ---- managers with the budgets that curves give ---------------------------------------------------------------------


def with_curves(manager: MemoryManager, curves: UtilityCurves) -> MemoryManager:
    """Return a manager that ranks as this one and shares its budget by the curves, at any budget (`LUKV`).

    Raises
    ------
    ConfigError : the manager has an allocation by itself (``pyramidkv``, ``adakv``).
    """
    layers, heads, knots = curves.utility.shape
    other = with_allocation(
        manager, {"name": "lukv", "options": {"layers": layers, "heads": heads, "points": knots - 1}}
    )
    allocation = other.allocation
    if not isinstance(allocation, LUKV):
        raise ConfigError(f"manager {manager.name!r}: takes no allocation of its own; give its scorer alone")
    allocation.set_curves(curves.knots.float(), curves.marginal().float(), curves.record)
    return other


def with_shares(manager: MemoryManager, curves: UtilityCurves, budget: int | float) -> MemoryManager:
    """Return a manager that ranks as this one, with learned shares a head that begin where the curves' budgets are.

    So a search of ``per_head_shares`` starts from LU-KV's solution at one budget; at others shares scale.

    Parameters
    ----------
    budget : mean slots per head, a whole number or a share of the mean context, at which the solution is taken.
    """
    layers, heads = curves.utility.shape[:2]
    solved = solve(curves, budget)
    other = with_allocation(manager, {"name": "per_head_shares", "options": {"layers": layers, "heads": heads}})
    allocation = other.allocation
    if not isinstance(allocation, PerHeadShares):
        raise ConfigError(f"manager {manager.name!r}: takes no allocation of its own; give its scorer alone")
    # A head that gets nothing beyond the floor has half a slot's share: the logarithm of 0 is no number to search from.
    beyond = (solved - min(curves.floor, int(solved.min()))).double().clamp(min=0.5)
    logs = torch.log(beyond)
    with torch.no_grad():
        allocation.log_shares.copy_(logs - logs.mean())
    return other


def solve(curves: UtilityCurves, budget: int | float) -> Tensor:
    """Return LU-KV's slots of every head at a budget, for a context of the curves' mean length: (layers, heads) int64.

    A head gets at most what such a context has, the sum is layers x heads x budget.
    """
    layers, heads, knots = curves.utility.shape
    check_budget(budget)
    slots = max(1, round(curves.slots))
    allocation = LUKV(layers=layers, heads=heads, points=knots - 1)
    allocation.set_curves(curves.knots.float(), curves.marginal().float())
    mean = min(slots, budget if isinstance(budget, int) else max(1, math.ceil(budget * slots - 1e-6)))
    usable = torch.full((1, layers * heads), slots, dtype=torch.int64)
    return allocation.solve(usable, torch.tensor([mean]), curves.floor, usable[:, 0]).reshape(layers, heads)
