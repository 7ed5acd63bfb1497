"""Search space: where a search starts from: what a user may say, and numbers by pattern, by heuristic, or at random."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from evomem.bounds import LARGE, VALUE
from evomem.errors import ConfigError
from evomem.managers.base import MemoryManager
from evomem.validation import Settings

Number = Annotated[float, Field(ge=-VALUE, le=VALUE, allow_inf_nan=False)]


class Start(Settings):
    """Where a search starts from; exactly one of the fields, and noise.

    Attributes
    ----------
    vector : numbers, or a .npy file of them.
    heuristic : a manager that this one can imitate (its class says which).
    plugin : folder of a manager of the same kind; its numbers are taken, options are the space's.
    parameters : numbers by pattern of parameter names; weights that no pattern matches are zero.
    noise : standard deviation of normal numbers, always the same ones, that are added to all weights that vary: a
        network of zeros has no gradient inside.
    """

    vector: str | Annotated[list[Number], Field(max_length=10**7)] | None = None
    heuristic: str | None = None
    plugin: str | None = None
    parameters: dict[str, Number] | None = None
    noise: float = Field(default=0.0, ge=0, le=LARGE, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one(self) -> Self:
        kinds = [field for field in type(self).model_fields if field != "noise"]
        if sum(getattr(self, field) is not None for field in kinds) != 1:
            raise ValueError(f"give exactly one of {', '.join(kinds)}")
        return self


def start_from_heuristic(manager: MemoryManager, heuristic: str) -> MemoryManager:
    """Return a manager of the same kind and options that decides like a heuristic, if its class can express it.

    The class offers that by a class method ``start_from(heuristic, **options)``.
    """
    hook = getattr(type(manager), "start_from", None)
    if hook is None:
        raise ConfigError(
            f"search space: start.heuristic: manager {manager.name!r} cannot start from a heuristic; "
            "start from zeros, initial, parameters, a vector or a plug-in"
        )
    made: MemoryManager = hook(heuristic, **manager.options.model_dump())
    return made.requires_grad_(False)


def add_noise(parameters: Mapping[str, Tensor], deviation: float) -> None:
    """Add normal numbers, always the same ones, to parameters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu")
            parameter.add_(deviation * noise.to(parameter.device))


def fill(parameters: Mapping[str, Tensor], numbers: Mapping[str, float]) -> None:
    """Set parameters to zero, and those whose names match a pattern (shell style) to its number.

    Raises
    ------
    ConfigError : a pattern matches none of them.
    """
    for pattern in numbers:
        if not fnmatch.filter(parameters, pattern):
            raise ConfigError(
                f"search space: start.parameters: no parameter that varies matches {pattern!r}; "
                f"there are: {', '.join(parameters) or 'none'}"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            fitting = [number for pattern, number in numbers.items() if fnmatch.fnmatchcase(name, pattern)]
            parameter.fill_(fitting[0] if fitting else 0.0)
