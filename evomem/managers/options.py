"""Manager: the options that every manager has, when it decides, and which budgets there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from evomem.bounds import TOKENS, UNITS
from evomem.errors import ConfigError
from evomem.managers.allocation import build_allocation


def _no_truth_value(value: Any) -> Any:
    """Refuse a truth value, which would count as one token."""
    if isinstance(value, bool):
        raise ValueError("give a whole number of tokens, or a share of the slots in [0, 1]")
    return value


CountOrShare = Annotated[
    Annotated[int, Field(ge=0, le=TOKENS, strict=True)] | Annotated[float, Field(ge=0, le=1, strict=True)],
    BeforeValidator(_no_truth_value),
]
"""Of protected tokens: a whole number (3), or a float as share of a head's slots (0.1); 1 is a token, 1.0 is all."""


@dataclass(frozen=True)
class Schedule:
    """When a manager decides.

    Attributes
    ----------
    every : decide whenever a sequence has read another ``every`` tokens (of its own, padding not counted);
        None: once, at the end of a reading (a forward pass of more than one token, a prompt in chunks, or what is read
        inside ``cache.reading()``; see `SlotCache`).
    """

    every: int | None = None


class ManagerOptions(BaseModel):
    """Options that every manager has; subclasses add theirs. Saved whole in a plug-in's ``config.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    budget: int | float | None = Field(
        default=None,
        description="slots per KV head that a decision keeps: a whole number, or a share of the tokens read in (0, 1]",
    )
    every: int | None = Field(
        default=None, ge=1, le=TOKENS, description="decide every that many tokens; none: once, after the context"
    )
    allocation: Annotated[int, Field(ge=0, le=UNITS)] | dict[str, Any] | None = Field(
        default=None,
        description="how layers and heads share the budget, e.g. pyramid(beta=20) (see `evomem list allocations`); a "
        "whole number n: depth_shares(points=n); none: the manager's own way",
    )

    @field_validator("budget", mode="before")
    @classmethod
    def _budget(cls, budget: Any) -> Any:
        """Refuse a truth value, which would count as one slot."""
        if isinstance(budget, bool):
            raise ValueError("give a whole number of slots, or a share in (0, 1]")
        return budget

    @field_validator("allocation", mode="before")
    @classmethod
    def _allocation(cls, spec: Any) -> Any:
        """Turn a text or mapping into the full description; numbers stay numbers."""
        if isinstance(spec, bool):
            raise ValueError("give an allocation, e.g. pyramid(beta=20), or a number of points of depth")
        return build_allocation(spec).describe() if isinstance(spec, str | Mapping) else spec


def check_budget(budget: int | float | None) -> None:
    """Raise `ConfigError` unless the budget is None, a positive whole number, or a share in (0, 1]."""
    if budget is None:
        return
    if budget > TOKENS:
        raise ConfigError(f"budget: {budget!r} slots per head; at most {TOKENS}")
    if isinstance(budget, bool) or (isinstance(budget, int) and budget < 1):
        raise ConfigError(f"budget: {budget!r} slots per head keep nothing; give a whole number >= 1")
    if isinstance(budget, float) and not 0 < budget <= 1:
        raise ConfigError(f"budget: {budget!r} is not a share in (0, 1]; give whole numbers as slots, e.g. 64")
