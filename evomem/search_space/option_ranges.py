"""Search space: how one of its options varies in a search; real coordinates for every value, and back.

**Every real number decodes.** A bounded option goes through ``(1 - cos(pi u)) / 2`` with ``u = scale * x``: smooth
everywhere, periodic, reaching both ends (at whole u), one-to-one on [0, 1], and nowhere steeper than pi/2, so that a
step of the search moves an option by at most that share of its range. (A sigmoid would need infinite vectors for the
ends; clipping has no slope outside.) A category is the largest of its coordinates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from evomem.bounds import LARGE, LISTED, SMALL, VALUE
from evomem.errors import ConfigError
from evomem.validation import Settings

Array = NDArray[np.float64]

_VALUES = 100_000
"""Whole numbers between an option's bounds, at most: drivers for mixed spaces list them."""


def _fold(u: float) -> float:
    """Map a real number into [0, 1] smoothly (see the module's docstring)."""
    return (1.0 - math.cos(math.pi * u)) / 2.0


def _unfold(share: float) -> float:
    """Inverse of `_fold` on [0, 1]."""
    return math.acos(min(1.0, max(-1.0, 1.0 - 2.0 * share))) / math.pi


@dataclass(frozen=True)
class Variable:
    """What some coordinates of a vector stand for, for drivers that treat kinds of variables differently.

    Attributes
    ----------
    offset, width : the coordinates are ``offset`` to ``offset + width - 1``.
    bounds : of a number, the part of the line on which its encoding is one-to-one; None for a category.
    codes : (values, width) of an integer (width 1, ascending) or a category: the coordinates that encode each value.
        None for a real number.
    """

    offset: int
    width: int
    bounds: tuple[float, float] | None
    codes: Array | None

    @property
    def coordinates(self) -> list[int]:
        """The coordinates."""
        return list(range(self.offset, self.offset + self.width))

    def inside(self, x: float) -> float:
        """Return the coordinate within ``bounds`` that decodes to the same number (`_fold` is even, with period 2)."""
        if self.bounds is None:
            return x
        scale = 1.0 / self.bounds[1]
        return abs((x * scale + 1.0) % 2.0 - 1.0) / scale

    def nearest(self, vector: Array) -> int:
        """Return the value (row of ``codes``) whose code is the nearest to a vector (dim,); the first of equals."""
        if self.codes is None:
            raise ConfigError("search space: a real variable has no list of values")
        return int(np.argmin(((self.codes - vector[self.coordinates]) ** 2).sum(axis=1)))


