"""Manager: allocations, which say how a budget is shared out over layers and heads.

A budget is the *mean* number of slots per KV head. An allocation is an option of any scorer,
``snapkv(allocation=pyramid(beta=20))``, and of one of three kinds:

| kind | sees | total |
|---|---|---|
| `LayerAllocation` | one layer's view | layers x heads x mean, exactly, in every row |
| `ModelAllocation` | every layer's view, before any slot leaves | the same |
| `EmergentAllocation` | one layer's view | emerges from the scores; a cap bounds it |

The total is exact also where protected ends, or the number of tokens read, bind: see `water_fill`. Where slots left at
an earlier decision that a later, larger limit would have room for (a share of a growing text, with ends that bound
first), other layers hold them: every layer counts what decisions took from all layers (`LayerView.evicted`), which it
can, for layers' limits follow from depth and tokens read, and from no score. Tokens that `admit` refuses are not made
up for by other layers.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from evomem.errors import ConfigError
from evomem.managers.selection import Ends
from evomem.memory.view import LayerView
from evomem.registry import Registry
from evomem.spec import parse_call

allocations: Registry[type[Allocation]]


class AllocationOptions(BaseModel):
    """Options of an allocation; subclasses add theirs. Saved whole in a plug-in's ``config.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Allocation(nn.Module, ABC):
    """Base of all allocations; pure in its parameters and the view, so that it runs under `torch.func.vmap`.

    Subclass one of the three kinds, not this.

    Class attributes
    ----------------
    name : registry name, set by ``@register_allocation("name")``.
    Options : pydantic model of its options; ``allocation.options`` holds the validated values.
    parameter_options : options that say what its parameters multiply, see `MemoryManager`.
    """

    name: ClassVar[str]
    Options: ClassVar[type[AllocationOptions]] = AllocationOptions
    parameter_options: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, **options: Any) -> None:
        super().__init__()
        try:
            self.options = self.Options(**options)
        except ValidationError as error:
            from evomem.validation import faults

            lines = "; ".join(faults(error, self.Options))
            raise ConfigError(f"allocation {getattr(self, 'name', type(self).__name__)!r}: {lines}") from None

    @property
    def observes(self) -> frozenset[str]:
        """Observations that the cache must record for it (`evomem.memory.observations`); none by default.

        They are joined to those of the manager, and lie in ``view.recorded``; read them by `recorded_for`.
        """
        return frozenset()

    def refusal(self, counts: Sequence[int]) -> str:
        """Return why a budget cannot be shared out over layers with so many KV heads each; "" if it can."""
        return ""

    def shares(self) -> Tensor | None:
        """Return parameters that a manager may draw or hand over, (1, points of depth) fp32; None: there are none."""
        return None

    def take_shares(self) -> nn.Parameter | None:
        """Hand its parameters over to a manager, which then gives them to every call; None: it learns nothing."""
        return None

    def describe(self) -> dict[str, Any]:
        """Return ``{"name": ..., "options": ...}``, JSON-serialisable."""
        return {"name": self.name, "options": self.options.model_dump(mode="json")}

    def extra_repr(self) -> str:
        """Show every option that differs from its default."""
        changed = self.options.model_dump(exclude_defaults=True)
        return ", ".join(f"{key}={value!r}" for key, value in changed.items())


class LayerAllocation(Allocation):
    """Shares out a budget layer by layer: a layer's part does not depend on what other layers hold.

    Over the layers, `layer_limit` adds up to layers x mean; over a layer's heads, `head_limits` to heads x
    `layer_limit`.

    Class attributes
    ----------------
    by_depth : layers get different parts, and any layer can say what all of them get (`layer_limits`). Then a layer's
        limits respect what the layers can still hold, see `slots_at_most`.
    by_input : the input decides how many slots there are, by parameters of the allocation of which nothing is drawn.
    """

    by_depth: ClassVar[bool] = False
    by_input: ClassVar[bool] = False

    @abstractmethod
    def layer_limit(self, view: LayerView, mean: Tensor, ends: Ends, shares: Tensor | None = None) -> Tensor:
        """Return the slots that a head of this layer has on average: (batch, 1, 1) int64. No score has a part in it.

        Parameters
        ----------
        mean : (batch, 1, 1) int64, slots per head over all layers.
        ends : what the scorer protects; every layer gets room for it where the mean allows.
        shares : (batch or 1, points of depth) log-shares in place of the allocation's own: drawn, or the manager's.
        """

    def layer_limits(self, view: LayerView, mean: Tensor, ends: Ends, shares: Tensor | None = None) -> Tensor:
        """Return `layer_limit` of every layer: (layers, batch, 1, 1) int64; asked where the allocation is `by_depth`.

        Raises
        ------
        ConfigError : it is not.
        """
        raise ConfigError(f"allocation {self.name!r}: says nothing of other layers; set by_depth if it does")

    def head_limits(self, marked: Tensor, view: LayerView, candidates: Tensor, n: Tensor) -> Tensor:
        """Return the slots of every head: (batch, kv_heads or 1, 1) int64; by default ``n``.

        Parameters
        ----------
        marked : (batch, kv_heads, slots), the scores after `Ends.mark`.
        candidates : (batch, kv_heads, slots) bool, slots that may stay.
        n : (batch, 1, 1) int64, of `layer_limit`.
        """
        return n

    def limits(self, view: LayerView, mean: Tensor, scores: Tensor, ends: Ends, shares: Tensor | None = None) -> Tensor:
        """Return the slots of every head when nothing is refused: (batch, kv_heads or 1, 1) int64."""
        n = self.layer_limit(view, mean, ends, shares)
        return self.head_limits(ends.mark(scores, view, view.valid, n), view, view.valid, n)


