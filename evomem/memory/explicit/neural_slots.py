"""Memory: a neural memory about which a manager decides: what of a segment it takes in, and with which gates.

The tokens of the segment that is read are slots. A decision says which of them are stored, and moves their gates α, η
and θ. Then the weights are learnt again from those that the segment began with, so a token that is not stored, or
leaves at a later decision within the segment, is as if the memory had never seen it. When the next segment begins,
what is left of the segment is in the weights for good, and its slots go.

Surprise is measured by the weights that the segment began with, so it is known before anything of the segment is
learnt. What a token reads before the decision about it, its own write included, the model wrote undecided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from evomem.errors import CacheError, ConfigError
from evomem.memory.explicit.beside import LayerWithTensors
from evomem.memory.explicit.decided import DecidedCache
from evomem.memory.explicit.neural import TAILS, WEIGHTS, WINDOW, NeuralCache, NeuralLayer
from evomem.memory.explicit.neural_gates import NeuralRule
from evomem.memory.explicit.neural_rules import (
    Gates,
    Surprise,
    after,
    answer,
    coefficients,
    linear_scan,
    surprise,
    take_in,
)
from evomem.memory.explicit.padded import moved_starts
from evomem.memory.explicit.segmented import require_nothing_behind
from evomem.memory.kv.policy import CachePolicy
from evomem.memory.observations.gates import GATES, HORIZON
from evomem.memory.observations.matching import PREDICTIONS
from evomem.memory.observations.updates import CHANGES
from evomem.memory.view import Decision, LayerView


class NeuralSlots(LayerWithTensors):  # type: ignore[no-untyped-call]
    """The neural memory of one layer; the tokens of each row's segment are slots: (batch, heads, tokens, size).

    Parameters
    ----------
    rule : how it learns.

    Attributes
    ----------
    memory, momentum, anchor, tail_key, window_keys, ... : as of `NeuralLayer`.
    momentum_before : (batch, heads, numbers), S as each row's segment began, as ``anchor`` is M.
    altered : (batch,) bool, whether gates of tokens of the segment were moved.
    mean_error : (batch, heads), running mean of ‖M'(k) - v‖ over about `HORIZON` tokens.
    """

    title: ClassVar[str] = "a neural memory"
    not_undone: ClassVar[str] = "what its weights learnt cannot be taken out of them"
    has: frozenset[str] = frozenset({CHANGES, PREDICTIONS, GATES})
    beside_names: ClassVar[tuple[str, ...]] = (
        *WEIGHTS, "momentum_before", "altered", "mean_error", *TAILS, *WINDOW, "window_real",
    )  # fmt: skip
    beside_optional: ClassVar[frozenset[str]] = frozenset({"tail_recall", *WINDOW, "window_real"})
    memory: Tensor | None
    momentum: Tensor | None
    anchor: Tensor | None
    momentum_before: Tensor | None
    altered: Tensor | None
    mean_error: Tensor | None
    tail_key: Tensor | None
    tail_value: Tensor | None
    tail_query: Tensor | None
    tail_recall: Tensor | None
    window_keys: Tensor | None
    window_values: Tensor | None
    recalled_keys: Tensor | None
    recalled_values: Tensor | None
    window_real: Tensor | None

    def __init__(
        self, rule: NeuralRule, index: int = 0, layers: int = 1, *, observes: frozenset[str] = frozenset()
    ) -> None:
        self.rule = rule
        super().__init__(index, layers, observes=observes | {GATES})
        for one in self.wanted.observations:
            if one.every_query and one.name != "recency":  # which is then the time since a token came
                raise ConfigError(
                    f"observation {one.spec!r} is of attention, and nobody attends to the tokens of {self.title}; take "
                    "a manager, or features, that observe something else: surprise, surprise_ratio, change, agreement"
                )

    def copy_empty(self) -> NeuralSlots:
        """Return an empty memory of the same kind."""
        return type(self)(self.rule, self.index, self.layers, observes=self.observes)

    # ---- as the model reads and writes it -------------------------------------------------------------------------

    def begin_rows(self, rows: int, device: torch.device) -> None:
        """Let every one of ``rows`` texts begin at the next token."""
        self.reset()  # a pass that was refused may have begun them
        self._begin(rows, torch.empty(0, device=device))

    def begin(self, initial: Tensor, rows: int) -> None:
        """Start every row with the weights ``initial`` (heads, numbers), and a segment where the last one has ended."""
        if self.memory is None:
            self.memory, self.anchor = (initial.expand(rows, *initial.shape).clone() for _ in range(2))
            self.momentum, self.momentum_before = torch.zeros_like(self.memory), torch.zeros_like(self.memory)
            self.altered = torch.zeros(rows, dtype=torch.bool, device=initial.device)
            self.mean_error = initial.new_zeros(rows, len(initial))
            return
        ended = [self.seen > start and (self.seen - start) % self.rule.segment == 0 for start in self.starts]
        if not any(ended) or not self.storage.even:
            return
        begins = torch.tensor(ended, device=self.memory.device)
        part = begins[:, None, None]
        begun = NeuralLayer.begun
        self.anchor = torch.where(part, self.memory, begun(self.anchor))
        self.momentum_before = torch.where(part, begun(self.momentum), begun(self.momentum_before))
        self.altered = begun(self.altered) & ~begins
        self.storage.keep((self.slots >= 0) & ~part, self.recorder)

    def recall(self, queries: Tensor, widths: tuple[int, ...]) -> Tensor:
        """Return what tokens read of M as their segment began, (batch, heads, tokens, out)."""
        return answer(NeuralLayer.begun(self.anchor), queries, widths)

    def exchange(
        self, keys: Tensor, values: Tensor, queries: Tensor, gates: Gates, widths: tuple[int, ...], limit: float | None
    ) -> tuple[Tensor, Surprise]:
        """Let tokens of one segment write, undecided, and each read after its own write; see `NeuralLayer.exchange`.

        Raises
        ------
        CacheError : the gates do not say what they were made of.
        """
        if gates.logits is None:
            raise CacheError("a neural memory that is decided about needs the log-odds of its gates (Gates.logits)")
        anchor, memory, momentum = (NeuralLayer.begun(part) for part in (self.anchor, self.memory, self.momentum))
        reads, learnt, self.memory, self.momentum = take_in(
            anchor, memory, momentum, keys, values, queries, gates, widths, limit
        )
        self.storage.append(keys, values, self.seen, gates.real, self.recorder)
        self._observe(learnt, values, gates.logits, gates.real)
        self.note_reads(queries, None, gates.real)
        self.storage.settle(self.recorder)
        return reads, learnt

    def _observe(self, learnt: Surprise, values: Tensor, logits: Tensor, real: Tensor | None) -> None:
        """Let the recorder see how the newest tokens surprise the memory."""
        error = learnt.residual.norm(dim=-1)
        smallest = torch.finfo(error.dtype).tiny
        number = self.seen + 1 - self.start[:, None] + torch.arange(error.shape[2], device=error.device)
        share = (1 / number.clamp(1, HORIZON)).to(error.dtype)[:, None].expand_as(error)
        share = share if real is None else share * real[:, None]
        inputs = share * error
        carried = (1 - share[..., :1]) * NeuralLayer.begun(self.mean_error)[..., None]
        inputs = torch.cat((inputs[..., :1] + carried, inputs[..., 1:]), -1)
        means = linear_scan(1 - share, inputs[..., None])[..., 0]
        self.mean_error = means[..., -1].clone()
        self.recorder.predicted(error / values.norm(dim=-1).clamp(min=smallest))
        self.recorder.gated(logits, error / means.clamp(min=smallest))
        if any(CHANGES in one.needs for one in self.wanted.observations):
            whole = self.recorder.whole(self.storage.layout)
            whole.updated(answer(NeuralLayer.begun(self.anchor), self.keys, self.rule.widths), self.values)
            self.recorder.take_over(whole, self.storage.layout)

    def end_segment(self, rows: Tensor | None) -> None:
        """Do nothing: a segment is decided about until the next one begins; see `begin`."""

    # ---- what managers decide about -------------------------------------------------------------------------------

    def view(self) -> LayerView:
        """What a manager sees now: the tokens of the segment, all of which it may refuse.

        ``start`` is where the segment begins, so that a budget counts its tokens.
        """
        view = super().view()
        read = (self.seen - 1 - self.start).clamp(min=0)
        return replace(view, start=self.start + read // self.rule.segment * self.rule.segment, fresh=self.seen)

    def apply(self, decision: Decision, rows: Tensor | None = None) -> None:
        """Learn the segment again as a decision says; ``rows`` (batch,) bool limits it to some rows.

        Raises
        ------
        CacheError : a segment has ended and was not decided about, so that it is in the weights; or the decision says
            what tokens hold, which only the model does.
        """
        if rows is None:
            self._require_decided()
        self.refuse_writing(decision)
        if decision.evicted is not None:
            before = torch.zeros_like(decision.evicted) if self.evicted is None else self.evicted
            self.evicted = decision.evicted if rows is None else torch.where(rows[:, None], decision.evicted, before)
        filled = self.slots >= 0
        keep = decision.keep & filled
        keep = keep if rows is None else torch.where(rows[:, None, None], keep, filled)
        self._learn_again(keep, decision.gates, decision.decay, rows)
        self.storage.keep(keep, self.recorder)
        self.decided = self.seen

    def keep(self, mask: Tensor) -> None:
        """Take every token where ``mask`` (batch, heads, slots) is False out of the memory.

        Raises
        ------
        CacheError : the mask has another shape than the slots; or a decision moved gates, see `_require_plain_gates`.
        """
        self._require_plain_gates()
        if tuple(mask.shape) == self.storage.shape:
            self._learn_again(mask & (self.slots >= 0), None, None, None)
        super().keep(mask)

    def decay(self, log_decay: Tensor) -> None:
        """Let tokens be learnt less: log-decay (batch, heads, slots) <= 0 is added to log θ of each.

        Raises
        ------
        CacheError : a decision moved gates, see `_require_plain_gates`.
        """
        self._require_plain_gates()
        self._learn_again(self.slots >= 0, None, log_decay, None)

    def _require_plain_gates(self) -> None:
        """Raise `CacheError` where gates of the segment were moved: learning it again would not know by how much."""
        if self.altered is not None and bool(self.altered.any()):
            raise CacheError(
                "a decision moved the gates with which tokens of this segment were learnt; tell which tokens stay, how "
                "gates move and how much is learnt in one decision (apply), for each is of the whole segment"
            )

    def _learn_again(
        self, stored: Tensor, offsets: Tensor | None, strength: Tensor | None, rows: Tensor | None
    ) -> None:
        """Make M and S of those that the segment began with and of its tokens, in the rows where that changes them.

        stored : (batch, heads, slots) bool. offsets, strength : see `NeuralRule.gates`; None: 0.
        """
        if not self.slots.shape[2]:
            return
        begun = NeuralLayer.begun
        filled = self.slots >= 0
        logits = self.recorder.whole(self.storage.layout).slotwise[GATES].to(self.keys.dtype)
        offsets = torch.zeros_like(logits) if offsets is None else offsets
        moved = (torch.where(filled[..., None], offsets, 0.0) != 0).any(-1)
        if strength is not None:
            moved = moved | (torch.where(filled, strength, 0.0) != 0)
        changed = (moved | (filled & ~stored)).flatten(1).any(1) | begun(self.altered)
        changed = changed if rows is None else changed & rows
        learnt = surprise(begun(self.anchor), self.keys, self.values, self.rule.widths, self.rule.limit)
        parts = coefficients(self.rule.gates(logits, offsets, strength), stored)
        again = after(begun(self.anchor), begun(self.momentum_before), learnt, parts)
        # A row about which nothing was decided stays as the model made it, to the bit.
        self.memory, self.momentum = (
            torch.where(changed[:, None, None], new, old)
            for new, old in zip(again, (begun(self.memory), begun(self.momentum)), strict=True)
        )
        altered = moved.flatten(1).any(1)
        self.altered = altered if rows is None else torch.where(rows, altered, begun(self.altered))

    def _require_decided(self) -> None:
        """Raise `CacheError` where a segment ended since the last decision, and another one has begun."""
        segment = self.rule.segment
        for start in self.starts:
            first = start + max(self.seen - 1 - start, 0) // segment * segment
            if self.decided < first and first > start:
                raise CacheError(
                    f"a segment of {segment} tokens ended and was learnt before a decision about it; decide at its end "
                    f"at the latest: every={segment} (--protocol streaming:{segment}), or a number that divides it"
                )

    def load_state(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on, to the bit, as the memory that `state` was taken of.

        Raises
        ------
        CacheError : see `LayerWithTensors.load_state`; or tensors are not those of such a memory.
        """
        super().load_state(facts, tensors)
        if not self.seen:
            return
        try:
            self._check()
        except CacheError:
            self.reset()
            raise

    def _check(self) -> None:
        """Raise `CacheError` unless tensors fit each other, and slots are tokens of the segment."""
        where, beside, begun = f"state of {self.title}", self.beside(), NeuralLayer.begun
        known = {name: part for name, part in beside.items() if name in NeuralLayer.tensor_names}
        NeuralLayer().check(where, known | {"start": self.start}, self.seen)
        shape, keys = begun(self.memory).shape, self.storage.even["keys"]
        wanted = {
            "momentum_before": (tuple(shape), begun(self.memory).dtype),
            "altered": (tuple(shape[:1]), torch.bool),
            "mean_error": (tuple(shape[:2]), begun(self.memory).dtype),
        }
        for name, right in wanted.items():
            if (tuple(beside[name].shape), beside[name].dtype) != right:
                raise CacheError(
                    f"{where}: {name!r} is {tuple(beside[name].shape)} of {beside[name].dtype}; save it again"
                )
        size = self.rule.widths[0]
        if any(self.storage.even[name].shape[1::2] != (shape[1], size) for name in ("keys", "values")):
            raise CacheError(
                f"{where}: tokens of {tuple(keys.shape)} for {shape[1]} memories of width {size}; save it again"
            )
        first = self.start + (self.seen - 1 - self.start).clamp(min=0) // self.rule.segment * self.rule.segment
        if bool(((self.slots >= 0) & (self.slots < first[:, None, None])).any()):
            raise CacheError(f"{where}: a slot holds a token of an earlier segment; save it again")


