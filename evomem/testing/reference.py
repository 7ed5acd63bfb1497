"""Testing: slow attention that the slot cache is held against: nothing evicted, an explicit mask per layer and head.

Nothing here uses the slot cache's own mask, compaction or schedule: who may look at whom is what the model's own mask
says, written out by transformers, less what the manager's decisions evicted, worked out over the whole sequence and
applied by a plain softmax.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from evomem.memory import CachePolicy, Decision, LayerView
from evomem.memory.kv.due import decide_all, needs_all_layers
from evomem.memory.kv.policy import SchedulePolicy

REFERENCE = "evomem_reference"
"""Name under which the explicit attention is registered with transformers while a reference runs."""


@dataclass(frozen=True)
class Batch:
    """Sequences to read: tokens, which of them are real, and the positions given to the model.

    Attributes
    ----------
    ids : (batch, tokens) int64.
    real : (batch, tokens) bool, False for padding.
    positions : (batch, tokens) int64, the place of a token among the real ones of its row.
    """

    ids: Tensor
    real: Tensor
    positions: Tensor

    @classmethod
    def of(cls, rows: list[Tensor], length: int | None = None) -> Batch:
        """Left-pad rows (tokens,) to ``length`` (by default the longest) with token 0."""
        length = max(len(row) for row in rows) if length is None else length
        ids = torch.zeros(len(rows), length, dtype=torch.int64)
        real = torch.zeros(len(rows), length, dtype=torch.bool)
        for at, row in enumerate(rows):
            ids[at, length - len(row) :] = row
            real[at, length - len(row) :] = True
        return cls(ids, real, (real.long().cumsum(1) - 1).clamp(min=0))

    @property
    def start(self) -> Tensor:
        """(batch,) index of the first real token; the length for a row of padding."""
        return torch.where(self.real.any(1), self.real.long().argmax(1), self.real.shape[1])

    def row(self, index: int) -> Batch:
        """One row alone, without its padding."""
        return Batch.of([self.ids[index][self.real[index]]])


@dataclass(frozen=True)
class Event:
    """One decision about a layer: ``seen`` tokens had been read, ``fresh`` since the last one, ``slots`` were held."""

    seen: int
    fresh: int
    slots: Tensor
    keep: Tensor
    decay: Tensor | None


@dataclass
class Tracing:
    """A policy that does what another does, and writes every decision down.

    ``spoil`` overwrites evicted keys and values with NaN when a decision is made: logits that still depend on them
    become NaN.
    """

    policy: CachePolicy
    spoil: bool = False
    events: dict[int, list[Event]] = field(default_factory=dict)

    @property
    def observes(self) -> frozenset[str]:
        """Observations of the policy."""
        return self.policy.observes

    @property
    def schedule(self) -> SchedulePolicy:
        """Schedule of the policy."""
        return self.policy.schedule

    @property
    def whole_model(self) -> bool:
        """Whether the policy decides about all layers at once."""
        return needs_all_layers(self.policy)

    def decide(self, view: LayerView) -> Decision:
        """Let the policy decide, and remember what it said."""
        return self._noted(view, self.policy.decide(view))

    def decide_all(self, views: Sequence[LayerView]) -> list[Decision]:
        """Let the policy decide about all layers, and remember what it said."""
        return [
            self._noted(view, decision) for view, decision in zip(views, decide_all(self.policy, views), strict=True)
        ]

    def _noted(self, view: LayerView, decision: Decision) -> Decision:
        decay = None if decision.decay is None else decision.decay.float().cpu().clone()
        event = Event(view.seen, view.fresh, view.slots.cpu().clone(), decision.keep.cpu().clone(), decay)
        self.events.setdefault(view.layer, []).append(event)
        if self.spoil:
            gone = ~decision.keep[..., None]
            view.keys.masked_fill_(gone, torch.nan)
            view.values.masked_fill_(gone, torch.nan)
        return decision


def explicit_biases(
    events: dict[int, list[Event]],
    batch: Batch,
    layers: int,
    kv_heads: int,
    every: int | None,
    *,
    waits: bool = False,
) -> list[Tensor]:
    """Return per layer the additive mask (batch, kv_heads, tokens, tokens) that hides what the decisions evicted.

    Query i does not see key j when a decision taken after fewer than i + 1 tokens evicted j. A decision counts for a
    row when it is the row's turn: every ``every`` of its own tokens, or once for all. Where a decision ``waits`` for
    the end of a pass, it counts for the rows that had a turn since the last one. The model's own mask is left out.
    """
    rows, length = batch.ids.shape
    base = torch.zeros(rows, 1, length, length)
    biases = []
    for layer in range(layers):
        bias = base.repeat(1, kv_heads, 1, 1)
        last, passed = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
        for event in events.get(layer, []):
            read = (event.seen - batch.start).clamp(min=0)
            turn = torch.ones(rows, dtype=torch.bool) if every is None else (read > 0) & (read % every == 0)
            if waits and every is not None:
                turn = (read // every > passed) & (event.seen - last == event.fresh)
                last, passed = torch.where(turn, event.seen, last), torch.where(turn, read // every, passed)
            for row in turn.nonzero().flatten().tolist():
                for head in range(kv_heads):
                    _apply(bias[row, head], event, row, head)
        real = batch.real[:, None, :, None]
        biases.append(torch.where(real, bias, base))
    return biases


def _apply(bias: Tensor, event: Event, row: int, head: int) -> None:
    """Carry one head's share of a decision into its mask (tokens, tokens)."""
    slots, keep = event.slots[row, head], event.keep[row, head]
    filled = slots >= 0
    if event.decay is not None:
        decay = event.decay[row, head]
        bias[event.seen :, slots[filled]] = torch.where(
            bias[event.seen :, slots[filled]] == -torch.inf, -torch.inf, decay[filled]
        )
    bias[event.seen :, slots[filled & ~keep]] = -torch.inf


