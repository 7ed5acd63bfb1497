"""Memory: pairs of a key and a value, for every row and head; as many as a manager leaves.

Read exactly, by a name that every key has, it is the store of a cache (a read is a hit or a miss); read by a softmax of
β q·k, it is the associative memory of attention and of Memory Mosaics (arXiv 2405.06394).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from evomem.errors import CacheError, ConfigError
from evomem.memory.explicit.layer import ExplicitLayer
from evomem.memory.kv.attention import full_precision
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
        if beta is not None:
            self.has = self.has | {SOFTMAX_READS}
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
        CacheError : other rows, heads or sizes than the memory has.
        """
        batch, count = keys.shape[0], keys.shape[2]
        self._begin(batch, keys)
        self._check(keys, values, names)
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
        CacheError : the memory is read by names.
        """
        if self.beta is None:
            raise CacheError("a pair memory without beta is read by names: feed() says what is there")
        if not self.seen:
            raise CacheError("a pair memory that nothing was fed to has no values to read")
        return torch.matmul(self._weights(queries, self.slots[:, :, None] >= 0), self.values.float())

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

    def _check(self, keys: Tensor, values: Tensor, names: Tensor) -> None:
        shape = tuple(keys.shape[:3])
        if values.shape[:3] != shape or names.shape != shape or bool((names < 0).any()):
            raise CacheError(
                f"keys {tuple(keys.shape)}, values {tuple(values.shape)}, names {tuple(names.shape)}: give the same "
                "(batch, heads, tokens), and names of at least 0"
            )
        if not self.storage.even:
            return
        held = tuple(self.storage.even[name].shape for name in ("keys", "values"))
        if (held[0][1], held[0][3], held[1][3]) != (keys.shape[1], keys.shape[3], values.shape[3]):
            raise CacheError(
                f"keys {tuple(keys.shape)} and values {tuple(values.shape)} for a memory of keys {held[0]} and values "
                f"{held[1]} (rows, heads, slots, size)"
            )
