"""Evaluation: the cost of a ranking of the slots, given the attention to come: KVP's trace reward, and its gradient.

f_i is the attention that question and answer pay to slot i (`evomem.evaluation.future.Future.peak`). A ranking that
gives slot π(j) the rank j costs Σ_j j f_π(j), divided by the cost of the best ranking: 1 at best, a loss over all
budgets at once, and no model call. The mean cost of rankings drawn by scores has a closed form
(`plackett_luce.expected_cost`), and so has its gradient in the parameters of any manager that scores.

Source: KVP (arXiv 2602.10238).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from evomem.devices import stacked
from evomem.errors import ConfigError
from evomem.evaluation import oracle as against
from evomem.evaluation.future import Future, sample_key, slot_bytes
from evomem.evaluation.measurement import Evaluation, Measurement, Step, Table
from evomem.evaluation.measures import Draws, Measure, register_measure
from evomem.evaluation.rollouts import DrawnRows, sample_number
from evomem.managers import plackett_luce
from evomem.managers.base import MemoryManager
from evomem.managers.stochastic import Noise, StochasticManager
from evomem.memory import LayerView
from evomem.modes import outside_inference_mode
from evomem.statistics import leave_one_out
from evomem.tasks.base import Sample, Task

if TYPE_CHECKING:
    from evomem.evaluation.evaluator import Evaluator

How = Literal["expected", "sorted", "drawn"]
ORACLE = ("rank_correlation", "good_decisions", "sorted_cost")
"""Values that the measure ``oracle`` gives."""
_FIRST = 1e4
"""Score of a protected slot: larger than all others, and finite, because the difference of infinities is NaN."""


@dataclass(frozen=True)
class KnownContext:
    """The views and the future attention that costs follow from, and how many tokens the model read for them."""

    views: tuple[LayerView, ...]
    future: Future
    tokens: int


@outside_inference_mode()
@torch.no_grad()
def ranking_costs(
    evaluator: Evaluator,
    managers: Sequence[MemoryManager],
    sample: Sample,
    how: How = "expected",
    *,
    seeds: Sequence[int] = (),
    gradient: bool = False,
    oracle: bool = False,
    observes: frozenset[str] = frozenset(),
) -> list[Evaluation]:
    """Return one evaluation a manager, with the value ``head_cost``: the cost of every layer and head.

    Parameters
    ----------
    how : ``expected``: the mean over rankings drawn by the manager's scores; ``sorted``: of the ranking in the order of
        the scores; ``drawn``: of one ranking drawn with the manager's seed; managers are then all the same policy.
    seeds : one a manager, for ``drawn``.
    gradient : also `Evaluation.steps`, one step, an estimate of the gradient of minus the mean cost in all parameters:
        the exact one for ``expected``; for ``drawn`` REINFORCE, head by head, with the other managers of this call as
        baseline (leave-one-out): a head's ranking moves that head's cost only, so no credit has to be assigned.
    oracle : also the values of `ORACLE`: ``rank_correlation`` of scores and future attention, ``good_decisions``
        (Belady) and ``sorted_cost``, means over layers and heads.

    Raises
    ------
    ConfigError : the protocol is streaming, where what is read depends on earlier decisions.
    """
    if evaluator.protocol.kind != "compress_once":
        raise ConfigError("costs of rankings need the protocol compress_once: one decision about a whole context")
    if not managers:
        return []
    begin = time.perf_counter()
    managers = [evaluator.scheduled(manager) for manager in managers]
    context = context_of(evaluator, sample, frozenset().union(*(m.observes for m in managers)) | observes)
    if how == "drawn":
        tables, steps = _drawn(managers, seeds, sample, context)
    else:
        pairs = [_scored(manager, context, how, gradient=gradient) for manager in managers]
        tables, steps = [table for table, _ in pairs], [step for _, step in pairs]
    seconds = (time.perf_counter() - begin) / len(managers)
    evaluations = []
    for number, manager in enumerate(managers):
        slots, size = _sizes(manager, context)
        evaluations.append(
            Evaluation(
                sample=sample.id,
                values=_values(tables[number], _oracle(manager, context) if oracle else {}),
                slots=slots,
                bytes_peak=size,
                bytes_mean=size,
                tokens=context.tokens if number == 0 else 0,
                seconds=seconds,
                steps=(steps[number],) if gradient else None,
            )
        )
    return evaluations


@register_measure("ranking_cost")
@register_measure("oracle")
class RankingCosts(Measure):
    """Gives ``head_cost``; with ``oracle`` also how the decision compares with one that knows the future (`ORACLE`).

    Options of ``ranking_cost``: ``how`` and ``gradient``, see `ranking_costs`.
    """

    option_types: ClassVar = {"ranking_cost": {"how": str, "gradient": bool}}

    def evaluations(
        self,
        evaluator: Evaluator,
        managers: Sequence[MemoryManager],
        sample: Sample,
        task: Task,
        measurement: Measurement,
        draws: Draws,
    ) -> list[Evaluation]:
        """Return the evaluations; see `Measure.evaluations`."""
        options = measurement.options("ranking_cost")
        return ranking_costs(
            evaluator,
            managers,
            sample,
            _how(options.get("how", "expected")),
            seeds=draws.seeds,
            gradient=bool(options.get("gradient", False)),
            oracle="oracle" in measurement,
            observes=measurement.observes,
        )


def _how(how: object) -> How:
    if how not in get_args(How):
        raise ConfigError(f"measure 'ranking_cost': how is {how!r}; give one of {', '.join(get_args(How))}")
    return cast("How", how)


def _values(table: Tensor, oracle: Mapping[str, float]) -> dict[str, float | Table]:
    return {"head_cost": tuple(tuple(round(value, 5) for value in row) for row in table.tolist()), **oracle}


def context_of(evaluator: Evaluator, sample: Sample, observes: frozenset[str]) -> KnownContext:
    """Return a sample's context and what comes after it: from traces if they hold it, else by the model."""
    tokens = evaluator.tokens(sample)
    key = sample_key(tokens)
    known = evaluator.traces.get(key) if evaluator.traces is not None else None
    if known is not None:
        return KnownContext(known.views, known.future, 0)
    misses = evaluator.store.misses
    reading = evaluator.reading(tokens.read, observes)
    read = reading.tokens if evaluator.store.misses > misses else 0
    answering = 0 if key in evaluator.future.known else tokens.prompt.shape[1] + tokens.answer.shape[1] - 1
    return KnownContext(reading.views, evaluator.future.of(evaluator, tokens, key, observes), read + answering)


