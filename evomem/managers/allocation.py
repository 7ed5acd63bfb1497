"""Manager: allocations, which say how a budget is shared out over layers and heads.

A budget is the *mean* number of slots per KV head. An allocation is an option of any scorer,
``snapkv(allocation=pyramid(beta=20))``, and of one of three kinds:

| kind | sees | total |
|---|---|---|
| `LayerAllocation` | one layer's view | layers x heads x mean, exactly, in every row |
| `ModelAllocation` | every layer's view, before any slot leaves | the same |
| `EmergentAllocation` | one layer's view | emerges from the scores; a cap bounds it |

The total is exact also where protected ends, or the number of tokens read, bind: see `water_fill`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import Tensor, nn

from evomem.bounds import LARGE, TOKENS, UNITS
from evomem.errors import ConfigError
from evomem.managers.selection import Ends, best, share_of, slots_of_budget, tokens_read
from evomem.memory.view import LayerView
from evomem.modes import outside_inference_mode
from evomem.registry import Registry

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
    """

    name: ClassVar[str]
    Options: ClassVar[type[AllocationOptions]] = AllocationOptions

    def __init__(self, **options: Any) -> None:
        super().__init__()
        try:
            self.options = self.Options(**options)
        except ValidationError as error:
            from evomem.validation import faults

            lines = "; ".join(faults(error, self.Options))
            raise ConfigError(f"allocation {getattr(self, 'name', type(self).__name__)!r}: {lines}") from None

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
    """

    @abstractmethod
    def layer_limit(self, view: LayerView, mean: Tensor, ends: Ends, shares: Tensor | None = None) -> Tensor:
        """Return the slots that a head of this layer has on average: (batch, 1, 1) int64. No score has a part in it.

        Parameters
        ----------
        mean : (batch, 1, 1) int64, slots per head over all layers.
        ends : what the scorer protects; every layer gets room for it where the mean allows.
        shares : (batch or 1, points of depth) log-shares in place of the allocation's own: drawn, or the manager's.
        """

    def head_limits(self, marked: Tensor, view: LayerView, held: Tensor, n: Tensor) -> Tensor:
        """Return the slots of every head: (batch, kv_heads or 1, 1) int64; by default ``n``.

        Parameters
        ----------
        marked : (batch, kv_heads, slots), the scores after `Ends.mark`.
        held : (batch, kv_heads, slots) bool, slots that may stay.
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


class EmergentAllocation(Allocation):
    """Says which slots stay by the scores' values. How many that are emerges; no total is promised."""

    @abstractmethod
    def keep(self, scores: Tensor, view: LayerView, held: Tensor, ends: Ends, budget: int | float | None) -> Tensor:
        """Return the keep-mask (batch, kv_heads, slots).

        Parameters
        ----------
        scores : (batch, kv_heads, slots) fp32.
        held : (batch, kv_heads, slots) bool, slots that may stay.
        ends : what the scorer protects; the newest token is protected in any case.
        budget : the manager's, at most so many slots per head; None: no cap.
        """


