"""Evaluation: many managers decide at once; those that differ in their parameters only go through `vmap` together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from evomem.managers.base import MemoryManager, Schedule
from evomem.memory import Decision, LayerView
from evomem.memory.kv.attention import full_precision
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
    def listens(self) -> bool:
        """Whether `heard` wants to be told what is read between decisions."""
        ...

    def decide(self, view: LayerView) -> Decision:
        """Return the decisions of all candidates, from a view of one shared row or of a row each."""
        ...

    def fades(self, layer: int) -> Tensor:
        """Which candidates let slots of a layer fade, as far as they have decided: (candidates,) bool."""
        ...

    def heard(self, logits: Tensor, following: Tensor) -> None:
        """Take in logits (candidates, tokens, vocabulary) and the tokens that came (candidates, tokens)."""
        ...

    def aside(self) -> Deciding:
        """Return a policy that decides the same from here on, and whose decisions this one does not take in."""
        ...


@dataclass(frozen=True)
class _Group:
    """Managers of one kind with equal options: one template, stacked parameters, and their places in the population."""

    template: MemoryManager
    parameters: dict[str, Tensor]
    places: Tensor

    def on(self, device: torch.device) -> _Group:
        """Return the group with all its tensors on a device."""
        parameters = {name: stacked.to(device) for name, stacked in self.parameters.items()}
        return _Group(self.template.on(device), parameters, self.places.to(device))


class PopulationPolicy:
    """A population as one cache policy: row c of the cache is decided by manager c.

    A view of one row is what all candidates share (the context was read once); a view of as many rows as managers
    gives every manager its own row.

    Every manager decides as if it were alone: a selection that looks across the batch (`Dense`) sees the one row of its
    own candidate, whoever else is in the population.
    """

    listens = False

    def __init__(self, managers: Sequence[MemoryManager]) -> None:
        self.size = len(managers)
        self.observes = frozenset().union(*(manager.observes for manager in managers))
        schedules = {manager.schedule for manager in managers}
        if len(schedules) > 1:
            raise ValueError("a population decides on one schedule")
        self.schedule: Schedule = schedules.pop()
        self.groups = list(_grouped(managers))
        self._fades: dict[int, Tensor] = {}
        self._placed: dict[torch.device, list[_Group]] = {}

    def _groups_on(self, device: torch.device) -> list[_Group]:
        """Return the groups on a device, where each of them is copied once."""
        if device not in self._placed:
            self._placed[device] = [group.on(device) for group in self.groups]
        return self._placed[device]

    def fades(self, layer: int) -> Tensor:
        """Which managers let slots of a layer fade, as far as they have decided: (managers,) bool."""
        return self._fades.get(layer, torch.zeros(self.size, dtype=torch.bool))

    def heard(self, logits: Tensor, following: Tensor) -> None:
        """Nothing: deterministic managers do not learn from what is read."""

    def aside(self) -> PopulationPolicy:
        """Return itself: nothing is taken in."""
        return self

    @torch.no_grad()
    def decide(self, view: LayerView) -> Decision:
        """Return the decisions of all managers: masks (managers, kv_heads, slots)."""
        shared = view.keys.shape[0] == 1
        shape = (self.size, *view.slots.shape[1:])
        keep = torch.zeros(shape, dtype=torch.bool, device=view.slots.device)
        decay: Tensor | None = None
        for number, group in enumerate(self._groups_on(view.slots.device)):
            own = view if shared else _rows(view, group.places)
            with full_precision(view.keys):
                kept, faded = _decide(group, own, shared)
            keep[group.places] = kept
            if faded is not None:
                decay = torch.zeros(shape, device=keep.device, dtype=torch.float32) if decay is None else decay
                decay[group.places] = faded
                places = self.groups[number].places
                self._fades[view.layer] = self.fades(view.layer).index_fill(0, places, True)
        return Decision(keep, decay)


def _grouped(managers: Sequence[MemoryManager]) -> list[_Group]:
    places: dict[str, list[int]] = {}
    for index, manager in enumerate(managers):
        shapes = {name: (tuple(p.shape), p.dtype) for name, p in manager.named_parameters()}
        buffers = {name: (b.dtype, hash(tuple(b.flatten().tolist()))) for name, b in manager.named_buffers()}
        places.setdefault(repr((manager.describe(), shapes, buffers)), []).append(index)
    groups = []
    for members in places.values():
        rows = [dict(managers[i].named_parameters()) for i in members]
        stacked = {name: torch.stack([row[name].detach().to(rows[0][name].device) for row in rows]) for name in rows[0]}
        groups.append(_Group(managers[members[0]], stacked, torch.tensor(members)))
    return groups


def _decide(group: _Group, view: LayerView, shared: bool) -> tuple[Tensor, Tensor | None]:
    count = len(group.places)
    if not group.parameters or (count == 1 and shared):
        decision = group.template.decide(view)
        keep, decay = decision.keep, decision.decay
        return keep.expand(count, *keep.shape[1:]), None if decay is None else decay.expand(count, *decay.shape[1:])

    fades = []

    def one(parameters: dict[str, Tensor], tensors: dict[TensorName, Tensor] | None) -> tuple[Tensor, ...]:
        seen = view if tensors is None else view.with_tensors({name: part[None] for name, part in tensors.items()})
        decision: Decision = functional_call(group.template, parameters, (seen,))
        fades.append(decision.decay is not None)
        return (decision.keep[0],) if decision.decay is None else (decision.keep[0], decision.decay[0])

    if shared:
        out = vmap(one, in_dims=(0, None), randomness="error")(group.parameters, None)
    else:
        out = vmap(one, in_dims=(0, 0), randomness="error")(group.parameters, view.tensors())
    return out[0], out[1] if len(out) > 1 else None


def _rows(view: LayerView, places: Tensor) -> LayerView:
    index = places.to(view.slots.device)
    return view.map(lambda tensor: tensor.index_select(0, index))