class _Score(nn.Module):
    """A manager's scores as a module's ``forward``, which is what ``functional_call`` calls."""

    def __init__(self, manager: MemoryManager) -> None:
        super().__init__()
        self.manager = manager

    def forward(self, view: LayerView, ends_within: Tensor) -> Tensor:
        scores = self.manager.score_within(view, ends_within).float()
        return torch.where(self.manager.rule.protected(view, ends_within), _FIRST, scores).clamp(-_FIRST, _FIRST)


def _scored(manager: MemoryManager, context: KnownContext, how: How, *, gradient: bool) -> tuple[Tensor, Step]:
    """Return the costs (layers, kv_heads), and the step with the exact gradient if it is asked for."""
    named = _Score(manager).named_parameters()
    # Copies, because a manager may have been made in inference mode.
    parameters = {name: value.detach().clone().requires_grad_(gradient) for name, value in named}
    total = [torch.zeros_like(value, dtype=torch.float64) for value in parameters.values()]
    rows = []
    heads = sum(view.slots.shape[1] for view in context.views)
    layers = zip(context.views, context.future.peak, _ends_within(manager, context.views), strict=True)
    for view, future, ends_within in layers:
        device = view.slots.device
        with torch.set_grad_enabled(gradient):
            on_layer = {name: value.to(device) for name, value in parameters.items()}
            scores = functional_call(_Score(manager.on(device)), on_layer, (view, ends_within))
            if how == "sorted":
                order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
                cost = plackett_luce.trace_cost(future, order)
            else:
                cost = plackett_luce.expected_cost(scores, future)
            gain = -cost.sum() / heads
        if gradient:  # layer by layer: the graph of all pairs of slots is large
            parts = torch.autograd.grad(gain, list(parameters.values()), allow_unused=True)
            total = [
                summed if part is None else summed + part.double() for summed, part in zip(total, parts, strict=True)
            ]
        rows.append(cost[0].detach().double().cpu())
    flat = torch.cat([part.reshape(-1) for part in total]) if total else torch.zeros(0, dtype=torch.float64)
    return torch.stack(rows), Step(Step.pack(flat.cpu().numpy()) if gradient else b"", ascent=True)


