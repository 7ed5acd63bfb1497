"""Base: how sure a mean or a paired difference is, and who wins."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evomem.errors import EvomemError
from evomem.installing import require

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap interval; the bounds are NaN where there are fewer than two samples."""

    mean: float
    low: float
    high: float

    def bounds(self) -> list[float] | None:
        """Return ``[low, high]``, or None if there are none."""
        return [self.low, self.high] if math.isfinite(self.low) and math.isfinite(self.high) else None


def bootstrap_mean(values: ArrayLike, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Return the mean of ``values`` (samples,) with its bias-corrected and accelerated bootstrap interval.

    Source: Efron, "Better bootstrap confidence intervals" (1987), as `scipy.stats.bootstrap` computes it. Where that is
    not defined the percentile interval is given; equal values have an interval of length zero. The same values always
    give the same interval.

    Raises
    ------
    MissingPackagesError : scipy is not installed.
    """
    require([("scipy", "intervals")])
    from scipy.stats import bootstrap

    data = np.asarray(values, dtype=np.float64)
    mean = float(data.mean()) if data.size else math.nan
    if data.size < 2 or not np.isfinite(data).all():
        return Interval(mean, math.nan, math.nan)
    if np.ptp(data) == 0:
        return Interval(mean, mean, mean)
    low, high = math.nan, math.nan
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # of a degenerate distribution: the next method is the answer to it
            bounds = bootstrap(
                (data,), np.mean, confidence_level=level, n_resamples=resamples, method=method, batch=1000,
                random_state=np.random.default_rng(seed),
            ).confidence_interval  # fmt: skip
        low, high = float(bounds.low), float(bounds.high)
        if math.isfinite(low) and math.isfinite(high):
            break
    return Interval(mean, low, high)


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Return the mean of ``a - b`` over paired samples with its bootstrap interval; see `bootstrap_mean`.

    Raises
    ------
    EvomemError : ``a`` and ``b`` are of different lengths.
    """
    if len(a) != len(b):
        raise EvomemError(f"a paired comparison needs the same samples on both sides; got {len(a)} and {len(b)}")
    return bootstrap_mean(
        np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64), level=level, resamples=resamples, seed=seed
    )


def percentile_interval(values: ArrayLike, *, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Return the mean of ``values`` (samples,) with its 95 % percentile bootstrap interval.

    It needs no scipy, and is a little too narrow for few or skewed values; `bootstrap_mean` corrects for that. The same
    values always give the same interval.
    """
    data = np.asarray(values, dtype=np.float64)
    rows = np.random.default_rng(seed).integers(0, len(data), size=(resamples, len(data)))
    low, high = np.quantile(data[rows].mean(axis=1), (0.025, 0.975))
    return Interval(float(data.mean()), float(low), float(high))


Rewards = TypeVar("Rewards", NDArray[np.float64], "Tensor")


def leave_one_out(rewards: Rewards) -> Rewards:
    """Return advantages (samples, ...): each reward minus the mean of the other samples' of the same context (RLOO).

    Source: Kool, van Hoof, Welling, "Buy 4 REINFORCE samples, get a baseline for free!" (2019). The baseline does not
    depend on the sample that it is taken off, so the gradient stays unbiased. A single reward has no others: it is
    returned as it is.
    """
    count = len(rewards)
    return (rewards - rewards.mean(0)) * (count / (count - 1)) if count > 1 else rewards


Verdict = Literal["wins", "loses", "ties", "unknown"]

DIGITS = 3
"""Digits after the point with which advantages and their intervals are printed."""


def verdict(interval: Sequence[float] | None) -> Verdict:
    """Return who wins by the interval ``(low, high)`` of an advantage.

    ``wins`` and ``loses`` if it lies above or below zero as it is printed, with `DIGITS` digits; ``ties`` if zero is in
    it or a bound is printed as zero: nobody wins by ``[0.000, 0.000]``. ``unknown`` without an interval.
    """
    if interval is None:
        return "unknown"
    low, high = (round(bound, DIGITS) for bound in interval)
    return "wins" if low > 0 else "loses" if high < 0 else "ties"


def recovered_share(value: float, floor: float, full: float) -> float | None:
    """Return (value - floor) / (full - floor): how much of what a trivial eviction loses is won back.

    None where the full cache is no better than the floor, or a number is not finite.
    """
    if not all(map(math.isfinite, (value, floor, full))) or full <= floor:
        return None
    return (value - floor) / (full - floor)
