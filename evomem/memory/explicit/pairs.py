"""Memory: pairs of a key and a value, for every row and head; as many as a manager leaves.

Read exactly, by a name that every key has, it is the store of a cache (a read is a hit or a miss); read by a softmax of
β q·k, it is the associative memory of attention and of Memory Mosaics (arXiv 2405.06394).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from evomem.errors import CacheError, ConfigError
from evomem.memory.explicit.layer import ExplicitLayer
from evomem.memory.kv.attention import full_precision
from evomem.memory.observations.ghosts import BY_NAME, histories, note_evictions, note_requests
from evomem.memory.observations.windows import SOFTMAX_READS


@dataclass(frozen=True)
class Reads:
    """What tokens have read.

    Attributes
    ----------
    hit : (batch, heads, tokens) bool, whether there was a slot of the token's name; False where the token did not read.
    mark : (batch, heads, tokens) int64, the mark of the newest slot of that name; -1 without a hit.
    values : (batch, heads, tokens, value_dim), what was read: the newest value of that name, or the softmax's mean; 0
        where there was nothing to read. None: it was not asked for.
    weights : (batch, heads, tokens, slots) fp32, what each slot was read with; None: nobody asked for it.
    marks : (batch, heads, slots) int64, the mark of each of those slots (`PairMemory.feed`); None as ``weights``.
    """

    hit: Tensor
    mark: Tensor
    values: Tensor | None = None
    weights: Tensor | None = None
    marks: Tensor | None = None


class PairMemory(ExplicitLayer):  # type: ignore[no-untyped-call]
    """A store of key-value pairs, bounded by the manager that decides about it.

    Parameters
    ----------
    beta : β of the softmax; None: reads are exact, by name, as a softmax's are for β → ∞. No log-decay changes what
        they find, so a decision that lets slots fade is refused.
    index, layers, observes : see `ExplicitLayer`.
    """

    title: ClassVar[str] = "a pair memory"
    has: frozenset[str] = frozenset({"predictions of what is written", "queries without positions"})
    slot_marks: ClassVar[frozenset[str]] = frozenset({"names", "marks"})

    def __init__(
        self,
        index: int = 0,
        layers: int = 1,
        *,
        observes: frozenset[str] = frozenset(),
        beta: float | None = None,
    ) -> None:
        right = isinstance(beta, int | float) and not isinstance(beta, bool) and 0 <= beta < math.inf
        if beta is not None and not right:
            raise ConfigError(
                f"a pair memory with beta {beta!r}; give a finite number of at least 0, or None for names"
            )
        self.has = self.has | {BY_NAME if beta is None else SOFTMAX_READS}
        super().__init__(index, layers, observes=observes, scale=1.0 if beta is None else beta)
        self.beta = beta

    def copy_empty(self) -> PairMemory:
        """Return an empty memory of the same kind."""
        return type(self)(self.index, self.layers, observes=self.observes, beta=self.beta)

    def feed(
        self,
        keys: Tensor,
        values: Tensor,
        names: Tensor,
        *,
        marks: Tensor | None = None,
        reads: Tensor | None = None,
        writes: Tensor | None = None,
        absent: bool = False,
        wants_values: bool = False,
    ) -> Reads:
        """Let tokens read and then write, one after the other; a token reads what tokens before it have written.

        Pieces do not matter: one call with many tokens is the same as many calls with one, up to rounding.

        Parameters
        ----------
        keys : (batch, heads, tokens, key_dim), what is read by and written under.
        values : (batch, heads, tokens, value_dim).
        names : (batch, heads, tokens) int64; keys are the same if their names are.
        marks : (batch, heads, tokens) int64, kept with the slot for whoever reads it; None: 0.
        reads, writes : (batch, heads, tokens) bool, which tokens do; None: all.
        absent : do not write a pair that is there: the newest slot of its name has its mark. So the store of a cache
            behaves. Otherwise every write takes a slot.
        wants_values : return what was read, not only whether.

        Raises
        ------
        CacheError : other rows, heads, sizes or types than the memory has; no token; a key or a value is no number.
        """
        self._check(keys, values, names, marks, reads, writes)
        batch, count = keys.shape[0], keys.shape[2]
        self._begin(batch, keys)
        bytes_before = self.nbytes()
        everything = torch.ones(names.shape, dtype=torch.bool, device=names.device)
        reads, writes = (everything if part is None else part for part in (reads, writes))
        marks = torch.zeros_like(names) if marks is None else marks
        # Of several slots of one name the newest counts: the last one.
        order = torch.arange(1, self._width() + count + 1, device=names.device)
        earlier = torch.ones(count, count, dtype=torch.bool, device=names.device).tril(-1)
        same = names[..., None] == torch.cat((self._marked("names", names), names), -1)[:, :, None]
        old, new = same[..., :-count], same[..., -count:] & earlier
        known = torch.cat((self._marked("marks", marks), marks), -1)
        stored = writes
        if absent:
            newest = torch.where(torch.cat((old, new & writes[:, :, None]), -1), order, 0).amax(-1)
            stored = writes & ((newest == 0) | (known.gather(-1, (newest - 1).clamp(min=0)) != marks))
        self.storage.append(keys, values, self.seen, stored, self.recorder, {"names": names, "marks": marks})
        newest = torch.where(torch.cat((old, new & stored[:, :, None]), -1), order, 0).amax(-1)
        hit = reads & (newest > 0)
        observed = self.wanted.every_query
        predicts = any(one.name == "surprise" for one in self.wanted.observations)
        weights = output = None
        if observed or wants_values or predicts:
            weights = (order == newest[..., None]).float() if self.beta is None else self._soft(keys, earlier)
        if predicts and weights is not None:  # also of what is only written
            self._record_error(torch.matmul(weights, self.values.float()), values)
        if weights is not None:
            weights = weights * reads[..., None]
            output = torch.matmul(weights, self.values.float()).to(values.dtype) if wants_values else None
        self.note_reads(keys * reads[..., None], weights)
        if histories(self.recorder):
            whole = self.recorder.whole(self.storage.layout)
            note_requests(whole, names, reads, self._marked("names", names), self.seen)
            self.recorder.take_over(whole, self.storage.layout)
        self.seen += count
        self._read += count
        result = Reads(
            hit,
            torch.where(hit, known.gather(-1, (newest - 1).clamp(min=0)), -1),
            output,
            weights if wants_values else None,
            self.storage.whole("marks") if wants_values else None,
        )
        self.storage.align(self.recorder)
        self.note_bytes(bytes_before, count)
        return result

    def read(self, queries: Tensor) -> Tensor:
        """Return the softmax's mean of the values, without noting it: queries (batch, heads, queries, key_dim).

        (batch, heads, queries, value_dim) fp32; 0 where a head holds nothing.

        Raises
        ------
        CacheError : the memory is read by names, is empty, or has other rows, heads or sizes of keys.
        """
        if self.beta is None:
            raise CacheError("a pair memory without beta is read by names: feed() says what is there")
        if not self.seen:
            raise CacheError("a pair memory that nothing was fed to has no values to read")
        held = self.storage.even["keys"].shape
        if queries.dim() != 4 or (*queries.shape[:2], queries.shape[3]) != (*held[:2], held[3]):
            raise CacheError(
                f"queries {tuple(queries.shape)} for a memory of keys {tuple(held)} (rows, heads, slots, size): give "
                "(rows, heads, queries, size)"
            )
        return torch.matmul(self._weights(queries, self.slots[:, :, None] >= 0), self.values.float())

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return all that the memory is between two tokens, and how it is read; see `ExplicitLayer.state`."""
        facts, tensors = super().state()
        return facts | {"beta": self.beta}, tensors

    def load_state(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on, to the bit, as the memory that `state` was taken of.

        Raises
        ------
        CacheError : see `ExplicitLayer.load_state`; or that memory is read otherwise, so it would answer otherwise.
        """
        beta = facts.get("beta", self.beta)  # states of older versions do not say
        if beta != self.beta:
            raise CacheError(
                f"state of a pair memory: beta: it was read with {beta!r}, and this one is with {self.beta!r}; load it "
                "into PairMemory(beta=...) with the same"
            )
        super().load_state(facts, tensors)

    def keep(self, mask: Tensor) -> None:
        """Evict, physically, every slot where ``mask`` (batch, heads, slots) is False; see `ExplicitLayer.keep`."""
        if tuple(mask.shape) == self.storage.shape and mask.dtype == torch.bool and histories(self.recorder):
            whole = self.recorder.whole(self.storage.layout)
            note_evictions(whole, self._marked("names", self.storage.whole("names")), mask)
            self.recorder.take_over(whole, self.storage.layout)
        super().keep(mask)

    def decay(self, log_decay: Tensor) -> None:
        """Let slots fade; see `ExplicitLayer.decay`.

        Raises
        ------
        ConfigError : the memory is read by names, which finds a slot however far it has faded.
        """
        if self.beta is None:
            raise ConfigError(
                "a pair memory without beta is read by names, which finds a slot however far it has faded: a manager "
                "that lets slots fade changes nothing here; leave out its action forget, or read by a softmax "
                "(PairMemory(beta=...), model pair-memory-soft)"
            )
        super().decay(log_decay)

    # ---- parts ----------------------------------------------------------------------------------------------------

    def _width(self) -> int:
        """Slots of the longest head."""
        return self.storage.shape[2] if self.storage.even else 0

    def _marked(self, name: str, like: Tensor) -> Tensor:
        """Return names or marks of the slots held (batch, heads, slots), -1 where a slot is empty."""
        if not self.storage.even:
            return like.new_empty(*like.shape[:2], 0)
        return torch.where(self.slots >= 0, self.storage.whole(name), -1)

    def _soft(self, queries: Tensor, earlier: Tensor) -> Tensor:
        """Return how new tokens read by softmax: (batch, heads, tokens, slots), those of the tokens included."""
        slots = self.slots
        old = slots.shape[-1] - earlier.shape[-1]
        visible = torch.cat((earlier.new_ones(earlier.shape[0], old), earlier), -1)
        return self._weights(queries, visible & (slots >= 0)[:, :, None])

    def _weights(self, queries: Tensor, visible: Tensor) -> Tensor:
        """softmax(β q·k + decay) over the visible slots: (batch, heads, queries, slots) fp32, 0 where there is none."""
        with full_precision(queries):
            logits = torch.matmul(queries.float(), self.keys.float().transpose(-1, -2)) * self.scale
            if self.decays is not None:
                logits = logits + self.decays[:, :, None]
            return torch.softmax(logits.masked_fill(~visible, -torch.inf), -1).nan_to_num(nan=0.0)

    def _record_error(self, predicted: Tensor, values: Tensor) -> None:
        """Note how far what was read lies from what is written."""
        wanted = values.float()
        error = (wanted - predicted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-6)
        self.recorder.predicted(error)  # the newest slots are even, in the recorder too

    def _check(
        self,
        keys: Tensor,
        values: Tensor,
        names: Tensor,
        marks: Tensor | None,
        reads: Tensor | None,
        writes: Tensor | None,
    ) -> None:
        """Raise `CacheError` unless tokens fit each other and the memory; nothing has been changed then."""
        shape = tuple(keys.shape[:3])
        fit = keys.dim() == values.dim() == 4 and values.shape[:3] == shape and names.shape == shape and 0 not in shape
        if not fit or names.dtype != torch.int64 or bool((names < 0).any()):
            raise CacheError(
                f"keys {tuple(keys.shape)}, values {tuple(values.shape)}, names {tuple(names.shape)} {names.dtype}: "
                "give the same (batch, heads, tokens), at least one token, and names of at least 0 as int64"
            )
        for what, part, dtype in (
            ("marks", marks, torch.int64), ("reads", reads, torch.bool), ("writes", writes, torch.bool)
        ):  # fmt: skip
            if part is not None and (part.shape != shape or part.dtype != dtype):
                raise CacheError(
                    f"{what} {tuple(part.shape)} {part.dtype} for tokens {shape}: give one for every token, as {dtype}"
                )
        for what, part in (("keys", keys), ("values", values)):
            held = self.storage.even.get(what, part)
            if part.dtype != held.dtype or not part.is_floating_point():
                raise CacheError(f"{what} of {part.dtype} for a memory of {held.dtype}: give floats of one type")
            if not bool(torch.isfinite(part).all()):
                raise CacheError(f"{what}: some are no finite numbers; one such would spoil all that is read beside it")
        if not self.storage.even:
            return
        there = tuple(self.storage.even[name].shape for name in ("keys", "values"))
        if (there[0][1], there[0][3], there[1][3]) != (keys.shape[1], keys.shape[3], values.shape[3]):
            raise CacheError(
                f"keys {tuple(keys.shape)} and values {tuple(values.shape)} for a memory of keys {there[0]} and values "
                f"{there[1]} (rows, heads, slots, size)"
            )
