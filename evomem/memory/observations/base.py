"""Memory: what an observation is, the registry of observations, and those that a manager asked for.

An observation is one class in one file: what it keeps while a layer attends (`Observation.append`, `attended`,
`queried`), and what a decision sees of it (`Observation.recorded`). The recorder carries the state through compaction,
row operations, copies and saved caches, whatever the observation is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from evomem.errors import ConfigError
from evomem.memory.kv.rotary import Rotary
from evomem.registry import Registry

if TYPE_CHECKING:
    from evomem.memory.kv.query_centres import QueryCentre
    from evomem.memory.observations.recorder import Recorder

Axes = tuple[str | int, ...]
"""The axes of a tensor, by name (``batch, kv_heads, query_heads, slots, head_dim``) or as a size."""
State = tuple[tuple[int, ...], torch.dtype]
"""Shape and type of a tensor that is held."""

PER_SLOT: Axes = ("batch", "kv_heads", "slots")


@dataclass(frozen=True)
class Moment:
    """A layer at the moment of a decision: its slots, and how it attends.

    Attributes
    ----------
    keys : (batch, kv_heads, slots, head_dim). slots : (batch, kv_heads, slots). start : (batch,). seen : tokens read.
    scale, softcap : of the attention's logits. window : the model's sliding window, or None.
    decays : (batch, kv_heads, slots) log-decay, or None. rotary : the layer's rotary embedding.
    centre : what the layer's queries are like before rotation, where an observation goes by it.
    """

    keys: Tensor
    slots: Tensor
    start: Tensor
    seen: int
    scale: float
    decays: Tensor | None
    window: int | None
    softcap: float | None
    rotary: Rotary | None
    centre: QueryCentre | None = None


@dataclass(frozen=True)
class Window:
    """The attention of every row's newest queries over the slots held now.

    Attributes
    ----------
    by_head : (batch, kv_heads, group, queries, slots), probabilities.
    real : (batch, queries) bool, False for padding.
    width : queries that were asked for; fewer are there while fewer were read.
    """

    by_head: Tensor
    real: Tensor
    width: int

    @cached_property
    def mean(self) -> Tensor:
        """Mean over the query heads of a group: (batch, kv_heads, queries, slots), 0 for padding."""
        return self._of_real(self.by_head.mean(2))

    @cached_property
    def largest(self) -> Tensor:
        """The largest of a group: (batch, kv_heads, queries, slots), 0 for padding."""
        return self._of_real(self.by_head.amax(2))

    def _of_real(self, attention: Tensor) -> Tensor:
        """Attention with 0 for padded queries, and for those that nothing is left for (the softmax of nothing)."""
        return torch.where(self.real[:, None, :, None], attention, 0.0).nan_to_num(nan=0.0)


@dataclass(frozen=True)
class Observation(ABC):
    """Something that a layer records for its manager, in step with its slots.

    A subclass is frozen and holds no tensors: state is in ``recorder.slotwise`` (slots on axis 2, batch on axis 0) and
    ``recorder.rowwise`` (batch on axis 0), under names of its own, and is replaced, not written to.

    Attributes
    ----------
    argument : the number after the colon of its name, for observations with ``takes``; else 0.

    Class attributes
    ----------------
    name : registry name, set by ``@register_observation("name")``.
    takes : letter for the number that its name ends with, as in ``window_attention:W``; empty: it takes none.
    every_query : `attended` is to be called with the attention of all queries, not only of the last few.
    needs_past : it cannot begin in the middle of a text that was read without it.
    looks_back : the contribution of one query cannot be removed from its state, so the cache cannot be cropped.
    before_rotation : it turns queries back, so the cache must know the model's rotary embedding.
    needs : what a memory must have for it, in words that an error can use; one that has less refuses it.
    """

    argument: int = 0

    name: ClassVar[str]
    takes: ClassVar[str] = ""
    every_query: ClassVar[bool] = False
    needs_past: ClassVar[bool] = False
    looks_back: ClassVar[bool] = False
    before_rotation: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()

    @property
    def spec(self) -> str:
        """The name by which a manager asks for it."""
        return f"{self.name}:{self.argument}" if self.takes else self.name

    @property
    def newest_queries(self) -> int:
        """How many of the newest queries the recorder keeps for it."""
        return 0

    def axes(self) -> dict[str, Axes]:
        """Return what a decision sees, by the names in ``LayerView.recorded``, with the tensors' axes."""
        return {self.spec: PER_SLOT}

    # ---- while the layer attends ----------------------------------------------------------------------------------

    def append(self, recorder: Recorder, shape: tuple[int, int, int], like: Tensor) -> None:  # noqa: B027 (optional)
        """Make room for new slots, which nobody has looked at yet; ``shape`` is (batch, kv_heads, new slots)."""

    def attended(  # noqa: B027 (optional)
        self, recorder: Recorder, attention: Tensor, first: int, starts: tuple[int, ...]
    ) -> None:
        """Learn from the attention of a block of queries.

        attention : (batch, kv_heads, queries, slots held so far), the mean of the group, zero for padded queries.
        first : token index of the block's first query. starts : first real token of every row.
        """

    def queried(  # noqa: B027 (optional)
        self, recorder: Recorder, query: Tensor, positions: Tensor | None, real: Tensor | None, rotary: Rotary | None,
        start: Tensor | None,
    ) -> None:  # fmt: skip
        """Learn from the queries themselves; arguments as in `Recorder.queried`."""

    def predicted(self, recorder: Recorder, error: Tensor) -> None:  # noqa: B027 (optional)
        """Learn how badly the newest slots' values were predicted: error (batch, kv_heads, new slots) >= 0."""

    def updated(self, recorder: Recorder, old: Tensor, new: Tensor) -> None:  # noqa: B027 (optional)
        """Learn of an update of all slots: what they held and would hold, (batch, kv_heads, slots, size)."""

    def gated(self, recorder: Recorder, logits: Tensor, ratio: Tensor) -> None:  # noqa: B027 (optional)
        """Learn of the newest slots' gates: log-odds (batch, kv_heads, new slots, 3); ratio: `SurpriseRatio`."""

    # ---- at a decision --------------------------------------------------------------------------------------------

    @abstractmethod
    def recorded(self, recorder: Recorder, moment: Moment, window: Callable[[int], Window]) -> dict[str, Tensor]:
        """Return what the decision sees, with the names and axes of `axes`.

        ``window(width)`` is the attention of the newest queries over the slots held now, computed once for all.
        """

    # ---- in saved caches, and for checks --------------------------------------------------------------------------

    def state(self, tensors: Mapping[str, Tensor], sizes: Sizes) -> dict[str, State]:
        """Return shape and type of every tensor that it keeps, by ``slotwise.NAME`` and ``rowwise.NAME``.

        tensors : those of a saved cache, for sizes that only they can tell.
        """
        return {}

    def example(self, sizes: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
        """Return random numbers that could have been recorded; ``sizes`` by the names of axes."""
        return {
            name: torch.randn([sizes[n] if isinstance(n, str) else n for n in axes], generator=generator).abs()
            for name, axes in self.axes().items()
        }


@dataclass(frozen=True)
class Sizes:
    """Sizes of a saved layer.

    Attributes
    ----------
    batch, kv_heads, slots, head_dim : axes of its keys.
    seen : tokens read.
    since : per row, the index of the token that recording began with.
    """

    batch: int
    kv_heads: int
    slots: int
    head_dim: int
    seen: int
    since: tuple[int, ...]


observations: Registry[type[Observation]] = Registry("observation", "evomem.observations")
"""Registry of observations."""


def register_observation(name: str) -> Any:
    """Class decorator: file an observation under ``name`` and set its ``name``."""
    file = observations.register(name)

    def decorate(cls: type[Observation]) -> type[Observation]:
        if not issubclass(cls, Observation):
            raise ConfigError(f"observation {name!r}: {cls.__qualname__} is no subclass of Observation")
        cls.name = name
        return file(cls)

    return decorate


def parse_observation(spec: str) -> Observation:
    """Return the observation that a name such as ``window_attention:32`` stands for.

    Raises
    ------
    ConfigError : there is none, or its number is missing or not at least 1.
    """
    name, _, number = spec.partition(":")
    kind = observations.get(name) if name in observations else None
    if kind is not None and kind.takes:
        if number.isascii() and number.isdigit() and len(number) < 10 and int(number) > 0:
            return kind(int(number))
    elif kind is not None and spec == name:
        return kind()
    raise ConfigError(f"unknown observation {spec!r}; the cache records {', '.join(known_specs())} (W >= 1)")


def known_specs() -> list[str]:
    """Return what can be asked for: the names, and for those that take a number its letter."""
    kinds = [observations.get(name) for name in observations.names()]
    return [f"{kind.name}:{kind.takes}" if kind.takes else kind.name for kind in kinds]


def axes_of(recorded: str) -> Axes | None:
    """Return the axes of a tensor of ``LayerView.recorded`` by its name; None: no observation records such a thing."""
    try:
        return parse_observation(recorded).axes().get(recorded)
    except ConfigError:
        plain = (kind() for kind in map(observations.get, observations.names()) if not kind.takes)
        return next((axes[recorded] for one in plain if recorded in (axes := one.axes())), None)


@dataclass(frozen=True)
class Wanted:
    """The observations that a manager asked for; `parse` makes one from their names."""

    observations: tuple[Observation, ...] = ()

    @classmethod
    def parse(cls, specs: Iterable[str]) -> Self:
        """Parse names; raise `ConfigError` for one that does not exist."""
        return cls(tuple(parse_observation(spec) for spec in sorted(specs)))

    def require(self, memory: str, has: frozenset[str]) -> None:
        """Raise `ConfigError` for an observation that means nothing in a memory.

        Parameters
        ----------
        memory : its name in the message: "a pair memory".
        has : what of `Observation.needs` there is.
        """
        for one in self.observations:
            if missing := sorted(one.needs - has):
                raise ConfigError(
                    f"observation {one.spec!r} needs {' and '.join(missing)}, which {memory} does not have; take a "
                    "manager, or features, that observe something else"
                )

    @property
    def queries(self) -> int:
        """How many of the newest queries the recorder keeps."""
        return max((one.newest_queries for one in self.observations), default=0)

    @property
    def every_query(self) -> bool:
        """Whether the attention of all queries is needed, not only of the last few."""
        return any(one.every_query for one in self.observations)

    @property
    def before_rotation(self) -> bool:
        """Whether queries are turned back."""
        return any(one.before_rotation for one in self.observations)

    @property
    def needs_past(self) -> bool:
        """Whether recording cannot begin in the middle of a text."""
        return any(one.needs_past for one in self.observations)

    @property
    def looks_back(self) -> bool:
        """Whether the contribution of one query cannot be removed from the state of some observation."""
        return any(one.looks_back for one in self.observations)
