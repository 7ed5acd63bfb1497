"""Plug-in: a manager's tensors as the bytes of a safetensors file, and back, to the bit and in their own types.

A manager may have been made smaller (``manager.bfloat16()``), or built under another default type. The types that
floating-point tensors have in the file are those that they have again, whatever a constructor gives them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from evomem.errors import ConfigError, PluginError
from evomem.files.strict_json import shown
from evomem.managers import MemoryManager
from evomem.managers.allocation.probed import check_probes
from evomem.managers.base import retype


def to_bytes(manager: MemoryManager, where: str) -> bytes:
    """Return the content of a safetensors file with all of a manager's tensors, buffers included.

    Tensors may be on any device, in any layout, parts of others, or tied: each is written whole, by its own name.

    Raises
    ------
    PluginError : values that are NaN or infinite, that are not there (meta device), or of a kind that the file format
        does not have. ``where`` begins the message.
    """
    tensors: dict[str, Tensor] = {}
    state: Mapping[str, Any] = manager.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise PluginError(f"{where}: {name}: is {type(value).__name__}; a plug-in holds tensors and nothing else")
        if value.is_meta:
            raise PluginError(f"{where}: {name}: is on the meta device and has no values; load them first")
        if value.layout != torch.strided or value.is_quantized:
            raise PluginError(f"{where}: {name}: is sparse or quantised; save the manager with dense tensors")
        with torch.no_grad():
            # A copy: safetensors refuses tensors that share memory.
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        check_finite(tensors[name], where, name)
    try:
        return safetensors.torch.save(tensors, {"format": "pt"})
    except Exception as error:  # its own classes, and Python's for types that it does not know
        kinds = ", ".join(sorted({str(tensor.dtype) for tensor in tensors.values()}))
        said = shown(f"{type(error).__name__}: {error}", 200)
        raise PluginError(
            f"{where}: tensors of types {kinds} cannot be written as safetensors ({said}); convert the manager first, "
            "e.g. manager.float()"
        ) from None


def check_tensors(
    path: Path,
    name: str,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    measured: Collection[str] = (),
) -> None:
    """Raise `PluginError` unless the tensors of a file are those that manager ``name`` has.

    Every floating-point type stands for every other; all other types must be the expected ones.

    Parameters
    ----------
    measured : tensors whose first axis may have any length: they were measured on a model, and are as large as it is.
    """
    for field, tensor in expected.items():
        if field not in tensors:
            raise PluginError(f"{path}: {field}: is missing")
        rank = tensor.dim() if field in measured else None
        fits = tensors[field].dim() == rank and tensors[field].shape[1:] == tensor.shape[1:]
        if tensors[field].shape != tensor.shape and not fits:
            raise PluginError(
                f"{path}: {field}: has shape {tuple(tensors[field].shape)}, {tuple(tensor.shape)} is expected"
            )
        if tensors[field].dtype != tensor.dtype and not (
            tensors[field].is_floating_point() and tensor.is_floating_point()
        ):
            raise PluginError(f"{path}: {field}: has type {tensors[field].dtype}, {tensor.dtype} is expected")
        check_finite(tensors[field], str(path), field)
    for field in tensors:
        if field not in expected:
            raise PluginError(f"{path}: {shown(field)}: is not a tensor of manager {name!r}")


def check_finite(tensor: Tensor, where: str, name: str) -> None:
    """Raise `PluginError` if a value is NaN or infinite."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.is_floating_point():
        # In fp64, because not every small type can be asked; a loop over few numbers.
        finite = torch.isfinite(tensor.double())
        if not finite.all():
            count = int((~finite).sum())
            raise PluginError(f"{where}: {name}: {count} of {tensor.numel()} values are NaN or infinite")


def set_tensors(manager: MemoryManager, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Give a manager the tensors of a file, in the file's types; tied parameters stay tied.

    Raises
    ------
    PluginError : two names of one tied parameter have different values in the file; what was measured on a model
        contradicts itself.
    """
    retype(manager, {name: tensor.dtype for name, tensor in tensors.items()})
    manager.load_state_dict(dict(tensors))
    try:
        check_probes(manager)
    except ConfigError as error:
        raise PluginError(f"{path}: {error}") from None
    for name, value in manager.state_dict().items():
        if value.dtype != tensors[name].dtype or not torch.equal(_bits(value), _bits(tensors[name])):
            raise PluginError(f"{path}: {name}: is tied to another tensor, which has other values or another type")


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes, which can be compared whatever its type."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