# ---- the registry ---------------------------------------------------------------------------------------------------

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
        ``{"name": ..., "options": {...}}``, or a whole number n: ``depth_shares(points=n)``; 0 is ``uniform``.

    Raises
    ------
    ConfigError : the spec cannot be read, or an option is wrong; `UnknownNameError` for an unknown name.
    """
    described: Any = spec
    if isinstance(spec, int) and not isinstance(spec, bool):
        described = {"name": "depth_shares", "options": {"points": spec}} if spec else {"name": "uniform"}
    elif isinstance(spec, str):
        from evomem.managers.build import parse

        described = parse(spec)
    if not isinstance(described, Mapping) or set(described) - {"name", "options"} or "name" not in described:
        raise ConfigError(
            f"allocation: {spec!r} is neither a text like 'pyramid(beta=20)', nor a mapping like "
            '{"name": "pyramid", "options": {"beta": 20}}, nor a number of points of depth'
        )
    name, options = described["name"], described.get("options") or {}
    if not isinstance(name, str) or not isinstance(options, Mapping):
        raise ConfigError(f"allocation: {spec!r}: the name is a text, and the options are a mapping")
    return allocations.get(name)(**options)


def settle(given: Allocation | None, own: Allocation, manager: str) -> Allocation:
    """Return the allocation of a manager that has one of its ``own`` and for which another may be ``given``.

    ``across_heads`` shares out what the manager's own allocation gives a layer. Two allocations that do the same job
    are refused.
    """
    if given is None:
        return own
    if isinstance(own, Uniform):
        return given
    if isinstance(given, AcrossHeads) and isinstance(given.layers, Uniform) and isinstance(own, LayerAllocation):
        return given.over(own)
    raise ConfigError(
        f"manager {manager!r}: allocation: {given.name!r} does the same job as {getattr(own, 'name', 'its own')!r}, "
        "which the manager has by itself; leave the option out, or give it to the scorer alone, "
        "e.g. snapkv(allocation=...)"
    )


# ---- over layers ----------------------------------------------------------------------------------------------------


@register_allocation("uniform")
class Uniform(LayerAllocation):
    """Gives every head of every layer the same number of slots."""

    def layer_limit(self, view: LayerView, mean: Tensor, ends: Ends, shares: Tensor | None = None) -> Tensor:
        """Return the mean."""
        return mean


class PyramidOptions(AllocationOptions):
    """Options of `Pyramid`."""

    beta: float = Field(
        default=20.0, ge=1, le=LARGE, description="steepness: the last layer gets about 1/beta of the budget"
    )
    window: int | None = Field(
        default=None,
        ge=0,
        le=TOKENS,
        description="tokens of the observed window; none: the newest that the scorer keeps",
    )


@register_allocation("pyramid")
class Pyramid(LayerAllocation):
    """Gives low layers more slots, falling linearly with depth (PyramidKV, Cai et al., arXiv 2406.02069)."""

    Options = PyramidOptions
    options: PyramidOptions

    def layer_limit(self, view: LayerView, mean: Tensor, ends: Ends, shares: Tensor | None = None) -> Tensor:
        """Return b_l of `pyramid_budget`; where ends need more than it gives, see `water_fill`."""
        read, beta, window = tokens_read(view), self.options.beta, self.options.window
        if window is None:
            window = ends.recent if isinstance(ends.recent, int) else 0
        if ends.floor <= 1:  # no end binds, so this layer's part is all that is needed
            return pyramid_budget(mean, read, view.layer, view.layers, beta, window)
        parts = [pyramid_budget(mean, read, layer, view.layers, beta, window) for layer in range(view.layers)]
        whole = torch.stack(parts)
        return water_fill(whole, whole.double(), mean, ends.floor, read)[view.layer]


def pyramid_budget(mean: Tensor, read: Tensor, layer: int, layers: int, beta: float, window: int) -> Tensor:
    """Slots per head of one layer, falling linearly from the first layer to the last (PyramidKV, arXiv 2406.02069).

    b_l = b_max - l (b_max - b_min) / (N - 1) with b_min = m/beta, b_max = 2m - b_min; where b_max >= L - w,
    b_max = L - w and b_min = 2m - b_max. Three things that the formula leaves open are settled here:

    * rounding: the first half of the layers is rounded to the nearest (halves up), layer N-1-l gets 2m - b_l and a
      middle layer m, so the sum over the layers is exactly m N and every b_l is within 1/2 of the formula;
    * b_min is at least one slot (m < beta would empty the last layer), b_max = 2m - b_min as before;
    * where the second case would turn the pyramid upside down (m > L - w), all layers get m.

    Parameters
    ----------
    mean :
        (...) int64, m, the mean number of slots per head over the layers.
    read :
        (...) int64, L, tokens of the row read so far.
    layer, layers :
        l and N.
    beta :
        Steepness, >= 1; 1 gives all layers m.
    window :
        w.

    Returns
    -------
    (...) int64.
    """
    m = mean.double()
    smallest = (m / beta).clamp(min=1.0)
    largest = 2 * m - smallest
    most = (read - window).double()
    largest = torch.where(largest >= most, most, largest)
    largest = torch.maximum(largest, m)
    smallest = 2 * m - largest
    mirrored = min(layer, layers - 1 - layer)
    upper = torch.floor(largest - mirrored * (largest - smallest) / max(layers - 1, 1) + 0.5).long()
    if 2 * layer == layers - 1:
        return mean
    return upper if 2 * layer < layers - 1 else 2 * mean - upper


class DepthSharesOptions(AllocationOptions):
    """Options of `DepthShares`; exactly one of the two is given."""

    points: int | None = Field(
        default=None, ge=1, le=UNITS, description="points of depth at which log-shares are learned, all 0 at first"
    )
    log_shares: tuple[Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)], ...] | None = Field(
        default=None, min_length=1, max_length=UNITS, description="log-shares at equally spaced points of depth, fixed"
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.points is None) == (self.log_shares is None):
            raise ValueError("give either points (learned) or log_shares (fixed)")
        return self


@register_allocation("depth_shares")
class DepthShares(LayerAllocation):
    """Gives layer l a share proportional to exp(g(depth)), g piecewise linear through log-shares, learned or fixed.

    At least what the protected ends need and one slot more, and at most what was read, see `water_fill`.
    """

    Options = DepthSharesOptions
    options: DepthSharesOptions
    log_shares: Tensor | None

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.options.points is not None:
            self.log_shares = nn.Parameter(torch.zeros(self.options.points, dtype=torch.float32))
        else:
            fixed = torch.tensor(self.options.log_shares, dtype=torch.float32)
            self.register_buffer("log_shares", fixed, persistent=False)

    def shares(self) -> Tensor | None:
        """Return the log-shares: (1, points of depth); None after `take_shares`."""
        return None if self.log_shares is None else self.log_shares.float()[None]

    def take_shares(self) -> nn.Parameter | None:
        """Hand the learned log-shares over; fixed ones stay."""
        if not isinstance(self.log_shares, nn.Parameter):
            return None
        taken = self.log_shares
        del self.log_shares
        self.log_shares = None
        return taken

    def layer_limit(self, view: LayerView, mean: Tensor, ends: Ends, shares: Tensor | None = None) -> Tensor:
        """Return the layer's share, rounded by the running sum over the layers."""
        logs = self.shares() if shares is None else shares
        if logs is None:
            raise ConfigError("allocation 'depth_shares': its log-shares were handed over, and nobody gives them")
        return depth_limits(logs, view, mean, ends.floor)


