"""Evaluation: many managers decide at once; those that differ in their parameters only go through `vmap` together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from evomem.managers.base import MemoryManager
from evomem.managers.options import Schedule
from evomem.memory import Decision, LayerView
from evomem.memory.kv.attention import full_precision
from evomem.memory.kv.due import decide_all
from evomem.memory.view import TensorName


@dataclass(frozen=True)
class Recording:
    """A cache policy that only watches: it keeps everything and never decides."""

    observes: frozenset[str] = frozenset()
    schedule: Schedule = field(default_factory=Schedule)

    def decide(self, view: LayerView) -> Decision:
        """Keep everything."""
        return Decision(view.valid)


class Deciding(Protocol):
    """A cache policy that decides for several rows, each a candidate of its own: what the evaluator needs of it."""

    @property
    def size(self) -> int:
        """Number of candidates."""
        ...

    @property
    def observes(self) -> frozenset[str]:
        """Names of the observations to record."""
        ...

    @property
    def schedule(self) -> Schedule:
        """When they decide."""
        ...

    @property
    def wants_logits(self) -> bool:
        """Whether `observe_logits` is to be called with what is read between decisions."""
        ...

    @property
    def whole_model(self) -> bool:
        """Whether a candidate decides about all layers at once, so that `decide_all` must be asked."""
        ...

    def decide(self, view: LayerView) -> Decision:
        """Return the decisions of all candidates, from a view of one shared row or of a row each."""
        ...

    def decide_all(self, views: Sequence[LayerView]) -> list[Decision]:
        """Return the decisions of all candidates about all layers, in the order of the layers."""
        ...

    def fades(self, layer: int) -> Tensor:
        """Return which candidates have let slots of a layer fade so far: (candidates,) bool."""
        ...

    def observe_logits(self, logits: Tensor, following: Tensor) -> None:
        """Take in logits (candidates, tokens, vocabulary) and the tokens that came (candidates, tokens)."""
        ...

    def observe_rewards(self, rewards: Tensor, tokens: Tensor) -> None:
        """Take in what was gained since the last decision, and of how many tokens: (candidates,) each."""
        ...

    def independent_copy(self) -> Deciding:
        """Return an independent copy: it decides the same from here on."""
        ...


@dataclass(frozen=True)
class _Group:
    """Managers of one kind with equal options.

    Attributes
    ----------
    template : one of them.
    parameters : of all, stacked: (members, ...).
    members : (members,) int64, their indices in the population.
    """

    template: MemoryManager
    parameters: dict[str, Tensor]
    members: Tensor

    def on(self, device: torch.device) -> _Group:
        """Return the group with all its tensors on a device."""
        parameters = {name: stacked.to(device) for name, stacked in self.parameters.items()}
        return _Group(self.template.on(device), parameters, self.members.to(device))


class PopulationPolicy:
    """A population as one cache policy: row c of the cache is decided by manager c.

    A view of one row is what all candidates share (the context was read once); a view of as many rows as managers
    gives every manager its own row.

    Every manager decides as if it were alone: a selection that looks across the batch (`Dense`) sees the one row of its
    own candidate, whoever else is in the population.
    """

    wants_logits = False

    def __init__(self, managers: Sequence[MemoryManager]) -> None:
        self.size = len(managers)
        self.observes = frozenset().union(*(manager.observes for manager in managers))
        schedules = {manager.schedule for manager in managers}
        if len(schedules) > 1:
            raise ValueError("a population decides on one schedule")
        self.schedule: Schedule = schedules.pop()
        self.groups = list(_grouped(managers))
        self.whole_model = any(manager.whole_model for manager in managers)
        self.layers_differ = any(manager.layers_differ for manager in managers)
        self._fades: dict[int, Tensor] = {}
        self._placed: dict[torch.device, list[_Group]] = {}

    def _groups_on(self, device: torch.device) -> list[_Group]:
        """Return the groups on a device, where each of them is copied once."""
        if device not in self._placed:
            self._placed[device] = [group.on(device) for group in self.groups]
        return self._placed[device]

    def fades(self, layer: int) -> Tensor:
        """Return which managers have let slots of a layer fade so far: (managers,) bool."""
        return self._fades.get(layer, torch.zeros(self.size, dtype=torch.bool))

    def observe_logits(self, logits: Tensor, following: Tensor) -> None:
        """Do nothing: deterministic managers do not learn from what is read."""

    def observe_rewards(self, rewards: Tensor, tokens: Tensor) -> None:
        """Do nothing, as `observe_logits`."""

    def independent_copy(self) -> PopulationPolicy:
        """Return itself: it has no state that a decision depends on."""
        return self

    @torch.no_grad()
    def decide(self, view: LayerView) -> Decision:
        """Return the decisions of all managers about a layer: masks (managers, kv_heads, slots).

        Raises
        ------
        ConfigError : a manager needs the views of all layers (`whole_model`).
        """
        return self._decided([view], False)[0]

    @torch.no_grad()
    def decide_all(self, views: Sequence[LayerView]) -> list[Decision]:
        """Return the decisions of all managers about all layers; those that decide layer by layer are mixed in."""
        return self._decided(views, True)

    def _decided(self, views: Sequence[LayerView], all_layers: bool) -> list[Decision]:
        parts: list[list[Decision]] = [[] for _ in views]
        for number, group in enumerate(self.groups):
            with full_precision(views[0].keys):
                if all_layers and group.template.whole_model:
                    made = _decide(self._groups_on(views[0].slots.device)[number], views, all_layers=True)
                else:
                    placed = [self._groups_on(view.slots.device)[number] for view in views]
                    made = [_decide(own, [view], all_layers=False)[0] for own, view in zip(placed, views, strict=True)]
            for layer, part in zip(parts, made, strict=True):
                layer.append(part)
        return [self._merged(view, layer) for view, layer in zip(views, parts, strict=True)]

    def _merged(self, view: LayerView, parts: Sequence[Decision]) -> Decision:
        """Return one layer's decisions, those of every group in the rows of its members."""
        shape = (self.size, *view.slots.shape[1:])
        keep = torch.zeros(shape, dtype=torch.bool, device=view.slots.device)
        decay: Tensor | None = None
        evicted: Tensor | None = None
        keys: Tensor | None = None
        values: Tensor | None = None
        gates: Tensor | None = None
        for group, part in zip(self.groups, parts, strict=True):
            members = group.members.to(keep.device)
            keep[members] = part.keep.to(keep.device)
            if part.decay is not None:
                decay = torch.zeros(shape, device=keep.device, dtype=torch.float32) if decay is None else decay
                decay[members] = part.decay.to(keep.device)
                self._fades[view.layer] = self.fades(view.layer).index_fill(0, group.members, True)
            if part.evicted is not None:
                if evicted is None:
                    evicted = torch.zeros(self.size, view.layers, device=keep.device, dtype=torch.int64)
                evicted[members] = part.evicted.to(keep.device)
            if part.keys is not None and part.values is not None:
                if keys is None or values is None:  # others leave their slots as they are
                    keys, values = (held.expand(self.size, -1, -1, -1).clone() for held in (view.keys, view.values))
                keys[members], values[members] = part.keys.to(keys.device), part.values.to(values.device)
            if part.gates is not None:
                gates = part.gates.new_zeros(*shape, part.gates.shape[-1]) if gates is None else gates
                gates[members] = part.gates.to(gates.device)
        return Decision(keep, decay, evicted, keys, values, gates)