class _Numeric(Settings):
    low: float = Field(le=VALUE, ge=-VALUE, allow_inf_nan=False)
    high: float = Field(le=VALUE, ge=-VALUE, allow_inf_nan=False)
    scale: float = Field(
        default=1.0, ge=SMALL, le=LARGE, allow_inf_nan=False, description="range that one unit of the vector crosses"
    )
    start: float | None = Field(
        default=None, le=VALUE, ge=-VALUE, description="where the search starts; the manager's own value by default"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low {self.low} must be below high {self.high}")
        if self.start is not None:
            self.check(self.start)
        return self

    @property
    def width(self) -> int:
        """Coordinates that the option takes in the vector."""
        return 1

    def check(self, value: Any) -> float:
        """Return the value as a number; raise ValueError if it is outside the bounds."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{value!r} is not a number")
        if not self.low <= value <= self.high:
            raise ValueError(f"{value!r} is outside [{self.low}, {self.high}]")
        return float(value)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Coordinates between which every value is met once."""
        return 0.0, 1.0 / self.scale

    def codes(self) -> Array | None:
        """Return the coordinates of every value (values, 1), or None where values are not listed."""
        return None

    def default(self) -> Any:
        """Return where to start when neither the space nor the manager says."""
        return self.decode(np.array([0.5 / self.scale]))

    def decode(self, x: Array) -> Any:
        """Return the option's value for its coordinates."""
        return self.value(_fold(self.scale * float(x[0])))

    def encode(self, value: Any) -> Array:
        """Return coordinates that decode to the value."""
        return np.array([_unfold(self.share(self.check(value))) / self.scale])

    def value(self, share: float) -> Any:
        """Return the value at a share in [0, 1] of the range."""
        raise NotImplementedError

    def share(self, value: float) -> float:
        """Return the share in [0, 1] of the range at which a value lies."""
        raise NotImplementedError


class Bounded(_Numeric):
    """A real option between two bounds, linear."""

    kind: Literal["bounded"]

    def value(self, share: float) -> float:
        """Return the value at a share of the range."""
        return min(self.high, self.low + (self.high - self.low) * share)

    def share(self, value: float) -> float:
        """Return the share at which a value lies."""
        return (value - self.low) / (self.high - self.low)


class Log(_Numeric):
    """A positive real option whose orders of magnitude matter: linear in its logarithm."""

    kind: Literal["log"]

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if self.low <= 0:
            raise ValueError(f"low {self.low} must be above 0 on a logarithmic scale")
        return self

    def value(self, share: float) -> float:
        """Return the value at a share of the range."""
        return min(self.high, max(self.low, self.low * math.exp(share * math.log(self.high / self.low))))

    def share(self, value: float) -> float:
        """Return the share at which a value lies."""
        return math.log(value / self.low) / math.log(self.high / self.low)


class _Whole(_Numeric):
    @model_validator(mode="after")
    def _whole(self) -> Self:
        for name in ("low", "high", "start"):
            value = getattr(self, name)
            if value is not None and value != int(value):
                raise ValueError(f"{name} {value} must be a whole number")
        if self.high - self.low > _VALUES:
            raise ValueError(f"low {self.low:.0f} to high {self.high:.0f} are more than {_VALUES:,} whole numbers")
        return self

    def require_whole(self, value: float) -> float:
        """Return the value; raise ValueError unless it is a whole number."""
        if value != int(value):
            raise ValueError(f"{value!r} is not a whole number")
        return value

    def codes(self) -> Array:
        """Return the coordinates of every number (values, 1), ascending."""
        return np.array([self.encode(value) for value in range(int(self.low), int(self.high) + 1)])


class Integer(_Whole):
    """A whole number between two bounds (both included), each with an equal part of the range."""

    kind: Literal["integer"]

    def value(self, share: float) -> int:
        """Return the whole number in whose part of the range the share lies."""
        count = int(self.high) - int(self.low) + 1
        return int(self.low) + min(count - 1, int(share * count))

    def share(self, value: float) -> float:
        """Return the middle of the number's part of the range."""
        return (self.require_whole(value) - self.low + 0.5) / (self.high - self.low + 1)


class LogInteger(_Whole):
    """A positive whole number whose orders of magnitude matter: n has the part from log n to log(n + 1)."""

    kind: Literal["log_integer"]

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if self.low < 1:
            raise ValueError(f"low {self.low} must be at least 1 on a logarithmic scale")
        return self

    def value(self, share: float) -> int:
        """Return the whole number in whose part of the range the share lies."""
        number = int(self.low * ((self.high + 1) / self.low) ** share)
        return min(int(self.high), max(int(self.low), number))

    def share(self, value: float) -> float:
        """Return the middle of the number's part of the range."""
        middle = math.sqrt(self.require_whole(value) * (value + 1))
        return math.log(middle / self.low) / math.log((self.high + 1) / self.low)


class Categorical(Settings):
    """One of several values: a coordinate each, the largest counts (the first of equals)."""

    kind: Literal["categorical"]
    choices: list[Any] = Field(min_length=2, max_length=LISTED)
    scale: float = Field(default=1.0, ge=SMALL, le=LARGE, allow_inf_nan=False)
    start: Any = None

    @field_validator("choices")
    @classmethod
    def _distinct(cls, choices: list[Any]) -> list[Any]:
        if any(choice in choices[:number] for number, choice in enumerate(choices)):
            raise ValueError("the same choice is given twice")
        return choices

    @property
    def width(self) -> int:
        """Coordinates that the option takes in the vector."""
        return len(self.choices)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """None: its values are listed, and no coordinate stands for them alone."""
        return None

    def codes(self) -> Array:
        """Return the coordinates of every choice (choices, choices)."""
        return np.array([self.encode(choice) for choice in self.choices])

    def default(self) -> Any:
        """Return where to start when neither the space nor the manager says."""
        return self.choices[0]

    def decode(self, x: Array) -> Any:
        """Return the choice with the largest coordinate; NaN never wins."""
        return self.choices[int(np.argmax(np.where(np.isnan(x), -np.inf, x)))]

    def encode(self, value: Any) -> Array:
        """Return 1/scale at the choice and 0 elsewhere."""
        if value not in self.choices:
            raise ValueError(f"{value!r} is none of {self.choices}")
        x = np.zeros(len(self.choices))
        x[self.choices.index(value)] = 1.0 / self.scale
        return x


Option = Annotated[Bounded | Log | Integer | LogInteger | Categorical, Field(discriminator="kind")]
