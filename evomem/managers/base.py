"""Manager: looks at a layer's slots and decides which stay, which new ones are stored, and which fade."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from evomem.bounds import NEIGHBOURS
from evomem.errors import ConfigError
from evomem.managers.allocation import (
    Allocation,
    Everything,
    LayerAllocation,
    ModelAllocation,
    Threshold,
    Uniform,
    build_allocation,
    settle,
)
from evomem.managers.allocation.probed import measured_buffers, on_model
from evomem.managers.decision import Judgement, Rule
from evomem.managers.options import ManagerOptions, Schedule, check_budget
from evomem.managers.placement import follows_view, on_device
from evomem.managers.pretrained import PretrainedMixin
from evomem.managers.selection import Ends
from evomem.memory import Decision, LayerView, attached
from evomem.modes import outside_inference_mode
from evomem.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from evomem.memory import SlotCache

__all__ = [
    "NEIGHBOURS",
    "ManagerOptions",
    "MemoryManager",
    "Schedule",
    "check_budget",
    "managers",
    "register",
    "retype",
]

managers: Registry[type[MemoryManager]]


class MemoryManager(nn.Module, PretrainedMixin, ABC):
    """Base of all managers.

    A manager is pure in its parameters: `score`, `admit` and `decay` are functions of (parameters, view), so that
    `torch.func.vmap` evaluates a whole population at once. It holds no state of a sequence; that is in the cache.

    Its tensors follow the view: whatever device a layer lies on, the methods named in ``on_view_device`` run there, on
    a copy of parameters and buffers that is kept until they change (`evomem.managers.placement`).

    Class attributes
    ----------------
    name : registry name, set by ``@register("name")``.
    head_parameters : names of parameters whose first axes are (layer, kv head) and which act on that head only; a
        driver may search every head's part by itself.
    parameter_options : options that say what the parameters multiply, and in which order: with another value the same
        numbers mean something else. A search does not start from a plug-in that has others.
    calibrates : it has statistics that are measured on contexts before a search, and may be on another model.
    on_view_device : methods ``(self, view, ...)`` that see the manager's tensors on the view's device.
    Options : pydantic model of its options; ``manager.options`` holds the validated values.

    Attributes
    ----------
    provenance, pictures : what its plug-in says about where it comes from, and the card's pictures by file name; empty
        for a manager that was not loaded. They are saved again with it.
    """

    name: ClassVar[str]
    Options: ClassVar[type[ManagerOptions]] = ManagerOptions
    head_parameters: ClassVar[frozenset[str]] = frozenset()
    parameter_options: ClassVar[frozenset[str]] = frozenset()
    calibrates: ClassVar[bool] = False
    on_view_device: ClassVar[frozenset[str]] = frozenset(
        {"decide", "forward", "judge", "score", "score_within", "admit", "decay"}
    )

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        for name in ("make_selection", "select", "own_allocation"):
            if name in vars(cls):
                raise ConfigError(
                    f"manager {cls.__qualname__}: {name}: nobody asks for it any more; say in make_ends which tokens "
                    "are protected, and in built_in_allocation how the budget is shared out"
                )
        for name in cls.on_view_device & vars(cls).keys():
            setattr(cls, name, follows_view(vars(cls)[name]))
        if "observes" in vars(cls):
            cls.observes = joined_observes(vars(cls)["observes"])  # type: ignore[assignment,method-assign]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.provenance: Mapping[str, Any] = {}
        self.pictures: Mapping[str, bytes] = {}
        try:
            self.options = self.Options(**options)
        except ValidationError as error:
            from evomem.validation import faults

            lines = "; ".join(faults(error, self.Options))
            raise ConfigError(f"manager {getattr(self, 'name', type(self).__name__)!r}: {lines}") from None
        check_budget(self.options.budget)
        self.schedule = Schedule(self.options.every)
        self.ends = self.make_ends()
        self.allocation = self.make_allocation()
        if isinstance(self.allocation, Everything):
            self.allocation.require_no_budget(self.options.budget, getattr(self, "name", type(self).__name__))

    # ---- what a subclass says -------------------------------------------------------------------------------------

    @property
    def observes(self) -> frozenset[str]:
        """Observations that the cache must record (`evomem.memory.observations`).

        A subclass says what its scores, gates and rates look at; by default nothing. What the allocation looks at
        (`Allocation.observes`) is added to it, so that whoever asks hears of both.
        """
        return self.allocation.observes

    def make_ends(self) -> Ends:
        """Return which tokens are kept before all others; by default none."""
        return Ends()

    def make_allocation(self) -> Allocation:
        """Return how layers and heads share the budget: the option ``allocation``, over `built_in_allocation`.

        Raises
        ------
        ConfigError : both do the same job, or the manager does not rank its slots to a budget.
        """
        spec, built_in = self.options.allocation, self.built_in_allocation()
        if not spec:  # the number 0 stands for none
            return built_in
        option = build_allocation(spec)
        if isinstance(option, Threshold) and option.options.cap is not None and self.options.budget is not None:
            raise ConfigError(
                f"manager {self.name!r}: budget: {self.options.budget!r}, and allocation: threshold has the cap "
                f"{option.options.cap!r}; give one of them: a threshold without a cap is capped by the budget"
            )
        return settle(option, built_in, self.name)

    def built_in_allocation(self) -> Allocation:
        """Return the allocation that is part of the manager's method; by default every head gets the budget."""
        return Uniform()

    def shares(self) -> Tensor | None:
        """Return the log-shares of the budget that are parameters: (1, points of depth); None: there are none."""
        return self.allocation.shares()

    @abstractmethod
    def score(self, view: LayerView) -> Tensor:
        """Return (batch, kv_heads, slots) fp32 scores; larger is kept. Values at empty slots do not matter."""

    def score_within(self, view: LayerView, n: Tensor) -> Tensor:
        """Return `score` where protected ends are measured by ``n`` slots a head; by default it does not matter.

        Override it where `score` treats the protected end apart (`SnapKV`): under an allocation of the whole model a
        head's slots are known only when all layers have been scored once, by the mean.

        Parameters
        ----------
        n : (batch, kv_heads or 1, 1) int64.
        """
        return self.score(view)

    def prepare(self, view: LayerView) -> None:
        """Compute what does not depend on parameters into the view's memo (`LayerView.once`); by default nothing.

        Called with the rows of a whole population before it decides, so that this is computed once, and not row by row
        under `torch.func.vmap`. Every value's axis 0 is the batch.
        """

    def admit(self, view: LayerView) -> Tensor | None:
        """Store: log-odds (batch, kv_heads, slots) of the ``view.fresh`` newest tokens; None stores everything."""
        return None

    def decay(self, view: LayerView) -> Tensor | None:
        """Forget: log-decay (batch, kv_heads, slots) <= 0 added to the slots' attention logits; None leaves them."""
        return None

    @property
    def forgets(self) -> bool:
        """Whether it lets slots fade; a memory on whose reads that has no effect refuses it."""
        return type(self).decay is not MemoryManager.decay

    def calibrate(self, views: Iterable[LayerView]) -> None:
        """Measure the manager's statistics on contexts that were read with everything kept; by default there are none.

        ``views`` are of all layers of all contexts, with what the manager observes recorded.
        """

    # ---- composed once, here --------------------------------------------------------------------------------------

    @property
    def rule(self) -> Rule:
        """The rule that turns judgements into decisions (`evomem.managers.decision`)."""
        return Rule(self.options.budget, self.ends, self.allocation)

    @property
    def whole_model(self) -> bool:
        """Whether a decision needs all layers' views, so that `decide_all` must be asked and not `decide`."""
        return isinstance(self.allocation, ModelAllocation)

    @property
    def layers_differ(self) -> bool:
        """Whether layers get different parts of the budget, each of which is worked out from the layer's depth."""
        return isinstance(self.allocation, LayerAllocation) and self.allocation.by_depth

    @property
    def uses_statistics(self) -> bool:
        """Whether decisions depend on its statistics; a memory without contexts to measure cannot give any."""
        return self.calibrates

    @property
    def counts_evicted(self) -> bool:
        """Whether its decisions count what they take from every layer; see `Rule.counts_evicted`."""
        return self.rule.counts_evicted(self.shares())

    @follows_view
    def judge(self, view: LayerView) -> Judgement:
        """Return what the manager says about the slots; overridden only to compute the parts together."""
        scores, log_odds = self.score(view).float(), self.admit(view)
        return Judgement(scores, None if log_odds is None else log_odds >= 0, self.decay(view), self.shares())

    @follows_view
    def decide(self, view: LayerView) -> Decision:
        """Return the decision about one layer, composed by `Rule.decide`. No manager overrides this.

        A fresh token whose log-odds of `admit` are below zero is not stored; the next best slot is kept instead.

        Raises
        ------
        ConfigError : the manager's allocation needs all layers (``whole_model``).
        """
        return self.rule.decide(self.judge(view), view)

    def decide_all(self, views: Sequence[LayerView]) -> list[Decision]:
        """Return the decisions about all layers at once, composed by `Rule.decide_all`.

        ``views`` are of one model's layers, in their order, with nothing evicted since the last decision. Where
        `score_within` is overridden, an allocation of the whole model shares out by `score`, and every head then keeps
        the best by its own number of slots.
        """
        judgements, rule = [self.judge(view) for view in views], self.rule
        if not self.whole_model or type(self).score_within is MemoryManager.score_within:
            return rule.decide_all(judgements, views)
        limits = rule.head_limits(judgements, views)
        parts = zip(judgements, views, rule.ends_within(limits, views), strict=True)
        judgements = [replace(one, scores=self.score_within(view, n).float()) for one, view, n in parts]
        return rule.decide_all(judgements, views, limits)

    def forward(self, view: LayerView) -> Decision:
        """`decide`, under the name that `torch.func.functional_call` calls."""
        return self.decide(view)

    # ---- use ------------------------------------------------------------------------------------------------------

    def for_model(self, model: PreTrainedModel) -> Self:
        """Return the manager as it decides on ``model``: itself, or a twin that knows what this model's heads do.

        Only an allocation that looks at what heads do needs that (`ProbedAllocation`). Caches and evaluations ask for
        it; it takes seconds, once a model. The twin shares everything else, parameters too. An allocation whose curves
        were measured under another scorer, or on another model, is warned of here (`MeasuredAllocation`).

        Raises
        ------
        UnsupportedModelError, ModelError : the heads' behaviour cannot be measured.
        """
        return on_model([self], model)[0]

    def on(self, device: torch.device) -> Self:
        """Return the manager with its tensors on ``device``: itself if they lie there, else a twin.

        Needed only for what takes no view, such as `rule`. The twin shares everything but the tensors.
        """
        return on_device(self, device)

    @contextmanager
    def attach(self, model: PreTrainedModel, *, self_check: bool = True) -> Iterator[SlotCache]:
        """Manage the memory of ``model`` inside the ``with`` block; yields the cache to pass to the model.

        >>> with manager.attach(model) as cache:            # doctest: +SKIP
        ...     model.generate(**inputs, past_key_values=cache)

        Leaving the block restores the model exactly.

        Parameters
        ----------
        self_check : the first time in a process, compare a small random copy of a family that evomem's tests do not
            cover with the stock model; ``EVOMEM_SELF_CHECK=0`` in the environment switches it off everywhere.

        Raises
        ------
        UnsupportedModelError : a family without a managed attention, or one that computes something else under it.
        CacheError : on leaving, when the model ran and no cache of slots read anything: it was not passed, or was lost.
        """
        with attached(model, self_check=self_check) as usage:
            yield self.new_cache(model)
            usage.require_managed()

    def new_cache(self, model: PreTrainedModel) -> SlotCache:
        """Return an empty cache for further sequences; ``model`` must be attached while it is used."""
        from evomem.memory import SlotCache  # needs transformers; scoring another engine's tensors does not
        from evomem.memory.kv.attach import has_own_memory

        if has_own_memory(model) and self.schedule.every is None:
            raise ConfigError(
                f"manager {self.name!r}: every: None, and {type(model).__name__} has a memory of its own, about which "
                "managers decide while it reads; give the tokens between decisions: every=1, or more"
            )
        return SlotCache.for_model(model, policy=self)

    def with_options(self, **changes: Any) -> Self:
        """Return a manager with the same parameters and buffers and some options changed (for example the budget)."""
        state = self.state_dict()
        with outside_inference_mode():
            other = type(self)(**{**self.options.model_dump(), **changes})
            others = other.state_dict()
            measured = measured_buffers(self) | measured_buffers(other)  # of a model, whatever the options are
            differing = {
                name
                for name in (state.keys() | others.keys()) - measured
                if name not in state or name not in others or state[name].shape != others[name].shape
            }
            if differing:
                raise ConfigError(
                    f"manager {self.name!r}: with {', '.join(changes)} changed it has other parameters "
                    f"({', '.join(sorted(differing))}); build another manager and search for its parameters"
                )
            state = {name: state.get(name, value) for name, value in others.items()}
            retype(other, {name: tensor.dtype for name, tensor in state.items()})
            other.load_state_dict(state)
        other.provenance, other.pictures = self.provenance, self.pictures
        return other.to(next((t.device for t in state.values()), torch.device("cpu")))

    def describe(self) -> dict[str, Any]:
        """Return ``{"name": ..., "options": ...}``, JSON-serialisable: the record of an experiment."""
        options = self.options.model_dump(mode="json")
        if options["allocation"] is None:  # records of before know no such option, and mean the same
            del options["allocation"]
        return {"name": self.name, "options": options}

    def extra_repr(self) -> str:
        """Show every option that differs from its default."""
        changed = self.options.model_dump(exclude_defaults=True)
        return ", ".join(f"{key}={value!r}" for key, value in changed.items())