def depth_limits(log_shares: Tensor, view: LayerView, mean: Tensor, floor: int) -> Tensor:
    """Return the slots per head of the view's layer, whose share of the budget is exp(g(depth)).

    Shares are rounded by their running sum, so that the layers' slots add up to N times the mean.

    Parameters
    ----------
    log_shares : (batch or 1, points of depth).
    mean : (batch, 1, 1) int64, the mean over the layers.
    floor : slots that every layer keeps, unless the mean itself is less.

    Returns
    -------
    (batch, 1, 1) int64.
    """
    layers = view.layers
    logs = torch.nan_to_num(interpolated(log_shares.transpose(0, 1), layers))
    weights = torch.softmax(logs.double(), 0)
    until = (weights.cumsum(0) * layers)[..., None, None]
    rounded = torch.round(mean * until).long()
    own = torch.diff(rounded, dim=0, prepend=torch.zeros_like(rounded[:1]))
    return water_fill(own, weights[..., None, None], mean, floor, tokens_read(view))[view.layer]


def interpolated(knots: Tensor, layers: int) -> Tensor:
    """Return a piecewise linear function, given at equally spaced knots (knots, ...), at every layer: (layers, ...)."""
    count = knots.shape[0]
    if count == 1:
        return knots.expand(layers, *knots.shape[1:])
    index, share, rest = _between(count, layers, knots.device)
    shape = (layers, *[1] * (knots.dim() - 1))
    return knots[index] * rest.reshape(shape) + knots[index + 1] * share.reshape(shape)


