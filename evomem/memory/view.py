"""Memory: what a manager sees of one layer's slots, and what it may answer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor

from evomem.errors import CacheError

TensorName = tuple[str] | tuple[str, Hashable]
"""Of a view's tensor: the field, and in a mapping the key."""


@dataclass(frozen=True)
class LayerView:
    """One layer's slots at a decision.

    Attributes
    ----------
    keys, values : (batch, kv_heads, slots, head_dim); keys are rotated to the positions at which they were read.
    slots : (batch, kv_heads, slots) int64, the index of the token that each slot holds, ascending, -1 = empty.
        Heads with fewer slots are right-aligned: the empty slots come first.
    start : (batch,) int64, index of the row's first real token (its left padding).
    seen : number of tokens read so far, padding included: the newest token has index ``seen - 1``.
    fresh : number of tokens that arrived since the last decision.
    layer, layers : which layer this is, of how many.
    evicted : (batch, layers) int64, slots a head that decisions have taken from every layer so far; a layer can hold
        at most as many as tokens were read less these. None: none, or nobody counts (see `Decision.evicted`).
    recorded : observations that the cache recorded because the manager asked for them, by name (see
        `evomem.memory.observations`); slot-aligned ones have the slots on axis 2.
    columns : features of the slots that were worked out before, by name: (batch, kv_heads, slots) fp32. A trace has
        them in place of keys and values.
    source : the folder that ``columns`` come from, for messages; empty for a model's own view.
    decays : (batch, kv_heads, slots) fp32, what is added to the slots' attention logits now; None: nothing.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    start: Tensor
    seen: int
    fresh: int
    layer: int
    layers: int
    recorded: Mapping[str, Tensor] = field(default_factory=dict)
    memo: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)
    """Values computed from this view once and shared by all candidates that look at it; see `once`."""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    source: str = ""
    evicted: Tensor | None = None
    decays: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        """(batch, kv_heads, slots) bool: which slots hold a token."""
        return self.slots >= 0

    @property
    def age(self) -> Tensor:
        """(batch, kv_heads, slots) int64: newest token's index minus the slot's; empty slots give ``seen``."""
        return self.seen - 1 - self.slots

    @property
    def position(self) -> Tensor:
        """(batch, kv_heads, slots) int64: index of the slot's token within its own row, padding not counted."""
        return self.slots - self.start[:, None, None]

    @property
    def depth(self) -> float:
        """Relative depth of the layer in [-1/2, 1/2]; 0 for a model of one layer."""
        return self.layer / (self.layers - 1) - 0.5 if self.layers > 1 else 0.0

    def once(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """Return ``compute()``, computed at the first call for ``key`` on this view and remembered.

        Keys begin with who computes: ``("features", *names)``.
        """
        if key not in self.memo:
            self.memo[key] = compute()
        value: Tensor = self.memo[key]
        return value

    # ---- its tensors, which nobody else lists: a new field is followed everywhere ---------------------------------

    def tensors(self, *, memo: bool = False) -> dict[TensorName, Tensor]:
        """Return every tensor: of a field by ``(field,)``, of a mapping by ``(field, key)``.

        memo : also what was computed from the view; without, only what it was made of.
        """
        named: dict[TensorName, Tensor] = {}
        for name in self._fields():
            value = getattr(self, name)
            if isinstance(value, Tensor):
                named[(name,)] = value
            elif isinstance(value, Mapping) and (memo or name != "memo"):
                named |= {(name, key): part for key, part in value.items() if isinstance(part, Tensor)}
        return named

    def facts(self) -> dict[str, Any]:
        """Return what is no tensor: indices, counts and names."""
        values = {name: getattr(self, name) for name in self._fields()}
        return {name: value for name, value in values.items() if not isinstance(value, Tensor | Mapping)}

    @classmethod
    def _fields(cls) -> tuple[str, ...]:
        return tuple(one.name for one in fields(cls))

    @classmethod
    def of(cls, facts: Mapping[str, Any], tensors: Mapping[TensorName, Tensor]) -> Self:
        """Return the view of which `facts` and `tensors` are."""
        parts: dict[str, Any] = dict(facts)
        for name, tensor in tensors.items():
            if len(name) == 1:
                parts[name[0]] = tensor
            else:
                parts.setdefault(name[0], {})[name[1]] = tensor
        return cls(**parts)

    def with_tensors(self, tensors: Mapping[TensorName, Tensor]) -> Self:
        """Return a view of the same layer with these tensors in place of its own; what is not named is left out."""
        return type(self).of(self.facts(), tensors)

    def map(self, change: Callable[[Tensor], Tensor], *, memo: bool = False) -> Self:
        """Return a view with every tensor changed; the batch is axis 0 of each."""
        return self.with_tensors({name: change(tensor) for name, tensor in self.tensors(memo=memo).items()})


@dataclass(frozen=True)
class Decision:
    """What a manager decides about one layer.

    Attributes
    ----------
    keep : (batch, kv_heads, slots) bool; slots that are False leave memory. Empty slots are always False.
    decay : (batch, kv_heads, slots) float or None: log-decay to be added to the slots' attention logits, <= 0; or > 0
        for a slot that stands for several tokens.
    evicted : (batch, layers) int64, what `LayerView.evicted` becomes: every layer's, for a layer decides before the
        others have read. None: it stays as it is.
    keys, values : (batch, kv_heads, slots, head_dim) of the view's type, what slots hold from now on: both, or None:
        what they held.
    gates : (batch, kv_heads, slots, 3) fp32, what is added to the log-odds of α and η and to log θ of the token in
        every slot, in a memory whose tokens have gates (`evomem.memory.explicit.neural_slots`); None: nothing.
    """

    keep: Tensor
    decay: Tensor | None = None
    evicted: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    gates: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Decision:
        """Return a decision with every tensor changed; the batch is axis 0 of each."""
        rest = (self.decay, self.evicted, self.keys, self.values, self.gates)
        return Decision(change(self.keep), *(None if part is None else change(part) for part in rest))


def refuse_gates(decision: Decision, memory: str) -> None:
    """Raise `CacheError` where a decision moves gates, and ``memory`` (its name in the message) has none."""
    if decision.gates is not None:
        raise CacheError(
            f"the manager moves the gates of tokens, and {memory} has none; use it on a neural memory (a Titans model)"
        )


def masked_mean(x: Tensor, valid: Tensor) -> Tensor:
    """Mean over the slots that hold a token: x, valid (batch, kv_heads, slots) -> (batch, kv_heads, 1)."""
    count = valid.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(valid, x, 0.0).sum(-1, keepdim=True) / count


def layer_view(
    keys: Tensor,
    values: Tensor,
    positions: Tensor | None = None,
    *,
    recorded: Mapping[str, Tensor] | None = None,
    observes: Iterable[str] = (),
    start: Tensor | None = None,
    seen: int | None = None,
    fresh: int | None = None,
    layer: int = 0,
    layers: int = 1,
    evicted: Tensor | None = None,
) -> LayerView:
    """Return the view of a layer whose keys and values another engine holds; no transformers needed.

    >>> view = layer_view(keys, values, recorded={"attention_sum": sums})            # doctest: +SKIP
    >>> keep = manager.decide(view).keep                                             # doctest: +SKIP

    Parameters
    ----------
    keys, values : (batch, kv_heads, slots, head_dim), keys rotated; see `LayerView`.
    positions : index of the token that every slot holds, ascending; -1 = empty, and the empty ones come first. (slots,)
        or (batch, slots) where the heads hold the same tokens, else (batch, kv_heads, slots). None: 0, 1, 2, …
    recorded : observations by name, see `evomem.memory.observations`.
    observes : what has to be recorded: the manager's ``observes``, to hear at once what is missing.
    start : (batch,) index of every row's first real token (its left padding); None: 0.
    seen : tokens read so far; None: up to the newest slot's.
    fresh : tokens that arrived since the last decision; None: all of them.
    layer, layers : which layer this is, of how many.
    evicted : (batch, layers), what the layer's last decision said (`Decision.evicted`); None at the first one.

    Raises
    ------
    CacheError : shapes that do not fit, positions that do not ascend, an observation that is missing.
    """
    if keys.dim() != 4 or values.dim() != 4 or keys.shape[:3] != values.shape[:3]:
        raise CacheError(
            f"keys {tuple(keys.shape)} and values {tuple(values.shape)}; give (batch, kv_heads, slots, head_dim) each"
        )
    if not 0 <= layer < layers:
        raise CacheError(f"layer {layer} of {layers}; count layers from 0")
    shape = keys.shape[:3]
    recorded = dict(recorded or {})
    _check_recorded(recorded, observes, shape)
    slots = _expanded(positions, keys)
    newest = int(slots.max()) + 1 if slots.numel() else 0
    seen = newest if seen is None else seen
    if seen < newest:
        raise CacheError(f"positions reach {newest - 1}, but only {seen} tokens were seen")
    start = torch.zeros(shape[0], dtype=torch.int64, device=keys.device) if start is None else start
    if start.shape != shape[:1]:
        raise CacheError(f"start has shape {tuple(start.shape)}; give one index a row: ({shape[0]},)")
    if evicted is not None and evicted.shape != (shape[0], layers):
        raise CacheError(
            f"evicted has shape {tuple(evicted.shape)}; give one number a row and layer: {shape[0], layers}"
        )
    fresh = seen if fresh is None else fresh
    return LayerView(keys, values, slots, start, seen, fresh, layer, layers, recorded, evicted=evicted)


def _expanded(positions: Tensor | None, keys: Tensor) -> Tensor:
    """Return the positions (batch, kv_heads, slots), checked."""
    batch, heads, count, _ = keys.shape
    if positions is None:
        positions = torch.arange(count, device=keys.device)
    if positions.is_floating_point() or positions.dim() > 3:
        raise CacheError(f"positions: {positions.dtype} of shape {tuple(positions.shape)}; give token indices")
    wide = positions[:, None] if positions.dim() == 2 else positions
    try:
        slots = wide.to(torch.int64).expand(batch, heads, count)
    except RuntimeError:
        raise CacheError(
            f"positions have shape {tuple(positions.shape)}; give ({count},), ({batch}, {count}) or "
            f"({batch}, {heads}, {count}), as the keys have it"
        ) from None
    rising = (slots[..., 1:] > slots[..., :-1]) | (slots[..., :-1] == -1)
    if (slots < -1).any() or not rising.all():
        raise CacheError("positions must ascend from slot to slot; -1 marks empty slots, which come first")
    return slots


def _check_recorded(recorded: Mapping[str, Tensor], observes: Iterable[str], shape: torch.Size) -> None:
    from evomem.memory.observations import axes_of, parse_observation  # which needs transformers' caches' attention

    for name in sorted(observes):
        for part in parse_observation(name).axes():
            if part not in recorded:
                raise CacheError(
                    f"recorded has no {part!r}, which the manager observes (see evomem.memory.observations)"
                )
    for name, tensor in recorded.items():
        slotwise = (axes_of(name) or ())[:3] == ("batch", "kv_heads", "slots")
        if slotwise and tensor.shape[:3] != shape:
            raise CacheError(f"recorded {name!r} has shape {tuple(tensor.shape)}; its first axes are {tuple(shape)}")
