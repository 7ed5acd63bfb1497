"""Testing: the conformance kit, by which any manager on any model is held to the slot cache's contract.

Every check runs the manager and an independent slow path, and raises `ConformanceError` with what differs. For your own
manager, in pytest:

>>> import pytest                                                        # doctest: +SKIP
>>> from evomem.testing.conformance import CHECKS, run_check
>>> from evomem.testing.models import FAMILIES, tiny
>>> @pytest.mark.parametrize("family", FAMILIES)                         # doctest: +SKIP
... @pytest.mark.parametrize("check", CHECKS)
... def test_my_manager(check, family):
...     run_check(check, MyManager(budget=16), tiny(family))

or all at once, for a report: ``check_manager(MyManager(budget=16), model)``. The decisions must matter for the checks
to mean something: give a budget or a schedule that evicts from some 50 tokens.

**Types.** In fp32 the kit is strict: logits agree to 1e-5 of the largest, decisions and greedy tokens exactly. In fp16
and bf16 two right ways to the same logits differ by roundings of the type, so the kit allows `logit_tolerance` (.008
and .06 of the largest), and what hangs on a rounding is compared otherwise: a greedy token must be the best up to that
tolerance; a row's decision must be, exactly, what the manager decides about that row's part of the view; reading in
pieces carries out the decisions of reading at once, and the manager's own must agree with them in most slots. Hold a
manager to the kit in fp32 first; half precision then shows what only it can do wrong (products that overflow, scores
that tie).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from evomem.managers.base import MemoryManager
from evomem.managers.decision import Judgement
from evomem.memory import CachePolicy, Decision, LayerView, SlotCache, attached
from evomem.memory.kv.due import needs_all_layers
from evomem.memory.kv.policy import SchedulePolicy
from evomem.memory.kv.versions import passed
from evomem.testing.comparing import (
    ConformanceError,
    context_length,
    ends,
    greedy,
    is_exact,
    kept_tokens,
    kv_heads,
    logit_tolerance,
    random_rows,
    read,
    same_kept_tokens,
    same_logits,
    same_tensors,
    text_config,
)
from evomem.testing.half_precision import Replaying, RowByRow
from evomem.testing.reference import Batch, Tracing, explicit_biases, explicit_logits


@dataclass(frozen=True)
class CheckResult:
    """What became of one check: its name, whether it passed, and what differed if not."""

    name: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class KeepEverything:
    """A policy that keeps all, and otherwise looks and acts when the ``like`` policy does."""

    like: CachePolicy

    @property
    def observes(self) -> frozenset[str]:
        """Observations of the policy that it is like."""
        return self.like.observes

    @property
    def schedule(self) -> SchedulePolicy:
        """Schedule of the policy that it is like."""
        return self.like.schedule

    def decide(self, view: LayerView) -> Decision:
        """Keep every slot."""
        return Decision(view.valid)


def _cache(model: PreTrainedModel, policy: CachePolicy) -> SlotCache:
    return SlotCache.for_model(model, policy)


# ---- the seven points ------------------------------------------------------------------------------------------------


def check_keep_everything(manager: CachePolicy, model: PreTrainedModel, tokenizer: Any = None) -> None:
    """1. With nothing evicted, logits and greedy tokens are those of the stock model, left padding or not.

    The manager's observations are recorded and its schedule kept, which must change nothing.
    """
    length = context_length(manager)
    policy = KeepEverything(manager)
    for name, lengths in (("unpadded", [length, length]), ("left-padded", [length, length - 11, 7])):
        batch = Batch.of(random_rows(model, lengths, 1, tokenizer))
        stock = read(model, DynamicCache(config=model.config), batch)
        stock_tokens = greedy(model, None, batch.ids, 6, batch.real)
        with attached(model):
            same_logits(f"keep everything, {name}", read(model, _cache(model, policy), batch), stock, batch.real)
            if is_exact(model.dtype):
                mine = greedy(model, _cache(model, policy), batch.ids, 6, batch.real)
                same_tensors(f"keep everything, {name}: greedy tokens", mine, stock_tokens)
            else:
                _follows(f"keep everything, {name}", model, _cache(model, policy), batch, stock_tokens)


def check_evicted_is_hidden(manager: CachePolicy, model: PreTrainedModel, tokenizer: Any = None) -> None:
    """2. The evicted cache gives the logits of the full one under the explicit mask that hides the same tokens."""
    length = context_length(manager)
    batch = Batch.of(random_rows(model, [length + 12, length + 12 - 5], 2, tokenizer))
    tracing = Tracing(manager)
    with attached(model):
        got = read(model, _cache(model, tracing), batch, [length, 8, 1, 1, 1, 1])
    layers = int(text_config(model).num_hidden_layers)
    biases = explicit_biases(
        tracing.events, batch, layers, kv_heads(model), manager.schedule.every, waits=needs_all_layers(manager)
    )
    same_logits("evicted against hidden", got, explicit_logits(model, batch, biases), batch.real)


def check_row_alone(manager: CachePolicy, model: PreTrainedModel, tokenizer: Any = None) -> None:
    """3. A row of a left-padded batch gets the decisions and the logits that it gets alone."""
    length = context_length(manager)
    batch = Batch.of(random_rows(model, [length - 9, length + 4, length - 2], 3, tokenizer))
    pieces = [length, 1, 1, 1, 1]
    if not is_exact(model.dtype):
        with attached(model):
            read(model, _cache(model, RowByRow(manager)), batch, pieces)
        return
    with attached(model):
        together = _cache(model, manager)
        logits = read(model, together, batch, pieces)
        for row in range(len(batch.ids)):
            single = batch.row(row)
            alone = _cache(model, manager)
            wanted = read(model, alone, single, [single.ids.shape[1] - 4, 1, 1, 1, 1])
            label = f"row {row} in a batch against alone"
            same_kept_tokens(label, kept_tokens(together, row), kept_tokens(alone, 0))
            same_logits(label, logits[row : row + 1, -single.ids.shape[1] :], wanted)


def check_chunks(manager: CachePolicy, model: PreTrainedModel, tokenizer: Any = None) -> None:
    """4. A context read in pieces leaves the memory that it leaves when read at once.

    A manager that decides once reads the pieces inside ``cache.reading()``. Where a decision waits for the end of the
    pass in which it falls due (a manager that needs all layers, with ``every``), passes that end there are cut further.
    """
    length, every = context_length(manager), manager.schedule.every
    waits = every is not None and needs_all_layers(manager)
    shorter = length + 2 - every if waits and every is not None else length - 4
    batch = Batch.of(random_rows(model, [length + 2, max(shorter, 1)], 4, tokenizer))
    passes = [length]
    cuts = [[length // 3, length - length // 3], [13] * (length // 13) + [length % 13 or 1]]
    if waits and every is not None:
        passes = [every] * (length // every) + [length % every] * bool(length % every)
        cuts = [[part for one in passes for part in (one // 2, one - one // 2) if part]]
    exact = is_exact(model.dtype)
    with attached(model):
        tracing = Tracing(manager)
        whole = _cache(model, manager if exact else tracing)
        wanted = read(model, whole, batch, [*passes, 1, 1])
        for pieces in cuts:
            if sum(pieces) != length:
                pieces[-1] += length - sum(pieces)
            replaying = Replaying(manager, tracing.events)
            parts = _cache(model, manager if exact else replaying)
            with parts.reading():
                first = read(model, parts, batch, pieces)
            logits = torch.cat((first, read(model, parts, batch, [1, 1], at=length)), 1)
            for row in range(2):
                same_kept_tokens(f"pieces {pieces}, row {row}", kept_tokens(parts, row), kept_tokens(whole, row))
            same_logits(f"pieces {pieces}", logits, wanted, batch.real)
            replaying.require_agreement(f"pieces {pieces}")


def check_continuation(manager: CachePolicy, model: PreTrainedModel, tokenizer: Any = None) -> None:
    """5a. A second ``generate`` on the same cache gives what one long one gives, and what calling the model gives."""
    length = context_length(manager)
    for lengths in ([length], [length, length - 7]):
        batch = Batch.of(random_rows(model, lengths, 5, tokenizer))
        with attached(model):
            wanted = greedy(model, _cache(model, manager), batch.ids, 9, batch.real)
            cache = _cache(model, manager)
            first = greedy(model, cache, batch.ids, 4, batch.real)
            real = torch.cat((batch.real, torch.ones_like(first, dtype=torch.bool)), 1)
            second = greedy(model, cache, torch.cat((batch.ids, first), 1), 5, real)
            same_tensors("second generate on one cache", torch.cat((first, second), 1), wanted)
            _follows("forward against generate", model, _cache(model, manager), batch, wanted)


def _follows(label: str, model: PreTrainedModel, cache: SlotCache, batch: Batch, tokens: Tensor) -> None:
    """Raise `ConformanceError` unless tokens (batch, new) are what calling the model step by step would append.

    In fp16 and bf16 a token's logit must be the largest up to `logit_tolerance`.
    """
    logits = read(model, cache, batch)[:, -1]
    for step in range(tokens.shape[1]):
        if stops := ends(model):
            logits[:, stops] = -torch.inf
        said = tokens[:, step : step + 1]
        if is_exact(model.dtype):
            same_tensors(f"{label}: token {step}", logits.argmax(-1, keepdim=True), said)
        else:
            scores = logits.float()
            scale = scores.masked_fill(scores.isinf(), 0.0).abs().amax().clamp(min=1)
            short = scores.amax(-1) - scores.gather(-1, said)[:, 0]
            if not float(short.max() / scale) <= logit_tolerance(model.dtype):
                row = int(short.argmax())
                raise ConformanceError(f"{label}: row {row}: token {step} is {float(short[row]):.3g} below the best")
        ids = torch.cat((batch.ids, tokens[:, : step + 1]), 1)
        real = torch.cat((batch.real, torch.ones(len(ids), step + 1, dtype=torch.bool)), 1)
        grown = Batch(ids, real, (real.long().cumsum(1) - 1).clamp(min=0))
        logits = read(model, cache, grown, at=ids.shape[1] - 1)[:, -1]


def check_beams(manager: CachePolicy, model: PreTrainedModel, tokenizer: Any = None) -> None:
    """5b. The score that beam search gives its sequences is their likelihood, read straight through."""
    length, new = context_length(manager), 6
    batch = Batch.of(random_rows(model, [length, length - 6], 6, tokenizer))
    with attached(model):
        out: Any = model.generate(  # type: ignore[operator]
            batch.ids, attention_mask=batch.real.long(), **passed(_cache(model, manager)),
            num_beams=3, do_sample=False, num_return_sequences=3, max_new_tokens=new, min_new_tokens=new,
            length_penalty=0.0, pad_token_id=0, return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        sequences = out.sequences
        real = torch.cat((batch.real.repeat_interleave(3, 0), torch.ones(6, new, dtype=torch.bool)), 1)
        whole = Batch(sequences, real, (real.long().cumsum(1) - 1).clamp(min=0))
        logits = read(model, _cache(model, manager), whole, [length, *[1] * (new - 1)])[:, length - 1 :].float()
    if stops := ends(model):
        # Suppressed ends keep their share of the probability: transformers masks after the softmax.
        log = logits.log_softmax(-1)
        log[..., stops] = -torch.inf
    else:
        log = logits.log_softmax(-1)
    wanted = log.gather(-1, sequences[:, length:, None])[..., 0].sum(-1)
    worst = float((out.sequences_scores.float() - wanted).abs().max())
    allowed = 1e-3 if is_exact(model.dtype) else logit_tolerance(model.dtype) * max(1.0, float(logits.abs().max()))
    if not worst <= allowed:
        raise ConformanceError(
            f"beam search: a sequence's score is {worst:.2e} nats from its likelihood (allowed {allowed:.0e})"
        )


def check_causality(manager: CachePolicy, model: PreTrainedModel, tokenizer: Any = None) -> None:
    """6a. Tokens that come after a decision change neither the decision nor any logits before them."""
    every, length = manager.schedule.every, context_length(manager)
    shared = length if every is None else length // every * every
    rows = random_rows(model, [length, 15, 15], 7, tokenizer)
    pieces = [length, 15] if every is None else [length + 15 - (length - shared)]
    traces, outputs = [], []
    with attached(model):
        for tail in rows[1:]:
            batch = Batch.of([torch.cat((rows[0][:shared], tail))])
            traces.append(Tracing(manager))
            outputs.append(read(model, _cache(model, traces[-1]), batch, pieces)[:, :shared])
    same_logits("later tokens changed: earlier logits", outputs[0], outputs[1])
    for layer, events in traces[0].events.items():
        for mine, theirs in zip(events, traces[1].events[layer], strict=False):
            if mine.seen <= shared:
                same_tensors(f"later tokens changed: decision at {mine.seen}, layer {layer}", mine.keep, theirs.keep)


def check_evicted_values(manager: CachePolicy, model: PreTrainedModel, tokenizer: Any = None) -> None:
    """6b. Keys and values that a decision evicts, and what lies in empty slots, never reach the logits again."""
    length = context_length(manager)
    batch = Batch.of(random_rows(model, [length + 14], 8, tokenizer))
    pieces = [length, 9, 1, 1, 1, 1, 1]
    with attached(model):
        wanted = read(model, _cache(model, manager), batch, pieces)
        spoiled = read(model, _cache(model, Tracing(manager, spoil=True)), batch, pieces)
        same_tensors("evicted values spoiled: logits", spoiled, wanted)
        cache = _cache(model, manager)
        first = read(model, cache, batch, pieces[:2])
        for layer in cache.layers:
            tensors = layer.storage.even
            empty = (tensors["slots"] < 0)[..., None]
            tensors["keys"], tensors["values"] = (
                tensors["keys"].masked_fill(empty, 1e3),
                tensors["values"].masked_fill(empty, -1e3),
            )
        rest = read(model, cache, batch, pieces[2:], at=sum(pieces[:2]))
        same_tensors("empty slots filled: logits", torch.cat((first, rest), 1), wanted)


def check_repeatable(manager: CachePolicy, model: PreTrainedModel, tokenizer: Any = None) -> None:
    """7a. The same input and seed give the same memory and logits, to the bit, whatever ran before."""
    length = context_length(manager)
    batch = Batch.of(random_rows(model, [length, length - 3], 9, tokenizer))
    with attached(model):
        first = _cache(model, manager)
        wanted = read(model, first, batch)
        torch.rand(3)  # a manager must not draw from the global state
        second = _cache(model, manager)
        same_tensors("run twice: logits", read(model, second, batch), wanted)
        first.reset()
        same_tensors("after reset: logits", read(model, first, batch), wanted)
    for mine, theirs in zip(first.layers, second.layers, strict=True):
        same_tensors(f"run twice: slots of layer {mine.index}", mine.slots, theirs.slots)


def check_ties(manager: CachePolicy, model: PreTrainedModel, tokenizer: Any = None) -> None:
    """7b. Scores are fp32 also for a bf16 cache, and equal scores are told apart by position only."""
    if not isinstance(manager, MemoryManager) or manager.whole_model:
        return
    length = context_length(manager)
    batch = Batch.of(random_rows(model, [length - 8, length], 10, tokenizer))
    views: list[LayerView] = []

    class Looking(KeepEverything):
        def decide(self, view: LayerView) -> Decision:
            views.append(view)
            return Decision(view.valid)

    with attached(model):
        read(model, _cache(model, Looking(manager)), batch)
    for view in views:
        low = replace(view, keys=view.keys.bfloat16(), values=view.values.bfloat16(), memo={})
        if (dtype := manager.score(low).dtype) != torch.float32:
            raise ConformanceError(f"scores of a bf16 cache are {dtype}, not fp32: most of them would tie by rounding")
        device = view.slots.device
        equal = torch.zeros(view.slots.shape, device=device)
        rule, shares = manager.rule, manager.shares()
        keep = rule.decide(Judgement(equal, shares=shares), view).keep
        row = LayerView(
            view.keys[:1, :, view.start[0] :], view.values[:1, :, view.start[0] :],
            view.slots[:1, :, view.start[0] :] - view.start[0], torch.zeros(1, dtype=torch.int64, device=device),
            view.seen - int(view.start[0]), view.fresh, view.layer, view.layers,
        )  # fmt: skip
        if bool((view.slots[0] == torch.arange(view.seen, device=device)).logical_or(view.slots[0] < 0).all()):
            alone = rule.decide(Judgement(equal[:1, :, view.start[0] :], shares=shares), row).keep
            same_tensors(f"ties, layer {view.layer}: kept in a padded batch", keep[:1, :, view.start[0] :], alone)


Check = Callable[[CachePolicy, PreTrainedModel, Any], None]

_CHECKS: tuple[Check, ...] = (
    check_keep_everything,
    check_evicted_is_hidden,
    check_row_alone,
    check_chunks,
    check_continuation,
    check_beams,
    check_causality,
    check_evicted_values,
    check_repeatable,
    check_ties,
)
_BY_NAME: dict[str, Check] = {check.__name__.removeprefix("check_"): check for check in _CHECKS}

CHECKS: tuple[str, ...] = tuple(_BY_NAME)
"""Names of all checks, for `run_check` and ``pytest.mark.parametrize``."""


def run_check(name: str, manager: CachePolicy, model: PreTrainedModel, tokenizer: Any = None) -> None:
    """Run one of `CHECKS`; raise `ConformanceError` with what differs.

    A manager that decides otherwise on another model (a method ``for_model``) is asked what it is on this one.
    """
    if name not in _BY_NAME:
        raise ConformanceError(f"unknown check {name!r}; there are {', '.join(CHECKS)}")
    manager = manager.for_model(model) if hasattr(manager, "for_model") else manager
    _BY_NAME[name](manager, model, tokenizer)


def check_manager(manager: CachePolicy, model: PreTrainedModel, tokenizer: Any = None) -> list[CheckResult]:
    """Run all checks on a model and return what became of each; nothing is raised for a check that fails.

    Parameters
    ----------
    manager : anything with ``observes``, ``schedule`` and ``decide``.
    model : any supported model, on the CPU; a tiny random one will do (`evomem.testing.models.tiny`). In fp32 every
        check is exact, in fp16 and bf16 as exact as the type (see the module's docstring).
    tokenizer : only used to leave out its special tokens.
    """
    results = []
    for name in CHECKS:
        try:
            run_check(name, manager, model, tokenizer)
        except ConformanceError as error:
            results.append(CheckResult(name, False, str(error)))
        else:
            results.append(CheckResult(name, True))
    return results