class NeuralSlotsCache(DecidedCache):
    """The neural memories of all layers, about which a manager decides.

    Parameters
    ----------
    blocks : layers of the model.
    rule : how their memories learn.
    policy : the manager.

    Raises
    ------
    ConfigError : the manager would decide when no segment ends, or observes something that means nothing here.
    """

    layers: list[NeuralSlots]  # type: ignore[assignment]

    def __init__(self, blocks: int, rule: NeuralRule, policy: CachePolicy) -> None:
        every = policy.schedule.every
        if every is not None and rule.segment % every:
            raise ConfigError(
                f"the manager decides every {every} tokens, and a neural memory has learnt a segment of {rule.segment} "
                f"for good when the next one begins; give every={rule.segment} (--protocol streaming:{rule.segment}), "
                "or a number that divides it"
            )
        super().__init__(
            [NeuralSlots(rule, index, blocks, observes=policy.observes) for index in range(blocks)], {}, policy
        )
        self.rule = rule

    def copy_empty(self) -> NeuralSlotsCache:
        """Return an empty cache of the same layers."""
        return type(self)(self.depth, self.rule, self.policy)

    def require_rule(self, rule: NeuralRule) -> None:
        """Raise `CacheError` unless the cache was made for a model whose memories learn so."""
        if self.rule != rule:
            raise CacheError(
                f"this memory is of a model whose memories learn by {self.rule}, those of this model by {rule}; give "
                "it the cache of its own decided_cache(manager)"
            )

    @property
    def starts(self) -> tuple[int, ...]:
        """Where the first segment of every row begins: at its first token."""
        return self.layers[0].starts

    def begin_rows(self, rows: int, device: torch.device) -> None:
        """Let every one of ``rows`` texts begin at the next token."""
        for layer in self.layers:
            layer.begin_rows(rows, device)

    def note_padding(self, real: Tensor) -> None:
        """Move the beginning of rows that have read nothing but padding; see `SegmentedCache.note_padding`."""
        require_nothing_behind(self.starts, self.get_seq_length(), real, NeuralCache.why_left)
        moved = moved_starts(self.starts, self.get_seq_length(), real)
        for layer in self.layers:
            layer.start, layer.starts = torch.tensor(moved, dtype=torch.int64, device=real.device), moved

    def decide_rows(self, due: Sequence[bool]) -> None:
        """Let the manager decide about the rows that are due, whose segments, or parts of them, have ended."""
        if all(due):
            self.decide()
            return
        rows = torch.tensor(due, device=self.layers[0].start.device)
        for layer, decision in zip(self.layers, self.decisions(), strict=True):
            layer.apply(decision, rows)