def joined_observes(observes: property | frozenset[str]) -> property:
    """Return a manager's property ``observes`` with what its allocation observes added."""
    read = observes.fget if isinstance(observes, property) else None
    if read is None and not isinstance(observes, frozenset):
        raise ConfigError(f"observes: {observes!r} is neither a property nor a frozenset of names of observations")

    def joined(self: MemoryManager) -> frozenset[str]:
        scored: frozenset[str] = observes if read is None else read(self)  # type: ignore[assignment]
        return scored | self.allocation.observes

    joined.__doc__ = getattr(observes, "__doc__", None) if read is not None else None
    return property(joined)


def retype(manager: MemoryManager, types: Mapping[str, torch.dtype]) -> None:
    """Give every parameter and buffer the type named for it, and memory that can be written to; tied ones stay tied."""
    with torch.no_grad():
        for name, tensor in manager.state_dict(keep_vars=True).items():
            if tensor.dtype != types[name] or not tensor.is_contiguous():
                tensor.data = tensor.data.to(types[name]).contiguous()


managers = Registry("manager", "evomem.managers")
"""Registry of managers."""


def register(name: str) -> Any:
    """Class decorator: file a manager under ``name`` and set its ``name``."""
    file = managers.register(name)

    def decorate(cls: type[MemoryManager]) -> type[MemoryManager]:
        if not issubclass(cls, MemoryManager):
            raise ConfigError(f"manager {name!r}: {cls.__qualname__} is no subclass of MemoryManager")
        cls.name = name
        return file(cls)

    return decorate
