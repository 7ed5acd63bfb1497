"""Run: the files of a run folder, read with suspicion: bounded, regular, and of the shape that we write.

A folder may be damaged, or somebody else's. Whatever is in it, reading it ends in values or in a `RunError` that names
the file.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from torch import Tensor

from evomem.errors import PluginError, RunError
from evomem.files.reading import TEXT, read_bytes, read_text
from evomem.files.strict_json import DEPTH, NotStrictError, parse_strict, shown

_JSON = 256 << 20
FILE = 4 << 30
"""Bytes of a file of numbers, at most."""
_HEADER = 10_000
_DAMAGE = (
    ValueError,
    TypeError,
    EOFError,
    SyntaxError,
    TokenError,
    struct.error,
    ArithmeticError,
    RecursionError,
    UserWarning,
)
_YAML: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_OPENING = (
    yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken, yaml.BlockSequenceStartToken, yaml.BlockMappingStartToken,
)  # fmt: skip
_CLOSING = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)


@contextmanager
def of_shape(path: Path, cure: str = "") -> Iterator[None]:
    """Turn what wrong shapes and values raise into a `RunError` that names the file, and says what to do."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        if isinstance(error, RunError):
            raise
        what = f"no {error}" if isinstance(error, KeyError) else shown(str(error), 200)
        raise RunError(f"{path}: cannot be read: {what}{'; ' * bool(cure)}{cure}") from None


def read_json(path: Path, cure: str = "") -> Any:
    """Return what a JSON file says (`evomem.files.strict_json.parse_strict`)."""
    text = read_text(path, _JSON, RunError)
    try:
        return parse_strict(text)
    except NotStrictError as error:
        raise RunError(f"{path}: cannot be read: {error}{'; ' * bool(cure)}{cure}") from None


def read_object(path: Path, cure: str = "") -> dict[str, Any]:
    """Return a JSON object; see `read_json`."""
    content = read_json(path, cure)
    if not isinstance(content, dict):
        raise RunError(f"{path}: is damaged: an object is expected, this is {type(content).__name__}")
    return content


def read_numbers(path: Path, dimensions: int = 1) -> NDArray[np.float64]:
    """Return the finite numbers of a .npy file that `write_vector` wrote.

    Raises
    ------
    RunError : it is damaged, of another type, or has another number of dimensions.
    """
    content = read_bytes(path, FILE, RunError)
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"version {version} of the format")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a header of Python 2 is none of ours
            shape, turned, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=_HEADER)
        if dtype != np.dtype("<f8") or len(shape) != dimensions or any(size < 0 for size in shape):
            raise ValueError(f"{dtype} of shape {shape}; {dimensions} dimensions of float64 are expected")
        rest = content[file.tell() :]
        if len(rest) != 8 * math.prod(shape):
            raise ValueError(f"{len(rest):,} bytes for numbers of shape {shape}")
        numbers = np.frombuffer(rest, dtype=np.float64).reshape(shape, order="F" if turned else "C").copy()
        if not np.isfinite(numbers).all():
            raise ValueError("numbers that are not finite")
    except _DAMAGE as error:
        raise RunError(f"{path}: is damaged: {shown(str(error), 200)}") from None
    return numbers


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file."""
    from evomem.plugins.untrusted import parse_tensors

    try:
        return parse_tensors(path, read_bytes(path, FILE, RunError))
    except PluginError as error:
        raise RunError(str(error)) from None


def read_config(path: Path) -> dict[str, Any]:
    """Return the resolved configuration that a run folder keeps: plain YAML, a mapping, without aliases."""
    text = read_text(path, TEXT, RunError)
    try:
        depth = 0
        for token in yaml.scan(text, _YAML):  # before anything is built of it
            if isinstance(token, yaml.AliasToken):
                raise RunError(f"{path}: is damaged: it has aliases (*name), which evomem does not write")
            depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
            if depth > DEPTH:
                raise RunError(f"{path}: is damaged: it is nested more than {DEPTH} levels deep")
        data = yaml.load(text, _YAML)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise RunError(f"{path}: cannot be read: {shown(' '.join(str(error).split()), 200)}") from None
    if not isinstance(data, dict):
        raise RunError(f"{path}: cannot be read: a mapping is expected, this is {type(data).__name__}")
    return data
