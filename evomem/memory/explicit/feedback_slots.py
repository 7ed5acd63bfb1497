"""Memory: the slots of a feedback memory where a manager decides: what is written, which leave, which fade.

When a block ends, every slot has what it held as its key, and what the block would have it hold as its value. The value
is what is read, so a memory about which nobody decides is written whole. A manager that gates what is written
(`evomem.managers.learned.write_gate`) puts something between the two in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from evomem.errors import CacheError, ConfigError
from evomem.memory.explicit.beside import LayerWithTensors
from evomem.memory.explicit.decided import DecidedCache
from evomem.memory.explicit.matrix import WINDOW
from evomem.memory.explicit.matrix_rules import precise
from evomem.memory.kv.policy import CachePolicy
from evomem.memory.observations.updates import CHANGES, UPDATES
from evomem.memory.view import Decision

NUMBER = "number"
"""Mark of a slot: which of the model's it is, and so at which of the block's last positions it stands."""


class FeedbackSlots(LayerWithTensors):  # type: ignore[no-untyped-call]
    """The feedback memory of one layer, a slot a summary; keys and values are (batch, 1, slots, hidden) fp32.

    Parameters
    ----------
    block : tokens of a block.
    count : slots that the model has; a manager may keep fewer.

    Attributes
    ----------
    window_keys, window_values, window_real : as of `FeedbackLayer`.
    """

    title: ClassVar[str] = "a feedback memory"
    has: frozenset[str] = frozenset({UPDATES, CHANGES, "queries without positions"})
    beside_names: ClassVar[tuple[str, ...]] = WINDOW
    slot_marks: ClassVar[frozenset[str]] = frozenset({NUMBER})
    window_keys: Tensor | None
    window_values: Tensor | None
    window_real: Tensor | None

    def __init__(
        self, index: int = 0, layers: int = 1, *, block: int = 1, count: int = 1, observes: frozenset[str] = frozenset()
    ) -> None:
        self.block, self.count = block, count
        super().__init__(index, layers, observes=observes)

    def copy_empty(self) -> FeedbackSlots:
        """Return an empty memory of the same kind."""
        return type(self)(self.index, self.layers, block=self.block, count=self.count, observes=self.observes)

    def begin(self, rows: int, initial: Tensor | None, device: torch.device) -> None:
        """Start ``rows`` texts with the feedback (slots, hidden) that a model begins with."""
        if initial is None:
            raise CacheError("this model has no feedback memory to decide about")
        self.reset()  # a pass that was refused may have begun it
        self._begin(rows, initial)
        slots = precise(initial).expand(rows, 1, *initial.shape)
        numbers = torch.arange(self.count, device=device).expand(rows, 1, -1)
        self.storage.append(slots.clone(), slots.clone(), 0, None, self.recorder, {NUMBER: numbers})
        self.storage.stamp(torch.zeros_like(self.slots))

    @property
    def feedback(self) -> Tensor:
        """What is read: (batch, slots, hidden) fp32."""
        return self.values[:, 0]

    @property
    def bias(self) -> Tensor:
        """Added to the logits of reads: (batch, slots) fp32, the log-decay; minus infinity for an empty slot."""
        decays = 0.0 if self.decays is None else self.decays[:, 0]
        return torch.where(self.slots[:, 0] >= 0, decays, -torch.inf)

    @property
    def numbers(self) -> Tensor:
        """Which of the model's slots these are: (batch, slots) int64."""
        return self.storage.whole(NUMBER)[:, 0]

    def read_by(self, tokens: Tensor, weights: Tensor) -> None:
        """Let the recorder see what tokens that come now read, before they are counted as read.

        tokens : (batch, tokens, hidden), normed. weights : (batch, heads, tokens, slots), their attention to the slots.
        """
        self.note_reads(tokens[:, None], weights.mean(1, keepdim=True))

    def compress(self, feedback: Tensor, due: Tensor) -> None:
        """Take what the block that has ended would have every slot hold: (batch, slots, hidden).

        due : (batch,) bool: all rows, whose blocks end together.
        """
        old, new = self.values, precise(feedback)[:, None]
        self.storage.rewrite(old, new)
        last = (self.seen - self.count + self.storage.whole(NUMBER)).clamp(min=0)
        self.storage.stamp(torch.where(self.slots >= 0, last, -1))
        whole = self.recorder.whole(self.storage.layout)
        whole.updated(old, new)
        self.recorder.take_over(whole, self.storage.layout)

    def apply(self, decision: Decision) -> None:
        """Carry out a decision, what is written included.

        Raises
        ------
        CacheError : a block has ended and was not decided about, so that it was written whole and read.
        """
        ended, decided = self.seen // self.block, self.decided // self.block
        if ended - decided > 1 or (ended > decided and self.seen % self.block):
            raise CacheError(
                f"a block of {self.block} tokens ended and was read before a decision about it; decide whenever one "
                f"ends: every={self.block} (--protocol streaming:{self.block}), or a number that divides it"
            )
        if decision.keys is not None and decision.values is not None:
            self.storage.rewrite(decision.keys, decision.values)
        super().apply(replace(decision, keys=None, values=None))
        self.storage.rewrite(self.values.clone(), self.values)  # the update is decided about, and not offered again

    def load_state(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on, to the bit, as the memory that `state` was taken of.

        Raises
        ------
        CacheError : see `LayerWithTensors.load_state`; or keys and values have other shapes than another, or another
            number of heads than one.
        """
        super().load_state(facts, tensors)
        if self.seen:
            even = self.storage.even
            if even["keys"].shape != even["values"].shape or even["keys"].shape[1] != 1:
                self.reset()
                raise CacheError(f"state of {self.title}: keys and values of other shapes; save it again")
            try:
                self._check()
            except CacheError:
                self.reset()
                raise

    def _check(self) -> None:
        """Raise `CacheError` unless numbers of slots are the model's, each once, and the window is one."""
        numbers = torch.where(self.slots >= 0, self.storage.whole(NUMBER), -1).sort(-1).values
        twice = ((numbers[..., 1:] == numbers[..., :-1]) & (numbers[..., 1:] >= 0)).any()
        wrong = (self.slots >= 0) & ((self.storage.whole(NUMBER) < 0) | (self.storage.whole(NUMBER) >= self.count))
        if bool(twice) or bool(wrong.any()):
            raise CacheError(f"state of {self.title}: {NUMBER!r} is no slot of the model's {self.count}; save it again")
        keys, values, real = (self.beside()[name] for name in WINDOW)  # all are there: `LayerWithTensors.load_state`
        fits = keys.dim() == 4 and keys.shape == values.shape and real.shape == (len(keys), keys.shape[2])
        if not fits or keys.shape[2] > self.seen or real.dtype != torch.bool or not keys.is_floating_point():
            raise CacheError(f"state of {self.title}: its window has other shapes or types; save it again")


class FeedbackSlotsCache(DecidedCache):
    """The feedback memories of all layers, about which a manager decides.

    Parameters
    ----------
    blocks : layers of the model.
    block : tokens of a block.
    count : slots of a layer.
    policy : the manager.

    Raises
    ------
    ConfigError : the manager would decide when no block ends, or observes something that means nothing here.
    """

    layers: list[FeedbackSlots]  # type: ignore[assignment]

    def __init__(self, blocks: int, block: int, count: int, policy: CachePolicy) -> None:
        every = policy.schedule.every
        if every is not None and block % every:
            raise ConfigError(
                f"the manager decides every {every} tokens, and a feedback memory is written whenever a block of "
                f"{block} ends; give every={block} (--protocol streaming:{block}), or a number that divides it"
            )
        sizes = {"block": block, "count": count}
        super().__init__(
            [FeedbackSlots(index, blocks, observes=policy.observes, **sizes) for index in range(blocks)], {}, policy
        )
        self.block, self.count = block, count

    def copy_empty(self) -> FeedbackSlotsCache:
        """Return an empty cache of the same layers."""
        return type(self)(self.depth, self.block, self.count, self.policy)

    def require_sizes(self, block: int, count: int, segments: int) -> None:
        """Raise `CacheError` unless the memory is one of a model with such blocks, slots and memory segments."""
        window = self.layers[0].window_keys
        kept = None if window is None else min(self.get_seq_length(), (segments + 1) * block - 1)
        if (self.block, self.count) != (block, count) or (window is not None and window.shape[2] != kept):
            raise CacheError(
                f"this memory is of blocks of {self.block} and {self.count} slots, or of other segments than those of "
                f"the model, which has blocks of {block}, {count} slots and {segments} segments; read on with the "
                "model that began, or read the text again"
            )

    @property
    def starts(self) -> tuple[int, ...]:
        """Where the first block of every row begins: at its first token."""
        return self.layers[0].starts