def _grouped(managers: Sequence[MemoryManager]) -> list[_Group]:
    alike: dict[str, list[int]] = {}
    for index, manager in enumerate(managers):
        shapes = {name: (tuple(p.shape), p.dtype) for name, p in manager.named_parameters()}
        buffers = {name: (b.dtype, hash(tuple(b.flatten().tolist()))) for name, b in manager.named_buffers()}
        alike.setdefault(repr((manager.describe(), shapes, buffers)), []).append(index)
    groups = []
    for members in alike.values():
        rows = [dict(managers[i].named_parameters()) for i in members]
        stacked = {name: torch.stack([row[name].detach().to(rows[0][name].device) for row in rows]) for name in rows[0]}
        groups.append(_Group(managers[members[0]], stacked, torch.tensor(members)))
    return groups


class _WholeModel(nn.Module):
    """A manager's decisions about all layers as a module's ``forward``, which is what ``functional_call`` calls."""

    def __init__(self, manager: MemoryManager) -> None:
        super().__init__()
        self.manager = manager

    def forward(self, views: Sequence[LayerView]) -> list[Decision]:
        return decide_all(self.manager, views)


def _decide(group: _Group, views: Sequence[LayerView], *, all_layers: bool) -> list[Decision]:
    """Return a group's decisions about one layer, or about all layers for managers that need all."""
    count, shared = len(group.members), views[0].keys.shape[0] == 1
    views = views if shared else [_rows(view, group.members) for view in views]
    if not group.parameters or (count == 1 and shared):
        made = decide_all(group.template, views) if all_layers else [group.template.decide(views[0])]
        return [one.map(lambda part: _repeated(part, count)) for one in made]

    if not shared:
        for view in views:
            group.template.prepare(view)
    fields: list[tuple[bool, ...]] = []

    def decide_one(parameters: dict[str, Tensor], tensors: list[dict[TensorName, Tensor]] | None) -> tuple[Tensor, ...]:
        seen = views
        if tensors is not None:
            seen = [view.with_tensors(_as_rows(own)) for view, own in zip(views, tensors, strict=True)]
        made: list[Decision]
        if all_layers:
            named = {f"manager.{name}": value for name, value in parameters.items()}
            made = functional_call(_WholeModel(group.template), named, (seen,))
        else:
            made = [functional_call(group.template, parameters, (seen[0],))]
        parts = [(one.keep, one.decay, one.evicted, one.keys, one.values, one.gates) for one in made]
        fields[:] = [tuple(part is not None for part in decision) for decision in parts]
        return tuple(part[0] for decision in parts for part in decision if part is not None)

    if shared:
        out = vmap(decide_one, in_dims=(0, None), randomness="error")(group.parameters, None)
    else:
        out = vmap(decide_one, in_dims=(0, 0), randomness="error")(
            group.parameters, [view.tensors(memo=True) for view in views]
        )
    parts = iter(out)
    return [Decision(next(parts), *(next(parts) if there else None for there in rest)) for _, *rest in fields]


def _repeated(mask: Tensor, count: int) -> Tensor:
    return mask.expand(count, *mask.shape[1:])


def _as_rows(tensors: dict[TensorName, Tensor]) -> dict[TensorName, Tensor]:
    return {name: tensor[None] for name, tensor in tensors.items()}


def _rows(view: LayerView, members: Tensor) -> LayerView:
    """Return the view of some rows."""
    index = members.to(view.slots.device)
    return view.map(lambda tensor: tensor.index_select(0, index))