class _PassState(threading.local):
    biases: list[Tensor] | None = None
    attention: list[Tensor] | None = None
    queries: list[Tensor] | None = None


_pass_state = _PassState()


def _explicit_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention as the textbook has it, under the model's mask and the bias of this layer."""
    if _pass_state.biases is None:
        raise RuntimeError("the reference attention runs inside explicit_logits() only")
    layer = getattr(module, "layer_idx", None)  # a vision tower's have none
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    logits = torch.einsum("bhqd,bhkd->bhqk", query.float(), key.float())
    logits = logits * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if layer is not None:
        logits = logits + _pass_state.biases[layer].to(logits.device).repeat_interleave(group, dim=1)
    if attention_mask is not None:
        # A padded query looks at itself: its output is of no use, but must be a number.
        alone = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device) & ~attention_mask.any(
            -1, keepdim=True
        )
        logits = logits.masked_fill(~(attention_mask | alone), -torch.inf)
    weights = torch.softmax(logits, dim=-1)
    if layer is not None and _pass_state.attention is not None:
        _pass_state.attention.append(weights.view(len(weights), -1, group, *weights.shape[2:]).mean(2))
    if layer is not None and _pass_state.queries is not None:
        _pass_state.queries.append(query.clone())
    output = torch.einsum("bhqk,bhkd->bhqd", weights, value.float()).to(query.dtype)
    return output.transpose(1, 2).contiguous(), weights


def _written_mask(**arguments: Any) -> Tensor:
    """The model's own mask, by transformers: (batch, 1, tokens, tokens) bool."""
    mask = sdpa_mask(**{**arguments, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    return cast(Tensor, mask)


@contextmanager
def _reference(model: PreTrainedModel) -> Iterator[None]:
    AttentionInterface.register(REFERENCE, _explicit_attention)
    AttentionMaskInterface.register(REFERENCE, _written_mask)
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = REFERENCE
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
        _pass_state.biases = _pass_state.attention = _pass_state.queries = None


@torch.no_grad()
def explicit_logits(model: PreTrainedModel, batch: Batch, biases: list[Tensor], **inputs: Any) -> Tensor:
    """Return the logits (batch, tokens, vocabulary) of one pass over everything, under one mask per layer and head.

    ``inputs`` are further ones of the model: images, token types.
    """
    return explicit_pass(model, batch, biases, **inputs)[0]


@torch.no_grad()
def explicit_pass(
    model: PreTrainedModel, batch: Batch, biases: list[Tensor], **inputs: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return the logits of `explicit_logits`, and per layer the attention and the queries.

    Returns
    -------
    logits : (batch, tokens, vocabulary).
    attention : per layer (batch, kv_heads, tokens, tokens), mean over the query heads of the KV head.
    queries : per layer (batch, query_heads, tokens, head_dim), as rotated.
    """
    with _reference(model):
        _pass_state.biases, _pass_state.attention, _pass_state.queries = biases, [], []
        inputs = {"attention_mask": batch.real.long(), "position_ids": batch.positions, **inputs}
        placed = {n: v.to(model.device) if isinstance(v, Tensor) else v for n, v in inputs.items()}
        logits = model(batch.ids.to(model.device), use_cache=False, **placed).logits
        return logits.cpu(), [one.cpu() for one in _pass_state.attention], [one.cpu() for one in _pass_state.queries]