@cache
def _between(count: int, layers: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return every layer's knot below, and the weights of the knot above and below: (layers,) each. Made once."""
    at = [layer / (layers - 1) * (count - 1) if layers > 1 else 0.0 for layer in range(layers)]
    low = [min(int(place), count - 2) for place in at]
    share = [place - knot for place, knot in zip(at, low, strict=True)]
    with outside_inference_mode():
        weights = torch.tensor([share, [1 - s for s in share]], dtype=torch.float32, device=device)
        return torch.tensor(low, dtype=torch.int64, device=device), weights[0], weights[1]


def water_fill(own: Tensor, weights: Tensor, mean: Tensor, floor: int, read: Tensor) -> Tensor:
    """Return whole slots of every layer that add up to layers x mean and respect a floor and what was read.

    Where no bound binds in a row, that is ``own``. Else layer l gets clamp(λ w_l, floor, read) with the λ that makes
    the sum right: what a floor takes and a ceiling leaves is shared by the others as before. Found at the kinks of
    Σ_l clamp(λ w_l, …), which is piecewise linear in λ; rounded by the running sum, in whole numbers.

    Parameters
    ----------
    own : (layers, batch or 1, 1, 1) int64 whose sum is layers x mean.
    weights : the same shape, float64 >= 0.
    mean : (batch or 1, 1, 1) int64.
    floor : a floor above the mean counts as the mean.
    read : (batch or 1, 1, 1) int64; fewer than the mean count as the mean.

    Returns
    -------
    (layers, batch, 1, 1) int64.
    """
    least, most = mean.clamp(max=floor), torch.maximum(mean, read)
    bound = ((own < least) | (own > most)).any(0)
    return torch.where(bound, clamped_shares(weights, least, most, mean * own.shape[0]), own)


def clamped_shares(weights: Tensor, least: Tensor, most: Tensor, total: Tensor) -> Tensor:
    """Return whole numbers that add up to a total: clamp(λ w, least, most) with the λ that makes the sum right.

    Parameters
    ----------
    weights : (parts, batch or 1, 1, 1) float64 >= 0.
    least, most : ([parts,] batch, 1, 1) int64, whose sums over the parts are at most and at least the total.
    total : (batch, 1, 1) int64.

    Returns
    -------
    (parts, batch, 1, 1) int64.
    """
    low, high, w = least.double(), most.double(), weights.clamp(min=1e-200)
    target = (total + torch.zeros_like(weights[0])).double()
    kinks = torch.cat([low / w, high / w, torch.zeros_like(target)[None], torch.full_like(target, 1e300)[None]])
    sums = torch.minimum(torch.maximum(kinks[:, None] * w, low), high).sum(1)
    below = torch.where(sums <= target, kinks, 0.0).amax(0)
    above = torch.where(sums >= target, kinks, 1e300).amin(0)
    small, large = (torch.minimum(torch.maximum(end * w, low), high) for end in (below, above))
    gap = (large - small).sum(0)
    share = torch.where(gap > 0, (target - small.sum(0)) / gap, 0.0).clamp(0, 1)
    # In units of 2^-20 slots everything is exact, and a sum of parts that are within the bounds rounds within them.
    units = torch.round((small + share * (large - small)) * 2**20).long().cumsum(0)
    rounded = (units + 2**19) >> 20
    return torch.diff(rounded, dim=0, prepend=torch.zeros_like(rounded[:1]))


# ---- over heads -----------------------------------------------------------------------------------------------------


class AcrossHeadsOptions(AllocationOptions):
    """Options of `AcrossHeads`."""

    layers: dict[str, Any] = Field(
        default="uniform",
        validate_default=True,
        description="allocation over the layers: uniform, pyramid(...), depth_shares(...)",
    )
    safeguard: float = Field(default=0.2, ge=0, le=1, description="share of the budget that every head is sure of")

    @field_validator("layers", mode="before")
    @classmethod
    def _describe(cls, layers: Any) -> dict[str, Any]:
        """Turn any spec into the full description."""
        if not isinstance(layers, str | Mapping | int):
            raise ValueError('give an allocation over the layers, e.g. "pyramid(beta=20)"')
        return build_allocation(layers).describe()


@register_allocation("across_heads")
class AcrossHeads(LayerAllocation):
    """Shares a layer's slots among its heads by one ranking of all (AdaKV, Feng et al., arXiv 2407.11550, alg. 1).

    With n slots per head given by ``layers`` and H heads, the layer keeps n H slots (or all that it holds). Every head
    keeps its ⌊safeguard n⌋ best for certain, the rest goes to the best of the layer. What the scorer protects comes
    before all others. Equal scores rank by position, then by head.
    """

    Options = AcrossHeadsOptions
    options: AcrossHeadsOptions
    layers: LayerAllocation

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        layers = build_allocation(self.options.layers)
        if isinstance(layers, AcrossHeads) or not isinstance(layers, LayerAllocation):
            raise ConfigError(
                f"allocation 'across_heads': layers: {layers.name!r} is no allocation over layers, so nothing is left "
                "to share among heads; use uniform, pyramid or depth_shares"
            )
        self.layers = layers

    def over(self, layers: Allocation) -> AcrossHeads:
        """Return the allocation with another one over the layers; `ConfigError` if that is none over layers."""
        return AcrossHeads(layers=layers.describe(), safeguard=self.options.safeguard)

    def shares(self) -> Tensor | None:
        """Return what the allocation over the layers learns."""
        return self.layers.shares()

    def take_shares(self) -> nn.Parameter | None:
        """Hand over what the allocation over the layers learns."""
        return self.layers.take_shares()

    def layer_limit(self, view: LayerView, mean: Tensor, ends: Ends, shares: Tensor | None = None) -> Tensor:
        """Return what the allocation over the layers gives."""
        return self.layers.layer_limit(view, mean, ends, shares)

    def head_limits(self, marked: Tensor, view: LayerView, held: Tensor, n: Tensor) -> Tensor:
        """Return how many of the layer's n H best are each head's: (batch, kv_heads, 1) int64."""
        safe = best(marked, share_of(self.options.safeguard, n)) & held
        # At most n a head are safe or protected (`Ends` sees to that), so all of them fit into the layer's total.
        ordered = torch.where(safe, torch.inf, marked)
        order = torch.sort(view.slots.flatten(-2), dim=-1, stable=True).indices
        flat = ordered.flatten(-2)
        order = order.expand(flat.shape)
        by_score = torch.sort(flat.gather(-1, order), dim=-1, descending=True, stable=True).indices
        order = order.gather(-1, by_score)
        places = torch.arange(order.shape[-1], device=order.device).expand(order.shape)
        ranks = torch.zeros_like(order).scatter(-1, order, places).reshape(ordered.shape)
        heads, slots = ordered.shape[-2:]
        # Slots that the layer has not got are counted too, so that the heads' limits add up to n H.
        return (ranks < n * heads).sum(-1, keepdim=True) + (n - slots).clamp(min=0)


# ---- whose count emerges --------------------------------------------------------------------------------------------


class ThresholdOptions(AllocationOptions):
    """Options of `Threshold`."""

    cap: Annotated[int, Field(ge=1, le=TOKENS)] | Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = (
        Field(
            default=None,
            description="slots per head at most: a number, or a share of the tokens read; none: the manager's budget",
        )
    )

    @field_validator("cap", mode="before")
    @classmethod
    def _number(cls, cap: Any) -> Any:
        if isinstance(cap, bool):
            raise ValueError("give a whole number >= 1, or a share in (0, 1]")
        return cap


@register_allocation("threshold")
class Threshold(EmergentAllocation):
    """Keeps where the score is >= 0, and always the newest token (NAMM, arXiv 2410.13166); heads are independent.

    How many slots that are is up to the scores; the cap is all that a budget does.
    """

    Options = ThresholdOptions
    options: ThresholdOptions

    def keep(self, scores: Tensor, view: LayerView, held: Tensor, ends: Ends, budget: int | float | None) -> Tensor:
        """Return the keep-mask: scores >= 0, of these the best up to the cap, protected tokens before all."""
        cap = budget if self.options.cap is None else self.options.cap
        n = slots_of_budget(cap, view)
        marked = _newest_marked(scores, view, held, ends, n)
        kept = marked >= 0
        return (kept if cap is None else kept & best(marked, n)) & held


class Dense(EmergentAllocation):
    """Every head of the batch keeps as many slots as the greediest: its own K best, K = max over heads of #{s >= 0}.

    What the reference implementation of NAMM does, because its cache is one tensor. For parity only, and not
    registered. The newest token is kept in any case.
    """

    name = "dense"

    def keep(self, scores: Tensor, view: LayerView, held: Tensor, ends: Ends, budget: int | float | None) -> Tensor:
        """Return the keep-mask."""
        marked = _newest_marked(scores, view, held, ends, tokens_read(view))
        most = (marked >= 0).sum(-1).amax()
        return best(marked, most) & held


class Everything(EmergentAllocation):
    """Keeps every slot that holds a token, whatever the budget; not registered: it is what ``full`` is."""

    name = "everything"

    def keep(self, scores: Tensor, view: LayerView, held: Tensor, ends: Ends, budget: int | float | None) -> Tensor:
        """Return ``held``."""
        return held


def _newest_marked(scores: Tensor, view: LayerView, held: Tensor, ends: Ends, n: Tensor) -> Tensor:
    """`Ends.mark`, with the newest token protected in any case."""
    if not ends.recent:
        ends = replace(ends, recent=1)
    return ends.mark(scores, view, held, n)