class ModelAllocation(Allocation):
    """Shares out a budget when all layers have read: every layer's view is there before any slot leaves."""

    @abstractmethod
    def limits(
        self,
        views: Sequence[LayerView],
        means: Sequence[Tensor],
        scores: Sequence[Tensor],
        ends: Ends,
        shares: Tensor | None = None,
    ) -> list[Tensor]:
        """Return the slots of every head of every layer, as a list of (batch, kv_heads or 1, 1) int64.

        Parameters
        ----------
        views, scores : one a layer; scores (batch, kv_heads, slots), -inf at slots that may not stay.
        means : per layer (batch, 1, 1) int64, slots per head over all layers.
        ends : what the scorer protects.
        shares : parameters in place of the allocation's own.
        """

    def ends_within(self, limits: Tensor, mean: Tensor) -> Tensor:
        """Return the slots per head by which a layer's protected ends are measured, that broadcast with the limits.

        By default the limits: a head with few slots protects fewer tokens. Never so many that the protected tokens of
        a head are more than its limit, or more of them would be protected than stay.

        Parameters
        ----------
        limits : (batch, kv_heads or 1, 1) int64, of a layer, as `limits` gave them.
        mean : (batch, 1, 1) int64, slots per head over all layers.
        """
        return limits


class EmergentAllocation(Allocation):
    """Says which slots stay by the scores' values. How many that are emerges; no total is promised."""

    @abstractmethod
    def keep(
        self, scores: Tensor, view: LayerView, candidates: Tensor, ends: Ends, budget: int | float | None
    ) -> Tensor:
        """Return the keep-mask (batch, kv_heads, slots).

        Parameters
        ----------
        scores : (batch, kv_heads, slots) fp32.
        candidates : (batch, kv_heads, slots) bool, slots that may stay.
        ends : what the scorer protects; the newest token is protected in any case.
        budget : the manager's, at most so many slots per head; None: no cap.
        """


def recorded_for(allocation: Allocation, view: LayerView, name: str) -> Tensor:
    """Return what was recorded of a view for an allocation, fp32.

    Raises
    ------
    ConfigError : the view has no such observation: it comes from a trace, or from an engine that did not record it.
    """
    if name not in view.recorded:
        whence = f"the traces {view.source} hold features only" if view.source else "the view does not hold it"
        raise ConfigError(
            f"allocation {allocation.name!r}: layer {view.layer}: it observes {name!r}, and {whence}; record what "
            "manager.observes names, read the contexts anew instead of from traces, or use another allocation"
        )
    return view.recorded[name].float()


allocations = Registry("allocation", "evomem.allocations")
"""Registry of allocations."""


def register_allocation(name: str) -> Callable[[type], Any]:
    """Class decorator: file an allocation under ``name`` and set its ``name``."""
    file = allocations.register(name)

    def decorate(cls: type[Allocation]) -> type[Allocation]:
        if not issubclass(cls, LayerAllocation | ModelAllocation | EmergentAllocation):
            raise ConfigError(
                f"allocation {name!r}: {cls.__qualname__} is no subclass of LayerAllocation, ModelAllocation or "
                "EmergentAllocation"
            )
        cls.name = name
        return file(cls)

    return decorate


def build_allocation(spec: str | Mapping[str, Any] | int) -> Allocation:
    """Build an allocation from what a user wrote, or from `Allocation.describe`.

    Parameters
    ----------
    spec :
        ``"pyramid"``, ``"pyramid(beta=20)"``, ``"across_heads(layers=depth_shares(points=8))"``,
        ``{"name": ..., "options": {...}}``, or a whole number n (also as a text): ``depth_shares(points=n)``; 0 is
        ``uniform``.

    Raises
    ------
    ConfigError : the spec cannot be read, or an option is wrong; `UnknownNameError` for an unknown name.
    """
    if isinstance(spec, str) and re.fullmatch(r"\s*[0-9]{1,9}\s*", spec):
        spec = int(spec)
    described: Any = spec
    if isinstance(spec, int) and not isinstance(spec, bool):
        described = {"name": "depth_shares", "options": {"points": spec}} if spec else {"name": "uniform"}
    elif isinstance(spec, str):
        call = parse_call(spec, "allocation", "'pyramid' or 'across_heads(layers=pyramid, safeguard=0.3)'", None)
        described = {"name": call.name, "options": call.options}
    if not isinstance(described, Mapping) or set(described) - {"name", "options"} or "name" not in described:
        raise ConfigError(
            f"allocation: {spec!r} is neither a text like 'pyramid(beta=20)', nor a mapping like "
            '{"name": "pyramid", "options": {"beta": 20}}, nor a number of points of depth'
        )
    name, options = described["name"], described.get("options") or {}
    if not isinstance(name, str) or not isinstance(options, Mapping):
        raise ConfigError(f"allocation: {spec!r}: the name is a text, and the options are a mapping")
    return allocations.get(name)(**options)