def _drawn(
    managers: Sequence[MemoryManager], seeds: Sequence[int], sample: Sample, context: KnownContext
) -> tuple[list[Tensor], list[Step]]:
    """Return costs and steps of rankings of all slots, drawn by the first manager; it stands for all of them."""
    policy, count = managers[0], len(managers)
    if not isinstance(policy, StochasticManager) or len(seeds) != count:
        raise ConfigError(f"manager {policy.name!r} draws no rankings: a drawn cost needs a stochastic one, and seeds")
    policy = policy.with_options(budget=None)  # a ranking of everything: without a budget no allocation cuts it
    heads = sum(view.slots.shape[1] for view in context.views)
    rows, gradient, log_prob = [], torch.zeros(()), torch.zeros(count, dtype=torch.float64)
    for view, future in zip(context.views, context.future.peak, strict=True):
        noise = Noise.of([(seed, sample_number(sample.id), 0) for seed in seeds], view)
        action = policy.draw(view, noise)
        if action.ranking is None:
            raise ConfigError(f"manager {policy.name!r}: without the action evict there is no ranking to cost anything")
        ranking = _protected_first(policy, view, action.ranking, noise.gumbel(view.slots))
        cost = plackett_luce.trace_cost(future.expand(count, -1, -1), ranking)
        weights = leave_one_out(-cost) / heads
        part, likely = DrawnRows(view, action, count).gradient(policy, weights)
        gradient, log_prob = gradient + part.double().cpu(), log_prob + likely.sum(1).double().cpu()
        rows.append(cost.double().cpu())
    tables = torch.stack(rows, 1)
    steps = [
        Step(Step.pack(gradient[i].numpy()), ascent=True, log_prob=float(log_prob[i])) for i in range(count)
    ]  # fmt: skip
    return list(tables), steps


def _protected_first(manager: MemoryManager, view: LayerView, ranking: Tensor, noise: Tensor) -> Tensor:
    """Return rankings that begin with the protected slots, in random order: no ranking decides about them.

    So the mean of what such a ranking costs is what `_Score` makes of the same manager.
    """
    descending = torch.arange(0, -ranking.shape[-1], -1, device=ranking.device, dtype=noise.dtype)
    keys = torch.zeros(ranking.shape, dtype=noise.dtype, device=ranking.device)
    keys = keys.scatter(-1, ranking, descending.expand(ranking.shape))
    (ends_within,) = _ends_within(manager, [view])
    keys = torch.where(manager.rule.protected(view, ends_within), _FIRST + noise, keys)
    return torch.argsort(keys, dim=-1, descending=True, stable=True)


def _ends_within(manager: MemoryManager, views: Sequence[LayerView]) -> list[Tensor]:
    """Return the slots by which protected ends are measured: one (batch, kv_heads or 1, 1) int64 a layer.

    A policy's rankings are drawn without a budget (`_drawn`); its protected ends are those without a budget, too.
    """
    stochastic = isinstance(manager, StochasticManager)
    if manager.whole_model and not stochastic:
        limits = manager.rule.head_limits([manager.judge(view) for view in views], views)
        return manager.rule.ends_within(limits, views)
    placed = [manager.on(view.slots.device) for view in views]
    rules = [replace(one.rule, budget=None) if stochastic else one.rule for one in placed]
    return [rule.layer_limit(view, one.shares()) for rule, one, view in zip(rules, placed, views, strict=True)]


def _sizes(manager: MemoryManager, context: KnownContext) -> tuple[float, float | None]:
    """Return the slots per head and the bytes that the manager's decision leaves, computed: nothing is evicted here.

    From a trace, which has no keys, the bytes are not known: None.
    """
    counts, size = [], 0.0
    known = all(view.keys.shape[-1] for view in context.views)
    for view, decision in zip(context.views, manager.decide_all(context.views), strict=True):
        kept = decision.keep.sum(-1).float()
        counts.append(kept.mean())
        size += float(kept.sum()) * float(slot_bytes(view, torch.tensor(decision.decay is not None)))
    return float(stacked(counts).mean()), size if known else None


def _oracle(manager: MemoryManager, context: KnownContext) -> Mapping[str, float]:
    values: dict[str, list[Tensor]] = {name: [] for name in ORACLE}
    module = _Score(manager)
    decisions = manager.decide_all(context.views)
    for layer, (view, ends_within) in enumerate(zip(context.views, _ends_within(manager, context.views), strict=True)):
        scores, future = module(view, ends_within), context.future.peak[layer]
        order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
        keep = decisions[layer].keep
        values["rank_correlation"].append(against.rank_correlation(scores, future, view.valid))
        values["good_decisions"].append(against.good_decision_ratio(keep, context.future.next_use[layer], view.valid))
        values["sorted_cost"].append(plackett_luce.trace_cost(future, order))
    return {
        name: float(torch.cat([part.flatten().cpu() for part in parts]).nanmean()) for name, parts in values.items()
    }
