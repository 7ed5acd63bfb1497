"""Memory: the reads of an item, counted on while its pair is away: histories that a list of ghosts carries over.

A replacement policy that sees only the pairs that are stored begins anew with every pair that comes back. ARC (Megiddo
& Modha 2003), LIRS and 2Q therefore remember the names of pairs that left: their *ghosts*. Here the history of a name
goes from its slot to a ghost when it is evicted, and back when it is stored again.

A head remembers as many ghosts as it has kept slots, those that left last. Their names and histories are state of the
memory, are saved with it, and are counted among its bytes: where heads keep differently many, lists are as long as the
longest, and counted so.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from evomem.errors import CacheError
from evomem.memory.observations.base import Moment, Observation, Sizes, State, Window, register_observation

if TYPE_CHECKING:
    from evomem.memory.observations.recorder import Recorder

BY_NAME = "reads by name"
"""What a memory must have: a name for every key, by which it is read."""
GHOSTS = "ghosts.names"
"""State (batch, kv_heads, ghosts) int64: names of pairs that left, the last to leave last; -1: none."""
LAST_TOKEN = 2**31 - 1
"""Tokens that times are counted up to."""


class NameHistory(Observation):
    """A history of every name that is in a slot, or among the ghosts: ``numbers`` int32 numbers.

    Of several slots of one name the newest has the history; the others, which nobody can read any more, have an empty
    one. The history begins when a name is first stored, with that token's own read, and ends when its ghost is
    forgotten. A read counts whether it finds the pair or not.

    Class attributes
    ----------------
    numbers : of a history. begins : each of them in an empty history, less than any other.
    """

    numbers: ClassVar[int] = 1
    begins: ClassVar[int] = 0
    needs: ClassVar[frozenset[str]] = frozenset({BY_NAME})
    needs_past: ClassVar[bool] = True
    looks_back: ClassVar[bool] = True

    @property
    def of_ghosts(self) -> str:
        """Name of the state that ghosts have."""
        return f"ghosts.{self.spec}"

    def append(self, recorder: Recorder, shape: tuple[int, int, int], like: Tensor) -> None:
        """Begin new slots, and a list of ghosts if there is none yet."""
        recorder.extend(self.spec, self.empty(shape, like.device))
        if GHOSTS not in recorder.rowwise:
            recorder.rowwise[GHOSTS] = torch.empty((*shape[:2], 0), dtype=torch.int64, device=like.device)
        recorder.rowwise.setdefault(self.of_ghosts, self.empty((*shape[:2], 0), like.device))

    def empty(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Return empty histories: those of a shape, each of ``numbers``."""
        return torch.full((*shape, self.numbers), self.begins, dtype=torch.int32, device=device)

    @abstractmethod
    def after(self, history: Tensor, read: Tensor, first: int) -> Tensor:
        """Return histories after some tokens.

        Parameters
        ----------
        history : (batch, kv_heads, names, numbers) int32.
        read : (batch, kv_heads, names, tokens) bool, whether a token reads a name.
        first : index of the first of the tokens.
        """

    def state(self, tensors: Mapping[str, Tensor], sizes: Sizes) -> dict[str, State]:
        """A history for every slot, and for every ghost; the names of the ghosts."""
        names = tensors.get(f"rowwise.{GHOSTS}")
        ghosts = names.shape[2] if names is not None and names.dim() == 3 else 0
        heads = (sizes.batch, sizes.kv_heads)
        return {
            f"slotwise.{self.spec}": ((*heads, sizes.slots, self.numbers), torch.int32),
            f"rowwise.{GHOSTS}": ((*heads, ghosts), torch.int64),
            f"rowwise.{self.of_ghosts}": ((*heads, ghosts, self.numbers), torch.int32),
        }

    def example(self, sizes: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
        """Return random whole numbers."""
        shape = [sizes[name] for name in ("batch", "kv_heads", "slots")]
        return {self.spec: torch.randint(0, 100, shape, generator=generator)}


@register_observation("ghost_frequency")
class GhostFrequency(NameHistory):
    """Reads of the slot's name since it was first stored, those before it left and while it was away included.

    In-cache LFU counts from the last time that a pair was stored; this is what perfect LFU counts (Breslau et al. 1999)
    as far back as the ghosts reach.
    """

    def after(self, history: Tensor, read: Tensor, first: int) -> Tensor:
        """Count the reads."""
        return history + read.sum(-1, dtype=torch.int32, keepdim=True)

    def recorded(self, recorder: Recorder, moment: Moment, window: Callable[[int], Window]) -> dict[str, Tensor]:
        """Return (batch, kv_heads, slots) fp32."""
        return {self.spec: recorder.slotwise[self.spec][:, :, : moment.slots.shape[2], 0].float()}


@register_observation("backward_distance")
class BackwardDistance(NameHistory):
    """Tokens since the last read but one of the slot's name, at most W: the order of LRU-2 (O'Neil et al. 1993).

    A pair that was read once, and that a scan may have brought, is W away; of two that were read twice the one whose
    second-last read is more recent is read more often. W is what LRU-K calls the retained information period.
    """

    takes: ClassVar[str] = "W"
    numbers: ClassVar[int] = 2
    begins: ClassVar[int] = -1

    def after(self, history: Tensor, read: Tensor, first: int) -> Tensor:
        """Note the last two reads, the last one first."""
        tokens = torch.arange(first, first + read.shape[-1], dtype=torch.int32, device=read.device)
        times = torch.cat((history, torch.where(read, tokens, -1)), -1)
        return times.topk(self.numbers, -1).values

    def recorded(self, recorder: Recorder, moment: Moment, window: Callable[[int], Window]) -> dict[str, Tensor]:
        """Return (batch, kv_heads, slots) int64 in [0, W]."""
        time = recorder.slotwise[self.spec][:, :, : moment.slots.shape[2], -1].long()
        distance = (moment.seen - 1 - time).clamp(max=self.argument)
        return {self.spec: torch.where(time < 0, self.argument, distance)}


def histories(recorder: Recorder) -> list[NameHistory]:
    """Return the observations that want to know of names."""
    return [one for one in recorder.wanted.observations if isinstance(one, NameHistory)]


def note_requests(recorder: Recorder, names: Tensor, reads: Tensor, slot_names: Tensor, first: int) -> None:
    """Let histories learn of tokens that read and write by name.

    Parameters
    ----------
    recorder : of all slots (`Recorder.whole`), those of the tokens the last.
    names : (batch, kv_heads, tokens) int64. reads : of the same shape, bool.
    slot_names : (batch, kv_heads, slots) int64, -1 where a slot is empty, as for a token that was not stored.
    first : index of the first of the tokens.

    Raises
    ------
    CacheError : more tokens were read than times are counted up to.
    """
    if first + names.shape[-1] > LAST_TOKEN:
        raise CacheError(f"reads by name are counted for the first {LAST_TOKEN} tokens of a text; reset() the memory")
    ghosts, count = recorder.rowwise[GHOSTS], names.shape[-1]
    entries = torch.cat((ghosts, slot_names), -1)  # a name is a ghost, or in slots, of which the last is the newest
    old = entries.shape[-1] - count
    order = torch.arange(entries.shape[-1], device=names.device)
    match = (entries[..., None] == names[:, :, None]) & (entries[..., None] >= 0)  # (batch, heads, entries, tokens)
    newest = torch.where(match, order[:, None], -1).amax(2)
    before = torch.where(match & (order[:, None] < old), order[:, None], -1).amax(2)
    # A name without a history has one from the token on that stores it.
    stored = match[:, :, old:] & match.new_ones(count, count).triu()
    known = (before >= 0) | stored.any(2)
    read = (order[:, None] == newest[:, :, None]) & (reads & known)[:, :, None]
    passed = (match & (newest[:, :, None] > order[:, None])).any(-1)
    inherits = (newest == order[old:]) & (before >= 0)
    for one in histories(recorder):
        history = torch.cat((recorder.rowwise[one.of_ghosts], recorder.slotwise[one.spec]), 2)
        index = before.clamp(min=0)[..., None].expand(*before.shape, one.numbers)
        new = torch.where(inherits[..., None], history.gather(2, index), one.begins)
        kept = torch.where(passed[:, :, :old, None], one.begins, history[:, :, :old])
        history = one.after(torch.cat((kept, new), 2), read, first)
        recorder.rowwise[one.of_ghosts] = history[:, :, : ghosts.shape[-1]].clone()
        recorder.slotwise[one.spec] = history[:, :, ghosts.shape[-1] :]
    recorder.rowwise[GHOSTS] = torch.where(passed[:, :, : ghosts.shape[-1]], -1, ghosts)


def note_evictions(recorder: Recorder, slot_names: Tensor, keep: Tensor) -> None:
    """Let the histories of slots that leave go to ghosts, or to what is left of the same name.

    Parameters
    ----------
    recorder : of all slots (`Recorder.whole`), those that leave included.
    slot_names : (batch, kv_heads, slots) int64, -1 where a slot is empty.
    keep : (batch, kv_heads, slots) bool, which stay.
    """
    ghosts, filled = recorder.rowwise[GHOSTS], slot_names >= 0
    stays = keep & filled
    order = torch.arange(slot_names.shape[-1], device=slot_names.device)
    same = (slot_names[..., None] == slot_names[:, :, None]) & filled[..., None]  # (batch, heads, slots, slots)
    newest = torch.where(same, order, -1).amax(-1)
    heir = torch.where(same & stays[:, :, None], order, -1).amax(-1)
    leaves = filled & (newest == order) & (heir < 0)
    room = stays.sum(-1, keepdim=True)
    names = torch.cat((ghosts, torch.where(leaves, slot_names, -1)), -1)
    width = min(int(room.max()), names.shape[-1])
    chosen = torch.sort((names >= 0).byte(), dim=-1, stable=True).indices[..., names.shape[-1] - width :]
    names = names.gather(-1, chosen)
    fits = (torch.arange(width, device=names.device) >= width - room) & (names >= 0)
    for one in histories(recorder):
        history = recorder.slotwise[one.spec]
        both = torch.cat((recorder.rowwise[one.of_ghosts], history), 2)
        index = chosen[..., None].expand(*chosen.shape, one.numbers)
        recorder.rowwise[one.of_ghosts] = torch.where(fits[..., None], both.gather(2, index), one.begins)
        index = newest.clamp(min=0)[..., None].expand(*newest.shape, one.numbers)
        inherited = torch.where((heir == order)[..., None], history.gather(2, index), one.begins)
        recorder.slotwise[one.spec] = inherited
    recorder.rowwise[GHOSTS] = torch.where(fits, names, -1)
