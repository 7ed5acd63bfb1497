"""Search space: a vector that a search starts from, given as numbers or as a file."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

from evomem.errors import ConfigError
from evomem.files.reading import read_bytes, user_path
from evomem.files.strict_json import shown

Array = NDArray[np.float64]

_VECTOR = 256 << 20
"""Bytes of a file of numbers, at most."""


def read_vector(source: str | list[float]) -> Array:
    """Return numbers that a search space gives (size,) float64: themselves, or a ``.npy`` file of them.

    Raises
    ------
    ConfigError : the file cannot be read.
    """
    if not isinstance(source, str):
        return np.asarray(source, dtype=np.float64)
    where = f"search space: start.vector: {shown(source)}"
    content = read_bytes(user_path(source), _VECTOR, ConfigError)
    try:
        return np.asarray(np.load(io.BytesIO(content), allow_pickle=False), dtype=np.float64)
    except (
        OSError,
        ValueError,
        TypeError,
        EOFError,
        ArithmeticError,
        MemoryError,
    ) as error:  # headers say anything
        raise ConfigError(f"{where}: cannot be read as a .npy vector: {shown(str(error), 200)}") from None
