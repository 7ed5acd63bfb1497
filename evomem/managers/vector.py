"""Manager: its parameters as one flat vector, the form in which drivers search.

Order: the parameters as the module registered them, each flattened in row-major order. Buffers are not in it: they are
measured, not searched.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from evomem.errors import ConfigError


def zeros(*shape: int) -> nn.Parameter:
    """Return a parameter of zeros in fp32, whatever PyTorch's default type is: vectors must fit it exactly."""
    return nn.Parameter(torch.zeros(*shape, dtype=torch.float32))


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Return standard normal numbers on the default device, the same on every one; none on the meta device."""
    if torch.get_default_device().type == "meta":
        return torch.empty(shape, dtype=torch.float32)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    return drawn.to(torch.get_default_device())


def vector_size(module: nn.Module) -> int:
    """Return how many numbers the vector of ``module`` has."""
    return sum(parameter.numel() for parameter in module.parameters())


def to_vector(module: nn.Module) -> NDArray[np.float64]:
    """Return all parameters as one vector (size,); float64, which holds float32 values exactly."""
    parts = [parameter.detach().cpu().double().reshape(-1).numpy() for parameter in module.parameters()]
    return np.concatenate(parts) if parts else np.zeros(0)


def load_vector(module: nn.Module, vector: ArrayLike) -> None:
    """Set all parameters from one vector (size,); raise `ConfigError` if its shape is another or a value not finite."""
    values = np.asarray(vector, dtype=np.float64)
    if values.ndim != 1:
        raise ConfigError(f"parameter vector: shape {values.shape}; give one axis of {vector_size(module)} numbers")
    if not np.isfinite(values).all():
        entry = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ConfigError(f"parameter vector: entry {entry} is {values[entry]}; every entry must be finite")
    named = unflatten(module, torch.from_numpy(values))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(named[name])


def unflatten(module: nn.Module, vectors: Tensor) -> dict[str, Tensor]:
    """Return the parameters by name, as views of ``vectors``.

    The result is what ``torch.func.functional_call(module, result, ...)`` takes; gradients flow back into ``vectors``.

    Parameters
    ----------
    module
        Gives the names and shapes; its own values do not matter.
    vectors
        (..., size); leading axes, such as a population, stay leading axes of every parameter.

    Raises
    ------
    ConfigError : the last axis has not as many entries as the module has parameters.
    """
    size = vector_size(module)
    if vectors.shape[-1] != size:
        name: Any = getattr(module, "name", type(module).__name__)
        raise ConfigError(
            f"parameter vector: {vectors.shape[-1]} numbers, but {name!r} with these options has {size} parameters"
        )
    named: dict[str, Tensor] = {}
    start = 0
    for name, parameter in module.named_parameters():
        part = vectors[..., start : start + parameter.numel()]
        named[name] = part.reshape(*vectors.shape[:-1], *parameter.shape)
        start += parameter.numel()
    return named
